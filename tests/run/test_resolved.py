"""A recipe is resolved once: every source is read once, every loss asked once, and what does not fit is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kdzoo.api.loss import Loss, Needs
from kdzoo.api.models import ModelInfo, ModelPair
from kdzoo.data.rows import Row
from kdzoo.errors import RecipeError
from kdzoo.plugin.registry import load_plugins
from kdzoo.recipe.load import load_recipe
from kdzoo.recipe.model import Recipe
from kdzoo.run import inputs
from kdzoo.run.context import RunContext
from kdzoo.run.resolved import resolve_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def context(recipe: Recipe, same_tokens: bool = True) -> RunContext:
    models = ModelPair(ModelInfo(64, 50, 2, "gpt2"), ModelInfo(128, 60, 4, "llama"), same_tokens)
    known = {"recipe": recipe, "registry": load_plugins(), "models": models, "same_tokens": same_tokens}
    return cast(RunContext, SimpleNamespace(**known, fusions={}))


def recipe_of(name: str, *sets: str) -> Recipe:
    return load_recipe(RECIPES / name, sets=sets).recipe


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the rows of each address were read."""
    count: Counter[str] = Counter()

    def load(_: Any, address: str, columns: Sequence[str] = ()) -> list[Row]:
        count[address] += 1
        return [Row("1", address, "", ("answer",))]

    monkeypatch.setattr(inputs, "load_rows", load)
    return count


def test_every_source_is_read_once_and_shared_by_its_stages(read):
    own = 'stages.sft.data={"lab": "train", "limit": 3}'
    resolved = resolve_recipe(context(recipe_of("residual.json", own)))
    assert read.keys() >= {"data.train", "data.held_out", "stages.sft.data"}
    assert set(read.values()) == {1}
    (artifact,) = resolved.artifacts["residual"].values()
    assert resolved.distill.source is artifact.source
    assert resolved.alone["teacher"].source.address == "stages.teacher.data"
    assert resolved.alone["sft"].source.address == "stages.sft.data"
    assert list(resolved.sets) == list(recipe_of("residual.json").evaluation.sets)


def test_every_loss_is_asked_once_for_its_needs(read, monkeypatch):
    found = context(recipe_of("residual.json"))
    asked: Counter[type] = Counter()
    for loss in found.registry.of(Loss).values():

        def needs(params: Any, same: bool, loss: Any = loss, original: Any = loss.needs) -> Any:
            asked[loss] += 1
            return original(params, same)

        monkeypatch.setattr(loss, "needs", needs)
    resolved = resolve_recipe(found)
    stages = [resolved.distill, *resolved.alone.values(), *(s for t in resolved.artifacts.values() for s in t.values())]
    assert asked == Counter(term.loss for stage in stages for term in stage.losses)


def test_an_artifact_stage_has_the_parameters_that_its_loss_insists_on(read):
    resolved = resolve_recipe(context(recipe_of("residual.json")))
    (term,) = [term for term in resolved.distill.losses if term.needs.artifacts]
    ((name, insists),) = term.needs.artifacts.items()
    (trained,) = resolved.artifacts[term.name][name].losses
    assert trained.name == name
    assert insists.items() <= trained.entry.params.items()


def test_a_stage_that_a_loss_needs_must_be_there(read):
    (name,) = next(iter(resolve_recipe(context(recipe_of("residual.json"))).artifacts.values()))
    recipe = recipe_of("residual.json", f"stages.{name}=null")
    with pytest.raises(RecipeError, match=rf"^stages\.{name}: a loss needs this stage's module, .* has no such stage"):
        resolve_recipe(context(recipe))


def test_a_stage_of_one_model_refuses_a_loss_that_reads_a_teacher(read):
    recipe = recipe_of("forward_kl.json", 'stages.sft.losses={"kd": {"use": "forward_kl"}}')
    with pytest.raises(
        RecipeError, match=r"^stages\.sft\.losses\.kd: 'forward_kl' reads a teacher; there is none here$"
    ):
        resolve_recipe(context(recipe))


def test_a_loss_for_one_tokenizer_is_refused_where_there_are_two(read):
    with pytest.raises(RecipeError, match=r"^losses\.\w+: 'forward_kl' compares two models token by token"):
        resolve_recipe(context(recipe_of("forward_kl.json"), same_tokens=False))
    assert not read


@pytest.mark.parametrize(("role", "block", "layers"), [("student", 2, 2), ("teacher", -5, 4)])
def test_a_block_that_a_model_does_not_have_is_refused(read, monkeypatch, role, block, layers):
    found = context(recipe_of("forward_kl.json"))
    sites = {role: frozenset({f"hidden.{block}@all"})}
    monkeypatch.setattr(found.registry.of(Loss)["forward_kl"], "needs", lambda params, same: Needs(**sites))
    with pytest.raises(
        RecipeError,
        match=rf"^losses\.\w+: 'forward_kl' reads the {role}'s site 'hidden\.{block}@all', and the {role} has {layers} "
        "blocks, counted from 0 or from the end; name another block$",
    ):
        resolve_recipe(found)
    assert not read


def test_what_a_loss_says_of_the_models_stands_at_its_parameter(read, monkeypatch):
    def needs_of(params: Any, pair: ModelPair) -> Needs:
        raise RecipeError(f"divergence: {pair.student.layers} and {pair.teacher.layers} blocks are too few; add some")

    found = context(recipe_of("forward_kl.json"))
    monkeypatch.setattr(found.registry.of(Loss)["forward_kl"], "needs_of", needs_of)
    with pytest.raises(RecipeError, match=r"^losses\.\w+\.params\.divergence: 2 and 4 blocks are too few; add some$"):
        resolve_recipe(found)


def test_a_stage_without_a_teacher_refuses_a_loss_that_asks_for_its_sizes(read, monkeypatch):
    found = context(recipe_of("forward_kl.json", 'stages.sft.losses={"kd": {"use": "reverse_kl"}}'))
    asks = classmethod(lambda cls, params, pair: Needs(teacher=frozenset({f"hidden.{pair.teacher.layers}"})))
    monkeypatch.setattr(found.registry.of(Loss)["reverse_kl"], "needs_of", asks)
    with pytest.raises(RecipeError, match=r"^stages\.sft\.losses\.kd: a loss reads the teacher's 'layers' in a stage"):
        resolve_recipe(found)


def test_a_stage_of_one_model_refuses_token_weights_that_read_a_teacher(read):
    recipe = recipe_of(
        "forward_kl.json",
        'token_weights={"right": {"use": "verdict"}}',
        'stages.sft.losses={"sft": {"use": "cross_entropy", "weights": "right"}}',
    )
    line = r"^stages\.sft\.losses\.sft\.weights: 'verdict' reads a teacher, and there is none here; take other weights$"
    with pytest.raises(RecipeError, match=line):
        resolve_recipe(context(recipe))


def test_token_weights_that_compare_predictions_are_refused_where_there_are_two_tokenizers(read):
    recipe = recipe_of("uld.json", 'token_weights={"far": {"use": "adaptive"}}', "losses.uld.weights=far")
    line = r"^token_weights\.far: 'adaptive' compares both models' predictions of a token and needs one tokenizer, but "
    with pytest.raises(RecipeError, match=line):
        resolve_recipe(context(recipe, same_tokens=False))
    assert not read


def test_every_stage_reads_the_columns_of_its_token_weights(monkeypatch):
    columns: dict[str, Sequence[str]] = {}

    def load(_: Any, address: str, wanted: Sequence[str] = ()) -> list[Row]:
        columns[address] = wanted
        return [Row("1", address, "", ("answer",))]

    monkeypatch.setattr(inputs, "load_rows", load)
    recipe = recipe_of(
        "forward_kl.json",
        'token_weights={"good": {"use": "column", "params": {"column": "good"}}, "sure": {"use": "column"}}',
        "losses.kd.weights=good",
        'stages.sft.losses={"sft": {"use": "cross_entropy", "weights": "sure"}}',
    )
    resolved = resolve_recipe(context(recipe))
    assert columns["data.train"] == ("good", "weight") and columns["stages.teacher.data"] == ()
    assert resolved.distill.losses.columns == ("good",) and resolved.alone["sft"].losses.columns == ("weight",)


def test_a_fusion_that_a_dense_teacher_lacks_leaves_its_own_state(read):
    for term in resolve_recipe(context(recipe_of("dskd_plus_residual.json"))).distill.losses:
        assert (term.state, term.prediction, term.fused) == ("hidden.last", "hidden.last", False)


def test_a_loss_of_the_teachers_answers_is_refused_without_the_stage_that_makes_them(read):
    with pytest.raises(
        RecipeError,
        match=r"^losses\.seq_kd: 'seq_kd' learns from the teacher's answers, and no stage generates them; add "
        r"'stages\.answers', or take another loss$",
    ):
        resolve_recipe(context(recipe_of("seq_kd.json", "stages.answers=null"), same_tokens=False))
    assert not read


def test_a_stage_that_reads_the_data_alone_refuses_a_loss_of_the_teachers_answers(read):
    recipe = recipe_of("seq_kd.json", "stages.sft.losses.sft.use=seq_kd")
    with pytest.raises(RecipeError, match=r"^stages\.sft\.losses\.sft: 'seq_kd' learns from the teacher's answers"):
        resolve_recipe(context(recipe, same_tokens=False))


def test_a_share_without_a_row_is_refused(read):
    with pytest.raises(RecipeError, match=r"^stages\.answers\.share: 0\.4 of 1 rows is none"):
        resolve_recipe(context(recipe_of("seq_kd.json", "stages.answers.share=0.4"), same_tokens=False))


def test_any_loss_may_read_rows_with_answers(read):
    recipe = recipe_of("forward_kl.json", 'stages.answers={"share": 0.5}')
    resolved = resolve_recipe(context(recipe))
    assert resolved.answers is recipe.stages.answers
    assert resolve_recipe(context(recipe_of("forward_kl.json"))).answers is None
