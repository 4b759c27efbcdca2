"""The default recipe trains on every pair of the lab, a recipe of every method on some, all shortened to a few steps.

With `-m sweep`, every recipe on every pair. That all of them are valid is tried in tests/recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from running import RECIPES, Run, run, run_on_two_ranks, sets

from kdzoo.plugin.declarations import declarations
from kdzoo.recipe.load import load_recipe

SHORT = (
    "stages.teacher.steps=6",
    "stages.teacher.warmup=0",
    "stages.teacher.data.limit=200",
    "stages.sft.steps=2",
    "stages.sft.warmup=0",
    "stages.projectors.epochs=null",
    "stages.projectors.steps=2",
    "stages.distill.steps=3",
    "stages.distill.warmup=0",
    "data.train.limit=100",
    "data.held_out.limit=16",
    "evaluation.sets.seen.limit=4",
    "evaluation.sets.longer=null",
    "evaluation.sets.phrasing=null",
    "evaluation.max_new_tokens=8",
)
SHORTER = (*SHORT, "stages.sft=null", "stages.distill.steps=2", "evaluation.sets.seen=null")
DEFAULT = "dskd_plus_residual"
EVERY = sorted(
    path.relative_to(RECIPES).with_suffix("").as_posix()
    for path in (*RECIPES.glob("*.json"), *RECIPES.glob("ablations/*.json"))
    if path.name not in ("base.json", "recipe.schema.json") and not path.stem.startswith("paper_")
)
METHODS = [name for name in EVERY if "/" not in name and not name.endswith("_plus_residual")]
PATHS = ("adakd", "alm_balanced", "attention_relations", "dskd", "dskd_v2", "hidden", "min_ed", "multilevel_ot")
PATHS += ("residual", "seq_kd", "sft", "taid", "uld")
"""Methods that each take a way through a run which no other takes; the others differ in a formula."""
EACH = [name if name in PATHS else pytest.param(name, marks=pytest.mark.sweep) for name in METHODS]
PAIRS = ("lab_mixtral_to_gpt2", "lab_mixtral_to_llama", "lab_llama_to_llama")
PADDED = sets("student.config.vocab_size=3000")
"""For a student whose tokenizer has fewer entries, as the teacher's has."""


def takes_two_tokenizers(name: str) -> bool:
    known, recipe = declarations().of("loss"), load_recipe(RECIPES / f"{name}.json").recipe
    return all("two" in known[slot.use].needs for slot in recipe.losses.values())


def command(name: str, pair: str, settings: Sequence[str] = SHORTER) -> list[str]:
    recipe = RECIPES / f"{name}.json"
    if load_recipe(recipe).recipe.stages.answers is not None:
        # The likeliest answer of a teacher that is hardly trained is none.
        settings = (*settings, "stages.answers.decoding.sample=true")
    return [str(recipe), "--on", str(RECIPES / "pairs" / f"{pair}.json"), *sets(*settings)]


def trained(folder: Path, name: str, pair: str, *flags: str, settings: Sequence[str] = SHORTER) -> Run:
    recipe, *rest = command(name, pair, settings)
    return run(folder, *rest, *flags, recipe=Path(recipe))


def assert_trained(done: Run) -> None:
    steps = done.lines()
    assert [step["step"] for step in steps] == [1, 2]
    assert all(value == value for step in steps for value in step.values()), "not a number"
    assert done.read("scores.json")["held out"]["student"]["by_verdict"]["wrong"] > 0


def assert_trained_by_default(done: Run) -> None:
    steps = done.lines()
    assert [step["step"] for step in steps] == [1, 2, 3]
    terms = {"loss", "sft/cross_entropy", "dskd/t2s_ce", "dskd/t2s_kd", "dskd/s2t_kd", "residual/wrong_share"}
    assert terms <= steps[0].keys()
    models = {"copy of the input", "teacher", "untrained student", "student, data alone", "student"}
    assert set(done.read("scores.json")["seen"]) == models


def test_every_loss_has_a_recipe() -> None:
    used = {slot.use for name in METHODS for slot in load_recipe(RECIPES / f"{name}.json").recipe.losses.values()}
    assert used | {"projectors"} == declarations().of("loss").keys()


def test_all_token_weights_but_a_column_of_ones_own_data_have_a_recipe() -> None:
    recipes = [load_recipe(RECIPES / f"{name}.json").recipe for name in METHODS]
    used = {recipe.token_weights[s.weights].use for recipe in recipes for s in recipe.losses.values() if s.weights}
    assert used | {"column"} == declarations().of("token_weights").keys()


@pytest.mark.slow
def test_rows_that_bring_weights_train_by_them(tmp_path: Path) -> None:
    """A row of weight 0 is as if it were not there; whatever its tokens say."""
    good = [{"instruction": f"Say {word}.", "input": "", "output": f"{word} it is", "weight": 1} for word in ("a", "b")]
    silent = {"instruction": "Say z.", "input": "", "output": "z it is not at all", "weight": 0}

    def losses(name: str, *rows: dict[str, object]) -> list[float]:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        weighed = (
            'token_weights={"mine": {"use": "column"}}',
            "losses.kd.weights=mine",
            "losses.sft.weights=mine",
            "data.train.lab=null",
            f"data.train.jsonl={file}",
            "data.train.limit=null",
            f"stages.distill.batch={len(rows)}",
        )
        done = trained(tmp_path / name, "forward_kl", "lab_llama_to_llama", settings=(*SHORTER, *weighed))
        return [step["loss"] for step in done.lines()]

    assert losses("both", *good, silent) == pytest.approx(losses("good", *good), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["lab_mixtral_to_gpt2", "lab_llama_to_llama"])
def test_the_default_recipe_trains_on_the_pair(tmp_path: Path, pair: str) -> None:
    assert_trained_by_default(trained(tmp_path / "run", DEFAULT, pair, settings=SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_every_method_trains_with_one_tokenizer(tmp_path: Path, name: str) -> None:
    assert_trained(trained(tmp_path / "run", name, "lab_llama_to_llama"))


@pytest.mark.slow
def test_heads_that_are_padded_differently_are_compared_on_what_their_tokenizer_has(tmp_path: Path) -> None:
    done = trained(tmp_path / "run", "forward_kl", "lab_llama_to_llama", *PADDED)
    (said,) = [line for line in done.screen.splitlines() if "their heads are padded" in line]
    assert "the student's to 3,000 entries" in said and "of the tokenizer are compared" in said
    assert_trained(done)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The default recipe, and methods on every path that take two tokenizers."""
    folder = tmp_path_factory.mktemp("two-ranks")
    methods = list(filter(takes_two_tokenizers, PATHS))
    assert len(methods) > 3
    commands = {folder / name: command(name, "lab_mixtral_to_gpt2") for name in methods}
    commands[folder / DEFAULT] = command(DEFAULT, "lab_mixtral_to_llama", SHORT)
    return run_on_two_ranks(folder, commands)


@pytest.mark.slow
def test_the_default_recipe_trains_on_two_ranks(two_ranks: dict[str, Run]) -> None:
    assert two_ranks[DEFAULT].read("environment.json")["ranks"] == 2
    assert_trained_by_default(two_ranks[DEFAULT])


@pytest.mark.slow
def test_methods_that_take_two_tokenizers_train_with_them_on_two_ranks(two_ranks: dict[str, Run]) -> None:
    for name in two_ranks.keys() - {DEFAULT}:
        assert_trained(two_ranks[name])


@pytest.mark.sweep
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_trains_on_every_pair(tmp_path: Path, name: str, pair: str) -> None:
    if pair != "lab_llama_to_llama" and not takes_two_tokenizers(name):
        pytest.skip("needs one tokenizer")
    assert_trained(trained(tmp_path / "run", name, pair))


@pytest.mark.sweep
@pytest.mark.parametrize("pair", PAIRS)
def test_every_recipe_trains_on_two_ranks(tmp_path: Path, pair: str) -> None:
    names = EVERY if pair == "lab_llama_to_llama" else list(filter(takes_two_tokenizers, EVERY))
    commands = {tmp_path / name.replace("/", "-"): command(name, pair) for name in names}
    if pair == "lab_llama_to_llama":
        commands[tmp_path / "padded"] = [*command("forward_kl", pair), *PADDED]
    for done in run_on_two_ranks(tmp_path / "ranks", commands).values():
        assert_trained(done)
