from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recordings import D, S, V, W, assert_same, make_models, make_weights
from torch import Tensor

from kdzoo import KdzooError, ModelInfo, ModelPair, RecipeError
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_hidden import Hidden

LAYERS = 2, 4


class Models:
    """Random states of some blocks, beside what `make_models` makes; a teacher as wide as the student, if `wide`."""

    def __init__(self, same: bool, wide: bool = False, **settings: Any) -> None:
        self.same = same
        self.student, self.teacher = make_models(same, **settings)
        shapes = self.student.labels.shape, self.teacher.labels.shape
        width = S if wide else D
        if wide:
            self.teacher.hidden, self.teacher.head = self.teacher.hidden[..., :S], self.teacher.head[:, :S]
        self.ours = {f"hidden.{k}": torch.randn(*shapes[0], S).double().requires_grad_() for k in range(2)}
        self.theirs = {f"hidden.{k}": torch.randn(*shapes[1], width).double() for k in range(4)}

    def run(self, weights: dict[str, Tensor] | None = None, **params: Any) -> Replay:
        def recorded(model: Any, sites: dict[str, Tensor], layers: int) -> Recorded:
            return Recorded(
                model.labels,
                hidden=model.hidden.detach(),
                head=model.head.detach(),
                chunks=model.chunks,
                sites={site: value.detach() for site, value in sites.items()},
                layers=layers,
            )

        return replay(
            {"kd": (Hidden, params, 1.0)},
            recorded(self.student, self.ours, LAYERS[0]),
            recorded(self.teacher, self.theirs, LAYERS[1]),
            weights={name: value.detach() for name, value in (weights or {}).items()},
            same_tokens=self.same,
        )

    def leaves(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {f"student_{site}": value for site, value in self.ours.items()} | (weights or {})

    def states(self, student: str, teacher: str) -> list[list[tuple[Tensor, Tensor]]]:
        """By sequence: the states [S], [D] that belong together, as means over spans with two tokenizers."""
        found = []
        for b in range(len(self.student)):
            mine, its = self.student.rows(b), self.teacher.rows(b)
            h, t = self.ours[student][b], self.theirs[teacher][b]
            if self.same:
                found.append(list(zip(h[mine], t[its], strict=True)))
                continue
            spans = [(self.student.chunks[b, :, c], self.teacher.chunks[b, :, c]) for c in range(3)]
            found.append([(h[a].mean(0), t[c].mean(0)) for a, c in spans if a.any() and c.any()])
        return found


def weights_of(pairs: int) -> dict[str, Tensor]:
    shapes = {f"kd.projectors.{n}.weight": (D, S) for n in range(pairs)}
    return make_weights(shapes | {f"kd.projectors.{n}.bias": (D,) for n in range(pairs)})


def mse(x: Tensor, y: Tensor) -> Tensor:
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(y)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - x @ y / (x.norm() * y.norm())


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("distance", ["mse", "cosine", "relative_mse"])
def test_it_is_the_formula_in_value_and_gradient(same, distance):
    models, weights = Models(same), weights_of(2)
    found = models.run(weights, distance=distance, pairs=[[0, 1], [-1, -1]])
    parts = []
    for n, (mine, its) in enumerate((("hidden.0", "hidden.1"), ("hidden.1", "hidden.3"))):
        w, b = weights[f"kd.projectors.{n}.weight"], weights[f"kd.projectors.{n}.bias"]
        both = [(w @ h + b, t) for states in models.states(mine, its) for h, t in states]
        measure = cosine if distance == "cosine" else mse
        loss = torch.stack([measure(x, y) for x, y in both]).mean()
        if distance == "relative_mse":
            of_tokens = [models.theirs[its][b, models.teacher.rows(b)] for b in range(len(models.teacher))]
            loss = loss / torch.cat(of_tokens).pow(2).mean()
        parts.append(loss)
    for name, part in zip(("0_to_1", "1_to_3"), parts, strict=True):
        torch.testing.assert_close(found.terms[f"kd/{name}"], part.detach())
    assert_same(found, sum(parts), models.leaves(weights))


def cka(states: list[tuple[Tensor, Tensor]]) -> Tensor:
    """By the kernels of Kornblith et al.: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    x, y = (torch.stack(side) for side in zip(*states, strict=True))
    n = len(x)
    centre = torch.eye(n).double() - 1 / n
    k, kernel = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return (k @ kernel).trace() / ((k @ k).trace() * (kernel @ kernel).trace()).sqrt()


@pytest.mark.parametrize("rows", [[4, 1, 5], [9, 1, 12]], ids=["short", "long"])  # which product is the smaller one
@pytest.mark.parametrize("same", [True, False])
def test_cka_is_of_each_sequence_and_needs_no_projector(same, rows):
    models = Models(same, rows=(rows, rows))
    found = models.run(distance="cka", pairs=[[0, 2]])
    each = [1 - cka(states) for states in models.states("hidden.0", "hidden.2") if len(states) > 1]
    assert len(each) == 2  # the sequence of one token has none, and counts as 0
    assert_same(found, sum(each) / 3, models.leaves())


@pytest.mark.parametrize("tokens", [4, 30])
def test_cka_is_0_where_one_is_the_other_turned_scaled_and_moved(tokens):
    models = Models(True, wide=True, rows=([tokens, tokens], [tokens, tokens]))
    turned, _ = torch.linalg.qr(torch.randn(S, S).double())
    models.theirs["hidden.3"] = 3 * models.ours["hidden.0"].detach() @ turned + torch.randn(S).double()
    found = models.run(distance="cka", pairs=[[0, -1]])
    assert found.loss.abs() < 1e-12
    assert found.gradients["student_hidden.0"].abs().max() < 1e-12


def test_equal_states_of_equal_widths_are_at_distance_0_without_a_projector():
    models = Models(True, wide=True)
    models.theirs["hidden.3"] = models.ours["hidden.0"].detach()
    for distance in ("mse", "relative_mse", "cosine"):
        found = models.run(distance=distance, pairs=[[0, -1]])
        assert found.loss.abs() < 1e-12
        assert not any(name.startswith("kd.") for name in found.gradients)
        assert found.gradients["student_hidden.0"].abs().max() < 1e-12


def test_a_projector_can_be_had_where_widths_are_equal():
    models, weights = Models(True, wide=True), make_weights({"kd.projectors.0.weight": (S, S)})
    weights["kd.projectors.0.bias"] = torch.randn(S).double().requires_grad_()
    found = models.run(weights, projector="always", pairs=[[0, 0]])
    w, b = weights.values()
    loss = torch.stack([mse(w @ h + b, t) for s in models.states("hidden.0", "hidden.0") for h, t in s]).mean()
    assert_same(found, loss, models.leaves(weights))


@pytest.mark.parametrize("same", [True, False])
def test_a_least_squares_start_is_the_best_projector_on_training_rows(same):
    models = Models(same, rows=([9, 1, 8], [9, 1, 8]))
    found = models.run(weights_of(1), start="least_squares", pairs=[[1, 2]])
    both = [pair for states in models.states("hidden.1", "hidden.2") for pair in states]
    x, y = (torch.stack(side).detach().numpy() for side in zip(*both, strict=True))
    best, *_ = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)
    torch.testing.assert_close(found.start["kd.projectors.0.weight"], torch.as_tensor(best[:-1].T))
    torch.testing.assert_close(found.start["kd.projectors.0.bias"], torch.as_tensor(best[-1]))


def test_statistics_are_taken_only_where_something_starts_from_them():
    sizes = ModelInfo(S, V, 2, "test"), ModelInfo(D, W, 4, "test")

    def seen(**params: Any) -> frozenset[str]:
        return Hidden(Hidden.Params(**params), ModelPair(*sizes, True), {}).statistics_of

    assert seen() == seen(distance="cka", start="least_squares") == frozenset()
    assert seen(distance="relative_mse") == {"teacher"}
    assert seen(start="least_squares") == {"student", "teacher"}


def pair_of(student: int, teacher: int, widths: tuple[int, int] = (S, D)) -> ModelPair:
    return ModelPair(ModelInfo(widths[0], V, student, "test"), ModelInfo(widths[1], V, teacher, "test"), True)


@pytest.mark.parametrize(
    ("layers", "every", "blocks"),
    [
        ((4, 12), 1, [(0, 2), (1, 5), (2, 8), (3, 11)]),  # TinyBERT's four layers of BERT's twelve
        ((6, 12), 2, [(1, 3), (3, 7), (5, 11)]),
        ((5, 5), 2, [(0, 0), (2, 2), (4, 4)]),
        ((2, 3), 1, [(0, 0), (1, 2)]),
        ((4, 2), 1, [(0, 0), (1, 0), (2, 0), (3, 1)]),
    ],
)
def test_uniform_pairs_end_at_the_last_blocks(layers, every, blocks):
    params = Hidden.Params(pairs="uniform", every=every)
    assert params.blocks(pair_of(*layers)) == blocks
    needs = Hidden.needs_of(params, pair_of(*layers))
    assert needs.student == {f"hidden.{mine}" for mine, _ in blocks}
    assert needs.teacher == {f"hidden.{its}" for _, its in blocks}


def test_the_last_state_is_the_one_that_the_head_reads():
    assert Hidden.Params().blocks(pair_of(2, 4)) == [("last", "last")]
    models, weights = Models(True), weights_of(1)
    found = models.run(weights)
    w, b = weights.values()
    rows = models.student.labels != -100
    last = zip(models.student.hidden[rows], models.teacher.hidden[rows], strict=True)
    loss = torch.stack([mse(w @ h + b, t) for h, t in last]).mean()
    assert_same(found, loss, models.leaves(weights) | {"student_hidden": models.student.hidden})


@pytest.mark.parametrize(
    ("params", "layers", "widths", "said"),
    [
        (
            {"pairs": [[7, 0]]},
            (4, 6),
            (S, D),
            "pairs: the student has 4 blocks, counted from 0 or from the end, not 7; name one from 0 to 3",
        ),
        (
            {"pairs": [[0, -7]]},
            (4, 6),
            (S, D),
            "pairs: the teacher has 6 blocks, counted from 0 or from the end, not -7; name one from 0 to 5",
        ),
        ({"pairs": [[3, 5], [-1, -1]]}, (4, 6), (S, D), "pairs: [3, 5] is there twice; take one out"),
        (
            {"projector": "none"},
            (4, 6),
            (5, 6),
            "projector: states are 5 and 6 wide; take 'auto', or the distance 'cka'",
        ),
    ],
)
def test_what_these_models_do_not_have_is_refused(params, layers, widths, said):
    with pytest.raises(RecipeError) as raised:
        Hidden.needs_of(Hidden.Params.model_validate(params), pair_of(*layers, widths))
    assert str(raised.value) == said


def test_a_list_without_pairs_is_refused():
    with pytest.raises(KdzooError, match="pairs"):
        Models(True).run(pairs=[])
