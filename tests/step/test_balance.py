"""Weights that follow the gradients of losses at the student's last state."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch
from torch import Tensor

from kdzoo.step.balance import Balance, surgery


def products(gradients: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    pairs = combinations_with_replacement(gradients, 2)
    return {(a, b): float((gradients[a] * gradients[b]).sum()) for a, b in pairs}


def weighted(gradients: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    return {slot: weights[slot] * gradient for slot, gradient in gradients.items()}


def some_gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"sft": 3.0, "kd": 0.02, "far": 40.0}
    return {n: s * torch.randn(7, 5, generator=generator, dtype=torch.float64) for n, s in sizes.items()}


def test_it_begins_with_the_weights_of_the_recipe():
    assert Balance(["sft", "kd"], "gradient").weights({"sft": 0.3, "kd": 2.0}) == {"sft": 0.3, "kd": 2.0}


def test_gradients_come_in_proportion_to_the_weights_which_keep_their_sum():
    given, gradients = {"sft": 0.5, "kd": 1.5, "far": 1.0}, some_gradients()
    balance = Balance(list(given), "gradient")
    for _ in range(3):  # measured again with the weights in use, nothing moves
        balance.measured(given, products(weighted(gradients, balance.weights(given))))
        weights = balance.weights(given)
        norms = {slot: float(gradient.norm()) for slot, gradient in weighted(gradients, weights).items()}
        assert norms["kd"] / norms["sft"] == pytest.approx(3.0)
        assert norms["far"] / norms["sft"] == pytest.approx(2.0)
        assert sum(weights.values()) == pytest.approx(3.0)


def test_equal_weights_are_those_of_gradmag():
    """1 / |g_i| over the sum of all 1 / |g_j|, as bminixhofer/tokenkit @ bcacdef has it with its two losses."""
    gradients = some_gradients()
    given = dict.fromkeys(gradients, 1 / 3)
    balance = Balance(list(given), "gradient")
    balance.measured(given, products(weighted(gradients, given)))
    inverse = {slot: 1 / float(gradient.norm()) for slot, gradient in gradients.items()}
    expected = {slot: value / sum(inverse.values()) for slot, value in inverse.items()}
    assert balance.weights(given) == pytest.approx(expected)


def test_gradients_of_one_size_keep_the_weights():
    gradient = torch.ones(4)
    given = {"a": 0.2, "b": 0.8}
    balance = Balance(list(given), "gradient")
    balance.measured(given, products(weighted(dict.fromkeys(given, gradient), given)))
    assert balance.weights(given) == pytest.approx(given)


@pytest.mark.parametrize("how", ["gradient", "pcgrad"])
def test_a_loss_that_does_not_reach_the_last_state_keeps_its_weight(how):
    gradients = some_gradients() | {"hidden": torch.zeros(7, 5, dtype=torch.float64)}
    given = {"sft": 0.5, "hidden": 3.0, "kd": 1.5, "far": 1.0}
    balance = Balance(list(given), how)
    balance.measured(given, products(weighted(gradients, given)))
    assert balance.weights(given)["hidden"] == 3.0
    nothing = Balance(["hidden"], how)
    nothing.measured({"hidden": 3.0}, {("hidden", "hidden"): 0.0})
    assert nothing.weights({"hidden": 3.0}) == {"hidden": 3.0}


def project(gradients: list[Tensor]) -> Tensor:
    """The algorithm of the paper on the gradients themselves, in the order of the recipe."""
    total = torch.zeros_like(gradients[0])
    for i, mine in enumerate(gradients):
        kept = mine.clone()
        for j, other in enumerate(gradients):
            against = (kept * other).sum()
            if j != i and against < 0:
                kept = kept - against / (other * other).sum() * other
        total = total + kept
    return total


@pytest.mark.parametrize("seed", range(8))
def test_pcgrad_is_the_sum_of_projected_gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(4)]
    matrix = torch.stack(gradients)
    torch.testing.assert_close(surgery(matrix @ matrix.T) @ matrix, project(gradients))


def test_pcgrad_is_of_the_gradients_as_the_recipe_weighs_them_whenever_it_is_measured():
    given = {"a": 0.5, "b": 2.0}
    gradients = {"a": torch.tensor([1.0, 0.0]).double(), "b": torch.tensor([-1.0, 1.0]).double()}
    balance = Balance(list(given), "pcgrad")
    for _ in range(2):
        balance.measured(given, products(weighted(gradients, balance.weights(given))))
        found = sum(weighted(gradients, balance.weights(given)).values())
        torch.testing.assert_close(found, project(list(weighted(gradients, given).values())))


def test_without_conflict_pcgrad_changes_nothing():
    balance = Balance(["a", "b"], "pcgrad")
    balance.measured({"a": 1.0, "b": 1.0}, {("a", "a"): 1.0, ("a", "b"): 0.5, ("b", "b"): 4.0})
    assert balance.weights({"a": 1.0, "b": 1.0}) == {"a": 1.0, "b": 1.0}


def test_factors_are_in_checkpoints():
    balance, loaded = Balance(["a", "b"], "gradient"), Balance(["a", "b"], "gradient")
    balance.measured({"a": 1.0, "b": 1.0}, {("a", "a"): 1.0, ("a", "b"): 0.0, ("b", "b"): 9.0})
    loaded.load_state_dict(balance.state_dict())
    assert loaded.weights({"a": 1.0, "b": 1.0}) == balance.weights({"a": 1.0, "b": 1.0}) == {"a": 1.5, "b": 0.5}


def test_a_negative_weight_has_a_share_by_its_size():
    given, gradients = {"learn": 1.0, "unlearn": -1.0}, some_gradients()
    gradients = {"learn": gradients["sft"], "unlearn": gradients["far"]}
    balance = Balance(list(given), "gradient")
    for _ in range(2):
        balance.measured(given, products(weighted(gradients, balance.weights(given))))
        weights = balance.weights(given)
        norms = {slot: float(gradient.norm()) for slot, gradient in weighted(gradients, weights).items()}
        assert norms["learn"] == pytest.approx(norms["unlearn"])
        assert weights["unlearn"] < 0 < weights["learn"]
        assert weights["learn"] - weights["unlearn"] == pytest.approx(2.0)


@pytest.mark.parametrize("how", ["gradient", "pcgrad"])
def test_the_scale_of_all_gradients_does_not_matter(how):
    given, gradients = dict.fromkeys(("sft", "kd", "far"), 1.0), some_gradients()
    found = []
    for scale in (1.0, 1e-25):  # whose square is none in float32
        balance = Balance(list(given), how)
        balance.measured(given, products(weighted(gradients, dict.fromkeys(given, scale))))
        found.append(balance.weights(given))
    assert found[0] == pytest.approx(found[1])
