"""Every loss of kdzoo, with every parameter that changes what it does, keeps what a loss promises."""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdzoo import Loss, NoParams, TokenWeights
from kdzoo.testing import check_loss
from kdzoo.testing.promises.ranks import two_ranks
from kdzoo.testing.promises.rearrange import rearranged
from kdzoo.testing.promises.token_weights import Carrier
from kdzoo.testing.promises.world import Outcome, Subject, World, registry

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "abkd": [
        {"temperature": 2.0},
        {"alpha": 0.5, "beta": 0.0},
        {"alpha": 0.0, "beta": 0.5},
        {"alpha": 0.0, "beta": 0.0},
        {"alpha": 0.5, "beta": -0.5},
        {"alpha": -0.5, "beta": 1.2, "constants": "authors"},
    ],
    "adaptive_kl": [{"head_mass": 0.3, "crossing": "tail"}],
    "alm": [
        {"difference": "reverse_binary_kl"},
        {"difference": "binary_kl_temp_limit"},
        {"difference": "abs"},
        {"difference": "abs_exp", "temperature": 5.0},
        {"difference": "renyi", "order": 0.5},
        {"difference": "joschu_k2"},
        {"difference": "joschu_k3"},
        {"append_boundary": False, "merge_below": 0.0},
        {"boundary": "end", "last_state": True},
        {"numerator": "log1p_token_count", "denominator": "token_count"},
        {"merge_below": 0.5},
        {"denominator": "merged_chunk_count", "merge_below": 0.5},
    ],
    "amid": [
        {"side": "student", "alpha": -1.0, "teacher_weight": 0.9},
        {"alpha": 1.0, "divergence": "reverse_kl", "temperature": 2.0},
        {"alpha": 3.0, "preset": "amid@a963105"},
        {"alpha": 0.999, "teacher_weight": 0.1},
    ],
    "attention_relations": [
        {"relations": {"attention": 2.0, "value": 0.5}, "pairs": "uniform"},
        {"rows": "all", "causal": False, "heads": 8},
        {"rows": "all", "relations": {"attention": 1.0}},
        {"distance": "mse", "relations": {"attention": 1.0}},
        {"distance": "mse_of_softmax", "pairs": [[0, 1], [1, 0]]},
    ],
    "cross_entropy": [
        {"where": "teacher_right"},
        {"where": "teacher_wrong"},
    ],
    "csd": [
        {"first_weight": "uniform", "temperature": 1.5},
        {"first_weight": "teacher", "second_weight": "mixture", "teacher_share": 0.3},
    ],
    "dskd": [
        {"alignment": "attention"},
        {"alignment": "attention", "std": "batch"},
        {"divergence": "adaptive_kl", "head_mass": 0.3},
        {"divergence": "skew_reverse_kl", "skew": 0.3, "temperature": 1.0},
        {"teacher_temperature": 2.0},
    ],
    "dskd_v2": [
        {"mask": False},
        {"mean": "batch", "threshold": 0.5},
        {"start": "random", "student_to_teacher": "trained"},
        {"spaces": "student"},
        {"spaces": "teacher", "divergence": "reverse_kl"},
        {"top_vocabulary": 20},
    ],
    "f_divergence": [
        {"generator": "jeffreys", "temperature": 2.0},
        {"generator": "le_cam"},
        {"generator": "neyman", "max_ratio": 2.0},
        {"generator": "pearson", "max_ratio": 2.0},
        {"generator": "renyi", "order": 0.3},
    ],
    "forward_kl": [
        {"temperature": 2.0, "square_temperature": True},
        {"teacher_temperature": 2.0},
        {"subtract_entropy": False},
        {"top_k": 5},
        {"top_k": 5, "rest": "dropped"},
    ],
    "hidden": [
        {"pairs": [[0, 1], [-1, "last"]], "distance": "cosine"},
        {"pairs": "uniform", "distance": "relative_mse", "start": "least_squares"},
        {"pairs": "uniform", "every": 2, "distance": "relative_mse"},
        {"distance": "cka"},
        {"projector": "always", "distance": "cka"},
    ],
    "js": [{"teacher_weight": 0.0}, {"teacher_weight": 1.0}, {"teacher_weight": 0.1}],
    "min_ed": [
        {"several": "first", "agree": "input", "temperature": 1.0},
        {"entries": "nearest_in_teacher", "agree": "pair"},
        {"entries": "same_text", "gold": False},
    ],
    "multilevel_ot": [
        {"matching": "rank"},
        {"matching": "rank_batch", "k": 10},
        {"matching": "sort", "normalise": True},
        {"swap": True, "second_softmax": True},
        {"reduction": "padded"},
        {"reduction": "padded_last"},
        {"beta": 0.0, "gamma": 0.0},
        {"skip_student_eos": False, "skip_teacher_eos": False, "sd_temperature": 1.0},
    ],
    "projectors": [
        {"width": 8, "rows": "response"},
        {"target": "teacher", "reconstruction_weight": 0.5},
        {"init": "pca", "width": 8},
    ],
    "ranking": [{"k": 3}, {"asks": "both"}],
    "residual": [
        {"beta": "row", "beta_gradient": True},
        {"beta": "batch"},
        {"beta": "none", "head_gradient": False},
        {"beta": 0.5, "state_gradient": False},
        {"indicator": "soft", "temperature": 2.0},
        {"indicator": "all"},
        {"indicator": "random"},
        {"top_k": 3},
        {"projector": "trained"},
        {"pretrained": False, "projector": "trained", "width": 8},
        {"direction": "random"},
        {"normalise": "l2", "wrong": "attention"},
        {"attend": "sequence", "wrong": "projected"},
        {"wrong": "entropy"},
    ],
    "reverse_kl": [{"temperature": 2.0}],
    "simple_ctkd": [
        {"divergence": "adaptive_kl", "head_mass": 0.3, "temperature": 2.0},
        {"divergence": "skew_reverse_kl", "skew": 0.3, "rest": "one_entry"},
        {"mean": "tokens"},
    ],
    "seq_kd": [{"reduction": "sequences"}],
    "skew_forward_kl": [{"skew": 0.0}, {"skew": 0.5}],
    "skew_reverse_kl": [{"skew": 0.0}],
    "taid": [
        {"temperature": 2.0},
        {"subtract_entropy": False, "t_start": 0.2},
        {"adaptive": False, "t_start": 0.7},
    ],
    "todi": [{"temperature": 2.0, "beta": 0.3}, {"teacher_temperature": 2.0}],
    "top1_ce": [{"temperature": 2.0}],
    "total_variation": [
        {"temperature": 2.0},
    ],
    "uld": [
        {"student_temperature": 2.0, "teacher_temperature": 0.5},
        {"skip_student_eos": False, "skip_teacher_eos": False},
        {"mean": "rows"},
        {"align": "text"},
        {"align": "text", "base": "first"},
        {"align": "text", "hybrid": True},
        {"hybrid": True, "beta": 0.0, "matched_weight": 0.5, "unmatched_weight": 0.1},
        {"window": "late"},
    ],
}
"""By loss: parameters beside its defaults, which are always tried."""

TOKEN_WEIGHTS: dict[str, list[dict[str, Any]]] = {
    "adaptive": [
        {"by": "js", "change": 0.0},
        {"least": 0.5, "temperature": 2.0, "temperature_scale": 0.0},
        {"decay": 0.0, "tolerance": 0.01, "warmup": 0.0, "direction": "direct"},
    ],
    "column": [{"column": "sure"}, {"divide_by": "tokens"}],
    "entropy": [
        {"of": "teacher", "power": 2.0},
        {"of": "gap"},
        {"of": "teacher", "above": 3.0, "divide_by": "tokens"},
    ],
    "top_share": [
        {"by": "teacher_entropy", "share": 0.5},
        {"by": "cross_entropy", "among": "step"},
        {"by": "teacher_cross_entropy", "among": "step", "share": 0.6},
        {"by": "forward_kl", "among": "step"},
        {"by": "total_variation", "divide_by": "tokens"},
    ],
    "verdict": [
        {"keep": "wrong"},
        {"indicator": "soft", "temperature": 2.0},
        {"indicator": "soft", "keep": "wrong", "divide_by": "tokens"},
        {"top_k": 3, "keep": "wrong"},
    ],
}
"""The same by token weights."""

# What every loss is tried in costs minutes; what no other loss does in the same way, seconds.

KINDS = {
    "the student alone": "cross_entropy",
    "both models side by side": "forward_kl",
    "values of tokens, recomputed": "alm",
    "streams beside the models": "dskd",
    "heads, and four streams side by side": "dskd_v2",
    "scans": "multilevel_ot",
    "packings and facts": "residual",
    "packings in groups": "uld",
    "sites of both models": "hidden",
    "every position of blocks": "attention_relations",
    "the teacher alone": "projectors",
}
"""A loss for each kind of visit and stream."""


def subject(name: str, params: dict[str, Any] | None = None) -> Subject:
    return Subject.of(registry().of(Loss)[name], params)


def worlds(names) -> list[tuple[str, bool]]:
    """Each loss with one tokenizer, and with two where it takes two."""
    return [(name, same) for name in names for same in (True, False) if same or subject(name).fits_two_tokenizers]


def path(name: str, params: dict[str, Any]) -> str:
    """What the core does for a loss with these parameters: the streams it makes, shows and captures."""
    chosen = subject(name, params)
    visits = [(visit.kind, visit.streams) for visit in chosen.loss.visits(chosen.params)]
    return repr((visits, [chosen.needs(same) for same in (True, False)]))


def new_paths() -> list[tuple[str, dict[str, Any]]]:
    """Of each loss, the settings that take another path than its defaults and the settings before them."""
    found = []
    for name, many in SETTINGS.items():
        taken = {path(name, {})}
        found += [
            (name, params) for params in many if not (path(name, params) in taken or taken.add(path(name, params)))
        ]
    return found


def describe(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={chosen}" for key, chosen in value.items())
    return {True: "one tokenizer", False: "two tokenizers"}.get(value, str(value))


def test_every_loss_is_tried():
    assert SETTINGS.keys() == registry().of(Loss).keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_with_its_defaults_it_keeps_every_promise(name):
    check_loss(registry().of(Loss)[name], ranks=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params"), new_paths(), ids=describe)
def test_on_another_path_through_the_core_it_keeps_every_promise(name, params):
    check_loss(registry().of(Loss)[name], params, ranks=False)


OTHERS = [(n, p) for n, many in SETTINGS.items() for p in many if (n, p) not in new_paths()]


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "params"), OTHERS, ids=describe)
def test_with_other_parameters_it_keeps_every_promise(name, params):
    check_loss(registry().of(Loss)[name], params, ranks=False)


@pytest.mark.slow
def test_two_ranks_of_zero_are_one_process_for_every_kind_of_loss():
    assert ranks_fault(worlds(KINDS.values())) == {}


@pytest.mark.sweep
def test_two_ranks_of_zero_are_one_process_for_every_loss():
    assert ranks_fault(worlds(SETTINGS)) == {}


def ranks_fault(tried: list[tuple[str, bool]]) -> dict[tuple[str, bool], str]:
    faults = two_ranks([(subject(name), same) for name, same in tried])
    return {key: fault for key, fault in zip(tried, faults, strict=True) if fault}


# Token weights


def weighed(name: str, params: dict[str, Any] | None = None) -> Subject:
    """Token weights beside the loss that the kit tries them with."""
    weights = registry().of(TokenWeights)[name]
    return Subject(Carrier, NoParams(), {}, weights, weights.Params.model_validate(params or {}))


EVERY_WEIGHTS = [(name, params) for name, many in TOKEN_WEIGHTS.items() for params in ({}, *many)]


def test_all_token_weights_are_tried():
    assert TOKEN_WEIGHTS.keys() == registry().of(TokenWeights).keys()


@pytest.mark.parametrize(("name", "params"), EVERY_WEIGHTS, ids=describe)
def test_token_weights_keep_every_promise(name, params):
    check_loss(registry().of(TokenWeights)[name], params, ranks=False)


@pytest.mark.slow
def test_two_ranks_of_zero_weigh_tokens_as_one_process_does():
    assert weights_fault([(name, {}) for name in TOKEN_WEIGHTS]) == []


@pytest.mark.sweep
def test_two_ranks_of_zero_weigh_tokens_as_one_process_does_with_any_parameters():
    assert weights_fault([(name, params) for name, many in TOKEN_WEIGHTS.items() for params in many]) == []


def weights_fault(tried: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """With one tokenizer, and with two where that fits."""
    each = [(weighed(name, params), same) for name, params in tried for same in (True, False)]
    each = [(one, same) for one, same in each if same or one.fits_two_tokenizers]
    assert {same for _, same in each} == {True, False}
    faults = two_ranks(each)
    return [
        f"{one.checked.name} {one.weights_params}: {fault}"
        for (one, _), fault in zip(each, faults, strict=True)
        if fault
    ]


# Random batches, where the kit has one: what a loss says of a sequence depends on that sequence alone.

LENGTHS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "same_tokens"), worlds(KINDS.values()), ids=describe)
@settings(max_examples=6, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99), padding=st.integers(0, 3), data=st.data())
def test_padding_order_and_splits_change_nothing(name, same_tokens, lengths, seed, padding, data):
    world = World(subject(name), same_tokens)
    batch = world.batch(lengths, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(1, len(lengths) - 1))
    whole = world.run([world.term()], batch)
    parts = [world.run([world.term()], rearranged(batch, part, padding)) for part in (order[:cut], order[cut:])]
    assert whole.difference(parts[0].plus(parts[1])) == ""


@pytest.mark.parametrize("name", KINDS.values())
def test_no_gradient_reaches_prompts_or_padding(name):
    world = World(subject(name), same_tokens=True)
    term, batch = world.term(), world.batch()
    gradient = world.recorded(term, batch).run(term).gradients.get("student hidden.last@all")
    if gradient is not None:
        assert batch.student is not None and gradient[batch.student.positions].any()
        gradient[batch.student.positions] = 0
        assert not gradient.any()


# Composition: what two losses say together is what they say apart, added.


def pairs(names) -> list[tuple[str, str, bool]]:
    """Any two, and each with itself; but for the one that trains on a teacher alone."""
    there = [world for world in worlds(names) if world[0] != "projectors"]
    return [(a, b, same) for (a, same), (b, too) in combinations_with_replacement(there, 2) if same == too]


KIND_PAIRS = pairs(KINDS.values())


@cache
def alone(name: str, same_tokens: bool, slot: str) -> Outcome:
    world = World(subject(name), same_tokens)
    return world.run([world.term(name=slot)], world.batch())


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "same_tokens"), KIND_PAIRS, ids=describe)
def test_losses_of_any_two_kinds_compose(first, second, same_tokens):
    assert_composes(first, second, same_tokens)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("first", "second", "same_tokens"), [pair for pair in pairs(SETTINGS) if pair not in KIND_PAIRS], ids=describe
)
def test_any_two_losses_compose(first, second, same_tokens):
    assert_composes(first, second, same_tokens)


def assert_composes(first: str, second: str, same_tokens: bool) -> None:
    made = [World(subject(name), same_tokens) for name in (first, second)]
    terms = [world.term(name=slot) for world, slot in zip(made, ("one", "other"), strict=True)]
    together = made[0].run(terms, made[0].batch())
    apart = alone(first, same_tokens, "one"), alone(second, same_tokens, "other")
    assert together.terms.keys() == apart[0].terms.keys() | apart[1].terms.keys()
    assert together.difference(apart[0].plus(apart[1])) == ""
    assert any(gradient is not None and gradient.any() for gradient in together.gradients.values())
    assert torch.isfinite(together.loss)
