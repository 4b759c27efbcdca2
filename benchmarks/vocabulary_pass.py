"""What the vocabulary pass costs over the bare matrix products, and that its memory does not grow with the tokens.

    python benchmarks/vocabulary_pass.py [--vocabulary 50257] [--tokens 460] [--repeats 5]

Each measurement runs in a process of its own, so that peaks do not mix. The bare products are the four per token that
nobody can avoid with `cross_entropy` + `forward_kl`: student logits, teacher logits, gradient of the student's states,
gradient of its head. Only ratios within one run mean anything.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import nn
from torch.multiprocessing import get_context

from kdzoo import Batch, Head, ModelInfo, ModelPair, Side
from kdzoo.step.chunks import CHUNK_BYTES, chunk_tokens
from kdzoo.step.distiller import Distiller
from kdzoo.step.inputs import PassInputs
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Report
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL

STUDENT, TEACHER = 768, 1600
"""GPT-2 small and XL."""


def inputs(tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, nn.Parameter, nn.Parameter, torch.Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(tokens, STUDENT),
        torch.randn(tokens, TEACHER),
        nn.Parameter(torch.randn(vocabulary, STUDENT).mul_(0.02)),
        nn.Parameter(torch.randn(vocabulary, TEACHER).mul_(0.02), requires_grad=False),
        torch.randint(vocabulary, (tokens,)),
    )


def bare_products(tokens: int, vocabulary: int, chunk: int) -> Callable[[], None]:
    student, teacher, student_head, teacher_head, _ = inputs(tokens, vocabulary)

    @torch.no_grad()
    def run() -> None:
        gradient = None
        for part, other in zip(student.split(chunk), teacher.split(chunk), strict=True):
            product = part @ student_head.t()
            other @ teacher_head.t()
            product @ student_head
            gradient = product.t() @ part if gradient is None else gradient.addmm_(product.t(), part)

    return run


def vocabulary_pass(tokens: int, vocabulary: int, chunk: int) -> Callable[[], None]:
    student, teacher, student_head, teacher_head, labels = inputs(tokens, vocabulary)
    pair = ModelPair(ModelInfo(STUDENT, vocabulary, 1, "gpt2"), ModelInfo(TEACHER, vocabulary, 1, "gpt2"), True)
    terms = [LossTerm.of(loss.name, loss(loss.Params(), pair, {})) for loss in (CrossEntropy, ForwardKL)]
    distiller = Distiller(None, None, None, terms)
    every = torch.arange(tokens)
    none = torch.full_like(every, -1)
    side = Side(labels[None], torch.ones_like(labels[None]), every, labels, labels, torch.zeros_like(every), none)
    pairs = torch.stack([every, every], 1)
    batch = Batch(side, side, pairs, True, {})
    batch = Batch(side, side, pairs, True, batch.local_counts())
    heads = {"student": Head(student_head), "teacher": Head(teacher_head)}
    weights = {term.name: 1.0 for term in terms}
    student.requires_grad_()

    def run() -> None:
        student.grad = student_head.grad = None
        inputs = PassInputs(batch, {"hidden.last": student}, {"hidden.last": teacher}, heads, weights, Report())
        distiller.score(inputs).backward()

    return run


def measure(
    make: Callable[[int, int, int], Callable[[], None]],
    tokens: int,
    vocabulary: int,
    chunk: int,
    repeats: int,
    answer: object,
) -> None:
    """Median seconds of `repeats` runs and the peak memory in MiB over that before the first."""
    torch.set_flush_denormal(True)  # as a run does on a CPU
    run = make(tokens, vocabulary, chunk)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()  # the first one makes threads and maps memory
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.put((statistics.median(seconds), (peak - before) / 1024))  # type: ignore[attr-defined]


def apart(make: Callable[[int, int, int], Callable[[], None]], *sizes: int) -> tuple[float, float]:
    context = get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=measure, args=(make, *sizes, answer))
    process.start()
    found = answer.get()
    process.join()
    return found


@click.command()
@click.option("--vocabulary", default=50_257, show_default=True)
@click.option("--tokens", default=460, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(vocabulary: int, tokens: int, repeats: int) -> None:
    """Print the pass's ratio to the bare products, and its peak memory against the number of tokens."""
    chunk = chunk_tokens(CHUNK_BYTES, 2 * vocabulary)
    print(
        f"V = {vocabulary:,}, widths {STUDENT} and {TEACHER}, {tokens} tokens in chunks of {chunk}, "
        f"{torch.get_num_threads()} threads, float32"
    )
    bare, bare_peak = apart(bare_products, tokens, vocabulary, chunk, repeats)
    ours, peak = apart(vocabulary_pass, tokens, vocabulary, chunk, repeats)
    print(f"bare products        {bare:7.3f} s   {bare_peak:7.0f} MiB over start")
    print(f"the pass             {ours:7.3f} s   {peak:7.0f} MiB over start")
    print(f"ratio                {ours / bare:7.3f}")
    _, more = apart(vocabulary_pass, 4 * tokens, vocabulary, chunk, 1)
    print(f"4 x the tokens                   {more:7.0f} MiB over start, {more / peak:.3f} times the peak")


if __name__ == "__main__":
    main()
