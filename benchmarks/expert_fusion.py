"""What it costs to hear all experts of a mixture-of-experts teacher's last block, over the teacher's forward pass.

    python benchmarks/expert_fusion.py [--response 0.45] [--repeats 9]

First counted, at Mixtral 8x7B's shape: multiply-adds of all experts of one block on the response tokens, over those of
a forward pass with the head on the same tokens. Then measured, on a small Mixtral of the same proportions, width 256:
the pass with `expert_attention` over the pass without, on the CPU, in float32. The two take turns, and what counts is
the time of the processor, not of the clock: other jobs disturb it less. Only ratios within one run mean anything.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdzoo.api.batch import Side
from kdzoo.step.capture import capture
from kdzoo_fusions import ExpertAttention
from kdzoo_model_adapters import Mixtral

ALLOWED = 0.12
"""The cost may be this many times the share of response tokens."""


@dataclass(frozen=True)
class Shape:
    """The sizes that multiply-adds depend on."""

    width: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    experts: int
    routed: int
    vocabulary: int

    @property
    def expert(self) -> int:
        """Multiply-adds of one expert on one row."""
        return 3 * self.width * self.intermediate

    def teacher(self, positions: int, response: float) -> float:
        """Multiply-adds of one position of a forward pass, its causal attention over `positions` and its head
        included."""
        head_width = self.width // self.heads
        projections = 2 * self.width * self.width + 2 * self.width * self.key_value_heads * head_width
        attention = 2 * self.width * (positions + 1) / 2
        block = projections + attention + self.width * self.experts + self.routed * self.expert
        return self.layers * block + response * self.width * self.vocabulary

    def fused(self, response: float) -> float:
        """Multiply-adds of all experts of one block and of attention between them, per position."""
        mixing = 2 * self.experts * self.experts * self.width + self.experts * self.width
        return response * (self.experts * self.expert + mixing)


MIXTRAL_8X7B = Shape(4096, 14_336, 32, 32, 8, 8, 2, 32_000)
SMALL = Shape(256, 896, 32, 8, 2, 8, 2, 2_000)


def model(shape: Shape, positions: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.routed,
        max_position_embeddings=positions,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def batch(shape: Shape, sequences: int, positions: int, response: float) -> Side:
    """Random tokens; the last positions of each sequence but one are scored."""
    ids = torch.randint(shape.vocabulary, (sequences, positions))
    scored = round(response * positions)
    at = (torch.arange(sequences)[:, None] * positions + torch.arange(positions - 1 - scored, positions - 1)).flatten()
    flat = ids.flatten()
    return Side(ids, torch.ones_like(ids), at, flat[at + 1], flat[at], at // positions, at * 0 - 1)


@torch.no_grad()
def measure(shape: Shape, side: Side, repeats: int) -> tuple[float, float, float]:
    """Median processor seconds of a pass with the head on the tokens, of one with fused experts too, and of their
    difference."""
    teacher, model_adapter = model(shape, side.input_ids.shape[1]), Mixtral()
    fusions = {"experts": ExpertAttention(ExpertAttention.Params())}
    head = model_adapter.head(teacher).weight

    def seconds(*sites: str) -> float:
        start = time.process_time()
        found = capture(teacher, model_adapter, side, sites, fusions)
        found["hidden.last"] @ head.T
        return time.process_time() - start

    seconds("hidden.last"), seconds("hidden.last", "fused.experts")  # the first ones map memory
    pairs = [(seconds("hidden.last"), seconds("hidden.last", "fused.experts")) for _ in range(repeats)]
    plain, fused = (statistics.median(column) for column in zip(*pairs, strict=True))
    return plain, fused, statistics.median(more - less for less, more in pairs)


@click.command()
@click.option("--response", default=0.45, show_default=True, help="Share of positions that are scored.")
@click.option("--positions", default=256, show_default=True)
@click.option("--sequences", default=4, show_default=True)
@click.option("--repeats", default=9, show_default=True)
def main(response: float, positions: int, sequences: int, repeats: int) -> None:
    """Print the counted ratio at Mixtral 8x7B's shape, and the counted and the measured one of a small Mixtral."""
    print(f"{response:.0%} of {positions} positions are scored: {ALLOWED * response:.4f} is allowed")
    counted = MIXTRAL_8X7B.fused(response) / MIXTRAL_8X7B.teacher(positions, response)
    print(f"counted, Mixtral 8x7B    {counted:.4f} of the forward pass, {counted / response:.4f} x the share of tokens")
    counted = SMALL.fused(response) / SMALL.teacher(positions, response)
    print(f"counted, width {SMALL.width:<4}      {counted:.4f} of the forward pass, {counted / response:.4f} x")
    plain, fused, more = measure(SMALL, batch(SMALL, sequences, positions, response), repeats)
    print(
        f"measured, width {SMALL.width:<4}     {more / plain:.4f} of the forward pass, {more / plain / response:.4f} x"
    )
    print(f"  {plain:.3f} s without, {fused:.3f} s with, {torch.get_num_threads()} threads, float32")


if __name__ == "__main__":
    main()
