"""Every committed recipe of a method, an ablation or a control, on every pair of the lab, shortened to a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_lab_pairs import RECIPES, SHORT

from kdzoo.plugin.declarations import declarations
from kdzoo.recipe.load import load_recipe
from kdzoo.testing.ranks import on_ranks

SHORTER = (*SHORT, "stages.sft=null", "stages.distill.steps=2", "evaluation.sets.seen=null")
METHODS = sorted(
    path
    for path in (*RECIPES.glob("*.json"), *RECIPES.glob("ablations/*.json"))
    if path.name not in ("base.json", "recipe.schema.json") and not path.stem.startswith("paper_")
)


def takes_two_tokenizers(name: str) -> bool:
    known = declarations().losses
    return all("two" in known[slot.use].needs for slot in load_recipe(RECIPES / f"{name}.json").recipe.losses.values())


def run_all(names: list[str], pair: str, out: Path) -> list[str]:
    """The recipes one after the other in this process group: loading DeepSpeed takes longer than two steps."""
    from kdzoo.run.recipe_run import run_recipe

    done = []
    for name in names:
        recipe = load_recipe(RECIPES / f"{name}.json", [RECIPES / "pairs" / f"{pair}.json"], SHORTER)
        run_recipe(recipe, out / name.replace("/", "-"))
        done.append(name)
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "ranks"),
    [
        ("lab_mixtral_to_gpt2", 2),
        ("lab_llama_to_llama", 1),
        pytest.param("lab_mixtral_to_llama", 1, marks=pytest.mark.sweep),
        pytest.param("lab_mixtral_to_llama", 2, marks=pytest.mark.sweep),
        pytest.param("lab_mixtral_to_gpt2", 1, marks=pytest.mark.sweep),
        pytest.param("lab_llama_to_llama", 2, marks=pytest.mark.sweep),
    ],
)
def test_every_recipe_trains_on_the_lab_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: str, ranks: int
) -> None:
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))
    names = [str(path.relative_to(RECIPES).with_suffix("")) for path in METHODS]
    if pair != "lab_llama_to_llama":
        names = list(filter(takes_two_tokenizers, names))
    assert on_ranks(ranks, tmp_path / "ranks", run_all, names, pair, tmp_path) == [names] * ranks
    for name in names:
        folder = tmp_path / name.replace("/", "-")
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == [1, 2], name
        assert all(value == value for step in steps for value in step.values()), f"{name}: not a number"
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["held out"]["student"]["by_verdict"]["wrong"] > 0, name
