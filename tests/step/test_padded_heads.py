"""Heads that are padded beyond the tokenizer: what is compared is what the tokenizer has."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from settings import Crossed, Setting, make_setting
from torch import nn

from kdzoo import Head, ModelInfo, ModelPair
from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.plugin.registry import load_plugins
from kdzoo.run.context import RunContext, shared_entries
from kdzoo.step.capture import capture
from kdzoo.step.distiller import Aim, Distiller
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Report
from kdzoo.testing.tiny import tiny_batch, tiny_model
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL

MORE, EVEN_MORE = 4, 7


def padded(setting: Setting) -> Setting:
    """The same with more rows in both heads, of large weights."""

    def more(head: Head, rows: int) -> Head:
        weight = torch.cat([head.weight.detach(), 9 * torch.randn(rows, head.weight.shape[1], dtype=torch.float64)])
        bias = None
        if head.bias is not None:
            bias = nn.Parameter(torch.cat([head.bias.detach(), torch.ones(rows, dtype=torch.float64)]))
        learns = head.weight.requires_grad
        return replace(head, weight=nn.Parameter(weight, learns), bias=bias, entries=len(head.weight))

    hidden = setting.hidden.detach().clone().requires_grad_()
    heads = more(setting.head, MORE), more(setting.teacher_head, EVEN_MORE)
    return replace(setting, hidden=hidden, head=heads[0], teacher_head=heads[1])


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_padding_neither_counts_nor_learns(bias, chunk_tokens):
    setting = make_setting(bias=bias)
    losses = {
        "sft": (setting.make(CrossEntropy), 0.5),
        "kd": (setting.make(ForwardKL), 0.5),
        "own": (setting.make(Crossed), 0.5),
    }
    found, expected = padded(setting).run(losses, chunk_tokens), setting.run(losses)
    torch.testing.assert_close(found.loss, expected.loss)
    assert expected.gradients.keys() == found.gradients.keys()
    for name, gradient in expected.gradients.items():
        ours = found.gradients[name]
        if name.startswith("head."):
            assert len(ours) == len(gradient) + MORE and not ours[len(gradient) :].any()
            ours = ours[: len(gradient)]
        torch.testing.assert_close(ours, gradient, msg=name)


def test_models_with_heads_of_two_widths_meet_on_what_both_have():
    registry = load_plugins()
    student, teacher = tiny_model("gpt2", 64, seed=1).double().eval(), tiny_model("llama", 70, seed=2).double().eval()
    batch = tiny_batch([(3, 4, 4), (2, 2, 2)], 60, 60, same_tokens=True)
    pair = ModelPair(ModelInfo(32, 60, 2, "gpt2"), ModelInfo(48, 60, 2, "llama"), same_tokens=True)
    terms = [LossTerm.of("kd", ForwardKL(ForwardKL.Params(), pair, {}))]
    of_teacher, of_student = registry.model_adapters["llama"], registry.model_adapters["gpt2"]
    with torch.no_grad():
        sites = capture(teacher, of_teacher, batch.teacher, {"hidden.last"})
        states = capture(student, of_student, batch.student, {"hidden.last"})["hidden.last"]
        log_q = (states @ student.lm_head.weight[:60].T).log_softmax(-1)
        log_p = (sites["hidden.last"] @ teacher.lm_head.weight[:60].T).log_softmax(-1)
    ours, theirs = (
        replace(adapter.head(model), entries=60) for adapter, model in ((of_student, student), (of_teacher, teacher))
    )
    found = Distiller(student, of_student, ours, terms)(
        batch=batch, teacher=sites, teacher_head=theirs, aim=Aim({"kd": 1.0}, Report())
    )
    torch.testing.assert_close(found.detach(), (log_p.exp() * (log_p - log_q)).sum(-1).mean())
    found.backward()
    assert student.lm_head.weight.grad[:60].any() and not student.lm_head.weight.grad[60:].any()


@pytest.mark.parametrize(
    ("same", "student", "teacher", "entries"),
    [(True, 60, 60, None), (True, 64, 60, 50), (True, 48, 60, 48), (False, 64, 60, None)],
)
def test_the_tokenizers_entries_count_where_heads_differ(same, student, teacher, entries):
    role = SimpleNamespace(encoder=SimpleNamespace(tokenizer=range(50)))
    context = cast(Any, SimpleNamespace(same_tokens=same, teacher=role))
    assert shared_entries(cast(RunContext, context), student, teacher) == entries


def test_the_real_case_is_qwens_tokenizer_and_its_heads(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen1.5-1.8b")
    context = SimpleNamespace(same_tokens=True, teacher=SimpleNamespace(encoder=SimpleNamespace(tokenizer=tokenizer)))
    assert shared_entries(cast(RunContext, context), 151_936, 152_064) == 151_646
