"""The pass over the vocabulary against formulas of all logits at once, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from settings import (
    Crossed,
    D,
    Gold,
    GoldTokens,
    Losses,
    OnWrong,
    Outcome,
    S,
    Setting,
    TestLoss,
    Truncated,
    TruncatedTokens,
    V,
    Worst,
    log_mean_exp,
    make_paired_setting,
    make_setting,
    truncated_kl,
)
from torch import Tensor

from kdzoo import Head, Logits, Needs, NoParams, Step, Stream, Terms, ops, visit
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL

CHUNKS = pytest.mark.parametrize("chunk_tokens", [1, 7, None])


@pytest.fixture(params=[None, 2], ids=["whole chunks", "tiles of two tokens"], autouse=True)
def tile(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr("kdzoo.step.chunks.TILE_BYTES", 4 * 11 * request.param)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def gold(setting: Setting) -> Tensor:
    return nll(setting.logits(), setting.batch.student.labels).sum() / setting.batch.counts["tokens"]


def on_pairs(setting: Setting) -> Tensor:
    student, teacher = setting.batch.pairs.T
    kl = truncated_kl(setting.logits()[student], setting.teacher_logits()[teacher])
    return kl.sum() / setting.batch.counts["pairs"]


def on_wrong(loss: OnWrong, setting: Setting, wrong: Tensor) -> Tensor:
    labels = setting.batch.student.labels[wrong]
    seen = nll(setting.logits()[wrong], labels)
    shifted = setting.head.finish(loss.shift(setting.hidden) @ setting.head.weight.T, setting.head.bias)[wrong]
    return (seen.sum() + nll(shifted, labels).sum()) / setting.batch.counts["tokens"]


def wrong_tokens(setting: Setting) -> Tensor:
    """By hand: with two tokenizers, tokens whose span holds a wrong teacher token."""
    wrong = setting.teacher_logits().argmax(-1) != setting.batch.teacher.labels
    if setting.batch.same_tokens:
        return wrong
    spans = set(setting.batch.teacher.span[wrong].tolist()) - {-1}
    return torch.tensor([int(span) in spans for span in setting.batch.student.span])


def make_half_wrong(setting: Setting) -> Setting:
    """Every other teacher token predicts its label."""
    labels = setting.batch.teacher.labels.clone()
    labels[::2] = setting.teacher_logits().argmax(-1)[::2]
    labels[1::2] = (setting.teacher_logits().argmax(-1)[1::2] + 1) % len(setting.teacher_head.weight)
    teacher = replace(setting.batch.teacher, labels=labels)
    student = replace(setting.batch.student, labels=labels) if setting.batch.same_tokens else setting.batch.student
    return replace(setting, batch=replace(setting.batch, student=student, teacher=teacher))


# One tokenizer.


@CHUNKS
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy(chunk_tokens, bias):
    setting = make_setting(bias=bias)
    losses = {"sft": (setting.make(CrossEntropy), 0.7)}
    expected = setting.naive(lambda: 0.7 * gold(setting))
    setting.run(losses, chunk_tokens).assert_close(expected)


@CHUNKS
def test_several_losses_at_once(chunk_tokens):
    setting = make_half_wrong(make_setting())
    waits, crossed = setting.make(OnWrong), setting.make(Crossed)
    losses = {
        "sft": (setting.make(CrossEntropy), 0.5),
        "kl": (setting.make(ForwardKL, temperature=2.0, square_temperature=True), 0.3),
        "waits": (waits, 0.7),
        "crossed": (crossed, 0.2),
        "worst": (setting.make(Worst), 0.4),
    }

    def formula() -> Tensor:
        log_p, log_q = (setting.teacher_logits() / 2).log_softmax(-1), (setting.logits() / 2).log_softmax(-1)
        kl = 4 * (log_p.exp() * (log_p - log_q)).sum() / setting.batch.counts["tokens"]
        worst = log_mean_exp(nll(setting.logits(), setting.batch.student.labels), setting.batch.student).mean()
        waited = on_wrong(waits, setting, wrong_tokens(setting))
        return 0.5 * gold(setting) + 0.3 * kl + 0.7 * waited + 0.2 * crossed.naive(setting) + 0.4 * worst

    setting.run(losses, chunk_tokens).assert_close(setting.naive(formula, losses))


@pytest.mark.parametrize("shape", [{"scale": 0.3}, {"soft_cap": 2.0}, {"scale": 1.7, "soft_cap": 3.0, "bias": True}])
def test_scale_and_soft_cap_and_bias_of_a_head(shape):
    setting = make_setting(**shape)
    h, w, b = setting.hidden, setting.head.weight, setting.head.bias

    def formula() -> Tensor:
        logits = shape.get("scale", 1.0) * (h @ w.T + (0 if b is None else b))
        if "soft_cap" in shape:
            logits = shape["soft_cap"] * torch.tanh(logits / shape["soft_cap"])
        return nll(logits, setting.batch.student.labels).mean()

    setting.run({"sft": (setting.make(CrossEntropy), 1.0)}, 3).assert_close(setting.naive(formula))


def test_a_frozen_head_gets_no_gradient():
    setting = make_setting()
    setting.head.weight.requires_grad_(False)
    found = setting.run({"sft": (setting.make(CrossEntropy), 1.0)})
    assert found.gradients.keys() == {"hidden"}
    found.assert_close(setting.naive(lambda: gold(setting)))


def test_without_gradients_the_values_are_the_same():
    setting = make_setting()
    losses = {"sft": (setting.make(CrossEntropy), 1.0), "worst": (setting.make(Worst), 1.0)}
    expected = setting.run(losses)
    with torch.no_grad():
        found, _ = setting.score(losses)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.loss)


class Picky(TestLoss):
    """Has nothing to say about chunks without a token 0: neither a term nor a gradient."""

    name = "picky"

    @visit
    def gold(self, student: Logits) -> Terms:
        zeros = student.labels == 0
        return Terms().add("nll", -student.logprobs()[zeros, 0]) if zeros.any() else Terms()


@CHUNKS
def test_a_chunk_without_gradient_adds_none(chunk_tokens):
    setting = make_setting()
    zeros = setting.batch.student.labels == 0
    assert 0 < zeros.sum() < len(zeros)
    expected = setting.naive(lambda: -setting.logits().log_softmax(-1)[zeros, 0].sum() / len(zeros))
    setting.run({"picky": (setting.make(Picky), 1.0)}, chunk_tokens).assert_close(expected)


class Afterwards(TestLoss):
    """Streams beside the student's tokens, and facts that only `finish` reads."""

    name = "afterwards"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"hidden.last"}), facts=frozenset({"teacher.label_logprob"}))

    def streams(self, step: Step) -> Mapping[str, Stream]:
        assert not step.facts
        return {"twice": Stream(2 * step.student["hidden.last"], "student", beside="student", learns_head=True)}

    @visit
    def gold(self, student: Logits, twice: Logits) -> Terms:
        return Terms().add("nll", ops.cross_entropy(twice.logprobs(), student.labels))

    def finish(self, step: Step) -> Terms:
        return Terms().watch("teacher", step.facts["teacher.label_logprob"], len(step.student))


@pytest.mark.parametrize("same_tokens", [True, False])
def test_streams_beside_a_models_tokens_do_not_wait_for_facts_that_only_finish_reads(same_tokens):
    setting = make_setting(same_tokens)

    def formula() -> Tensor:
        return nll(2 * setting.hidden @ setting.head.weight.T, setting.batch.student.labels).mean()

    found = setting.run({"after": (setting.make(Afterwards), 1.0)}, 3)
    found.assert_close(setting.naive(formula))
    assert found.report.watched.keys() == {"after/teacher"}


class Misplaced(OnWrong):
    name = "misplaced"

    @visit
    def both(self, student: Logits, shifted: Logits) -> Terms:
        raise AssertionError("it is never seen")


def test_a_visit_of_tokens_that_stand_nowhere_side_by_side_is_refused():
    setting = make_setting()
    message = r"^the visit 'x\.both' puts tokens of \['student', 'x/shifted'\] side by side"
    with pytest.raises(AssertionError, match=message):
        setting.run({"x": (setting.make(Misplaced), 1.0)})


# Two tokenizers.


@CHUNKS
@pytest.mark.parametrize("loss", [Truncated, TruncatedTokens])
def test_pairs_with_two_tokenizers(chunk_tokens, loss):
    setting = make_paired_setting()
    losses = {"sft": (setting.make(CrossEntropy), 0.5), "pairs": (setting.make(loss), 0.8)}
    expected = setting.naive(lambda: 0.5 * gold(setting) + 0.8 * on_pairs(setting))
    setting.run(losses, chunk_tokens).assert_close(expected)


@CHUNKS
@pytest.mark.parametrize("waits_first", [True, False])
@pytest.mark.parametrize("loss", [Truncated, TruncatedTokens])
def test_pairs_beside_a_loss_that_waits_for_facts(chunk_tokens, waits_first, loss):
    setting = make_half_wrong(make_paired_setting())
    waits = setting.make(OnWrong)
    losses = {"waits": (waits, 0.7), "pairs": (setting.make(loss), 0.8)}
    if not waits_first:
        losses = dict(reversed(losses.items()))
    wrong = wrong_tokens(setting)
    assert 0 < wrong.sum() < len(wrong)
    expected = setting.naive(lambda: 0.7 * on_wrong(waits, setting, wrong) + 0.8 * on_pairs(setting), losses)
    setting.run(losses, chunk_tokens).assert_close(expected)


@CHUNKS
@pytest.mark.parametrize("waits", [False, True])
def test_own_streams_beside_both_models_tokens(chunk_tokens, waits):
    """Where a loss waits for facts, the teacher's tokens are walked alone and again in pairs: gradients add up."""
    setting = make_half_wrong(make_paired_setting())
    crossed, waiting = setting.make(Crossed), setting.make(OnWrong)
    losses = {"crossed": (crossed, 1.0)} | ({"waits": (waiting, 0.5)} if waits else {})

    def formula() -> Tensor:
        waited = on_wrong(waiting, setting, wrong_tokens(setting)) if waits else 0
        return crossed.naive(setting) + 0.5 * waited

    setting.run(losses, chunk_tokens).assert_close(setting.naive(formula, losses))


# Values of tokens.


@CHUNKS
def test_tokens_that_are_added_up_equal_the_plain_sum(chunk_tokens):
    setting = make_setting(bias=True, soft_cap=4.0)
    plain = setting.run({"gold": (setting.make(Gold), 0.6)})
    setting.run({"gold": (setting.make(GoldTokens), 0.6)}, chunk_tokens).assert_close(plain)


@CHUNKS
def test_values_that_are_no_sum_over_tokens(chunk_tokens):
    setting = make_setting()

    def formula() -> Tensor:
        values = nll(setting.logits(), setting.batch.student.labels)
        return 0.6 * log_mean_exp(values, setting.batch.student).sum() / setting.batch.counts["sequences"]

    setting.run({"worst": (setting.make(Worst), 0.6)}, chunk_tokens).assert_close(setting.naive(formula))


@pytest.mark.parametrize("names", [("gold", "worst"), ("worst", "gold")])
def test_a_softmax_is_shared_by_sums_and_tokens_in_any_order(names):
    setting = make_setting()
    made = {"gold": (setting.make(Gold), 0.5), "worst": (setting.make(Worst), 0.5)}

    def formula() -> Tensor:
        values = nll(setting.logits(), setting.batch.student.labels)
        return 0.5 * values.mean() + 0.5 * log_mean_exp(values, setting.batch.student).mean()

    setting.run({name: made[name] for name in names}).assert_close(setting.naive(formula))


class Pieces(TestLoss):
    """Values of tokens of every kind: a part of the logits themselves, whole numbers, more than one per token."""

    name = "pieces"

    @visit(kind="tokens")
    def look(self, student: Logits, teacher: Logits) -> Mapping[str, Tensor]:
        return {
            "first": student.logits[:, 0],
            "top": student.logits.argmax(-1),
            "some": student.logprobs()[:, :3],
        }

    def finish(self, step: Step) -> Terms:
        weight = 1.0 + step.values["look.top"]
        return Terms().add("pieces", weight * step.values["look.first"] * step.values["look.some"].sum(-1))


@pytest.mark.parametrize("pieces_first", [True, False])
def test_values_of_tokens_may_be_part_of_the_logits(pieces_first):
    setting = make_setting()
    losses = {"pieces": (setting.make(Pieces), 0.5), "gold": (setting.make(Gold), 0.5)}
    if not pieces_first:
        losses = dict(reversed(losses.items()))

    def formula() -> Tensor:
        logits = setting.logits()
        weight = 1.0 + logits.argmax(-1)
        pieces = (weight * logits[:, 0] * logits.log_softmax(-1)[:, :3].sum(-1)).mean()
        return 0.5 * pieces + 0.5 * gold(setting)

    setting.run(losses, 3).assert_close(setting.naive(formula))


# No tokens.


def run_all(setting: Setting) -> tuple[Outcome, Losses]:
    torch.manual_seed(1)
    losses = {
        "sft": (setting.make(CrossEntropy), 0.5),
        "crossed": (setting.make(Crossed), 0.5),
        "waits": (setting.make(OnWrong), 0.5),
        "pairs": (setting.make(Truncated), 0.5),
        "pair_tokens": (setting.make(TruncatedTokens), 0.5),
        "gold_tokens": (setting.make(GoldTokens), 0.5),
    }
    return setting.run(losses), losses


@pytest.mark.parametrize("same_tokens", [True, False])
@pytest.mark.parametrize("tokens", [([0], [0]), ([0, 0], [0, 0])])
def test_no_tokens_give_a_zero_loss_and_zero_gradients(same_tokens, tokens):
    full, _ = run_all(make_setting(same_tokens))
    empty, losses = run_all(make_setting(same_tokens, tokens))
    assert empty.loss == 0
    assert empty.terms.keys() == full.terms.keys()
    assert empty.report.watched.keys() == full.report.watched.keys()
    trained = {f"{slot}.{name}" for slot, (loss, _) in losses.items() for name, _ in loss.named_parameters()}
    assert empty.gradients.keys() == full.gradients.keys() == {"hidden", "head.weight"} | trained
    assert all((gradient == 0).all() for gradient in empty.gradients.values())
    assert all((value == 0).all() for value in empty.terms.values())


@pytest.mark.parametrize("tokens", [([3, 2], [0, 0]), ([0, 0], [3, 2])])
def test_no_tokens_on_one_side(tokens):
    full, _ = run_all(make_setting(same_tokens=False))
    found, _ = run_all(make_setting(same_tokens=False, tokens=tokens))
    assert found.loss.isfinite()
    assert found.terms.keys() == full.terms.keys()
    assert found.gradients.keys() == full.gradients.keys()
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())


# Precision and numbers out of range.


def test_bfloat16_states_stay_near_float64():
    """Products are rounded to bfloat16 (8 bits), all that follows is float32: a few parts in a hundred."""
    exact = make_setting(bias=False)
    rounded = replace(
        exact,
        hidden=exact.hidden.detach().bfloat16().requires_grad_(),
        head=replace(exact.head, weight=torch.nn.Parameter(exact.head.weight.detach().bfloat16())),
        teacher_hidden=exact.teacher_hidden.bfloat16(),
        teacher_head=replace(
            exact.teacher_head,
            weight=torch.nn.Parameter(exact.teacher_head.weight.bfloat16(), requires_grad=False),
        ),
    )
    found, expected = (
        setting.run({"sft": (setting.make(CrossEntropy), 0.5), "kl": (setting.make(ForwardKL), 0.5)}, 3)
        for setting in (rounded, exact)
    )
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=0.02, atol=0)
    for name, gradient in found.gradients.items():
        assert gradient.dtype == torch.bfloat16
        distance = (gradient.double() - expected.gradients[name]).norm() / expected.gradients[name].norm()
        assert distance < 0.03, f"{name}: {distance:.3f}"


class Diverge(TestLoss):
    name = "diverge"
    divergence: Callable[[Tensor, Tensor], Tensor] = staticmethod(ops.forward_kl)

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        return Terms().add("d", type(self).divergence(teacher.logprobs(), student.logprobs()))


@pytest.mark.parametrize("divergence", ops.DIVERGENCES)
@pytest.mark.parametrize("heads", [["teacher_head"], ["head"], ["teacher_head", "head"]], ids=", ".join)
def test_a_token_that_a_model_excludes_leaves_loss_and_gradients_finite(divergence, heads):
    setting = make_setting()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = -torch.inf
    for name in heads:
        head = replace(getattr(setting, name), bias=torch.nn.Parameter(bias.clone(), name == "head"))
        setting = replace(setting, **{name: head})
    loss = type("Made", (Diverge,), {"divergence": staticmethod(ops.DIVERGENCES[divergence])})
    found = setting.run({"d": (setting.make(loss), 1.0)}, 3)
    assert found.loss.isfinite() and found.loss > 0
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())


# Memory.


@pytest.mark.parametrize("tokens", [20, 200])
def test_no_more_logits_than_a_chunk_are_ever_made(tokens, monkeypatch):
    setting = make_setting(tokens=([tokens], [tokens]))
    made: list[int] = []
    finish = Head.finish

    def watched(head: Head, product: Tensor, bias: Tensor | None) -> Tensor:
        made.append(len(product))
        return finish(head, product, bias)

    monkeypatch.setattr(Head, "finish", watched)
    setting.run({"pairs": (setting.make(Truncated), 1.0), "tokens": (setting.make(TruncatedTokens), 1.0)}, 5)
    assert max(made) <= 5
    assert len(made) >= tokens // 5


@pytest.mark.parametrize("tile", [None], indirect=True)
def test_the_peak_of_the_pass_does_not_grow_with_its_tokens():
    vocabulary = 500

    def peak(tokens: int) -> int:
        """The most bytes that the pass and its backward hold at once, beyond what was there before."""
        setting = make_setting(tokens=([tokens], [tokens]))
        setting = replace(
            setting,
            head=Head(torch.nn.Parameter(torch.randn(vocabulary, S).double())),
            teacher_head=Head(torch.nn.Parameter(torch.randn(vocabulary, D).double(), requires_grad=False)),
        )
        losses = {
            "sft": (setting.make(CrossEntropy), 0.5),
            "kl": (setting.make(ForwardKL), 0.5),
            "worst": (setting.make(Worst), 0.5),
        }
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            setting.run(losses, chunk_tokens=500)
        events = profile.profiler.kineto_results.events()
        return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))

    few, many = peak(50), peak(500)
    logits_of_the_others = 8 * 450 * vocabulary
    assert many - few < 0.1 * logits_of_the_others


def test_a_slot_may_have_the_name_of_a_method():
    setting = make_setting()
    plain, named = (setting.run({name: (setting.make(Gold), 1.0)}) for name in ("kd", "forward"))
    torch.testing.assert_close(named.loss, plain.loss)
    assert named.terms.keys() == {"forward/nll"}
