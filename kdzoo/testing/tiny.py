"""Tiny models and batches for tests: real families, real forward passes, no data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kdzoo.api.batch import Batch, Side
from kdzoo.quiet import quiet

LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": LLAMA,
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None},
    "qwen2_moe": LLAMA
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3_moe": LLAMA
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": 12,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""Sizes by family; those with experts have four, two of them routed to, in every block."""


def tiny_model(family: str, vocabulary: int, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model of a `family` of `CONFIGS` with random weights large enough to have opinions.

    `settings` go before the family's own.
    """
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0} | CONFIGS[family] | settings
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    return model


def save_tiny_model(folder: Path, family: str, vocabulary: int, seed: int = 0, **settings: Any) -> Path:
    """The same as a folder."""
    with quiet():
        tiny_model(family, vocabulary, seed, **settings).save_pretrained(folder)
    return folder


def tiny_batch(
    lengths: Sequence[tuple[int, int, int]],
    student_vocabulary: int,
    teacher_vocabulary: int,
    same_tokens: bool,
    seed: int = 0,
) -> Batch:
    """A batch of random tokens; a sequence is (prompt, student response, teacher response) in tokens.

    With one tokenizer the teacher's response is the student's. With two, the responses are cut into as many spans as
    the shorter one has tokens, and tokens that are alone in a span on both sides are pairs. No sequence at all gives
    the stand-in of a rank without rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def side(responses: Sequence[int], vocabulary: int, spans: Sequence[Sequence[int]]) -> Side:
        width = max([2, *(prompt + n for (prompt, _, _), n in zip(lengths, responses, strict=True))])
        ids = torch.randint(1, vocabulary, (max(1, len(lengths)), width), generator=generator)
        mask = torch.zeros_like(ids)
        if not lengths:
            mask[:] = 1
        rows: list[int] = []
        for b, ((prompt, _, _), n) in enumerate(zip(lengths, responses, strict=True)):
            mask[b, : prompt + n] = 1
            ids[b, prompt + n :] = 0
            rows += range(b * width + prompt - 1, b * width + prompt + n - 1)
        position = torch.tensor(rows, dtype=torch.long)
        flat = ids.flatten()
        span = torch.tensor([s for part in spans for s in part], dtype=torch.long)
        return Side(ids, mask, position, flat[position + 1], flat[position], position // width, span)

    student_n = [s for _, s, _ in lengths]
    teacher_n = student_n if same_tokens else [t for _, _, t in lengths]
    cuts = [min(s, t) for s, t in zip(student_n, teacher_n, strict=True)]
    first = [sum(cuts[:b]) for b in range(len(cuts))]
    student_spans = [[f + min(i, c - 1) for i in range(n)] for f, c, n in zip(first, cuts, student_n, strict=True)]
    teacher_spans = [[f + min(i, c - 1) for i in range(n)] for f, c, n in zip(first, cuts, teacher_n, strict=True)]
    student = side(student_n, student_vocabulary, student_spans)
    teacher = student if same_tokens else side(teacher_n, teacher_vocabulary, teacher_spans)
    batch = Batch(student, teacher, _pairs(student.span, teacher.span), same_tokens, {})
    return Batch(batch.student, batch.teacher, batch.pairs, same_tokens, batch.local_counts())


def _pairs(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    if not len(student):
        return torch.zeros(0, 2, dtype=torch.long)
    together = student[:, None] == teacher[None, :]
    alone = together & (together.sum(1, keepdim=True) == 1) & (together.sum(0, keepdim=True) == 1)
    return alone.nonzero()
