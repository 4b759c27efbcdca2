"""Trackers get what the log gets, where the recipe names them; a failing one costs no run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdzoo import Tracker
from kdzoo.errors import KdzooError, RecipeError
from kdzoo.plugin.registry import Registry, load_plugins
from kdzoo.recipe.load import load_recipe
from kdzoo.run.trackers import Trackers

SFT = Path(__file__).parents[2] / "recipes" / "sft.json"
RECIPE = load_recipe(SFT)
METRICS = {"loss": 2.5, "sft/cross_entropy": 1.25}


def follow(folder: Path, *wanted: str, registry: Registry | None = None) -> None:
    """A run of three steps whose recipe names these trackers."""
    recipe = RECIPE.recipe.model_copy(update={"trackers": list(wanted)})
    trackers = Trackers(registry or load_plugins(), folder)
    with trackers.open(replace(RECIPE, recipe=recipe)):
        for step in (1, 2):
            trackers.step_logged(step, {**METRICS, "loss": METRICS["loss"] / step}, "distill")
        trackers.step_logged(1, METRICS, "teacher")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard and its protobuf
def test_tensorboard_holds_the_numbers_of_the_log(tmp_path):
    follow(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("distill/loss")] == [(1, 2.5), (2, 1.25)]
    assert [e.value for e in events.Scalars("teacher/sft/cross_entropy")] == [1.25]
    assert set(events.Tags()["scalars"]) == {f"{s}/{m}" for s in ("distill", "teacher") for m in METRICS}


def test_without_being_asked_nothing_is_sent_anywhere(tmp_path):
    follow(tmp_path)
    assert not list(tmp_path.iterdir())


class Sent:
    """A stub of wandb and trackio."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, **settings: Any) -> Sent:
        self.calls.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append((name, step_metric))

    def log(self, metrics: dict[str, float]) -> None:
        self.calls.append(metrics)

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_extras_are_told_the_recipe_the_steps_and_the_end(monkeypatch, tmp_path, name):
    sent = Sent()
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=sent.init))
    follow(tmp_path / "a-run", name)
    first, *rest = sent.calls
    assert (first["project"], first["name"], first["config"]) == ("kdzoo", "a-run", RECIPE.resolved)
    steps = [call for call in rest if isinstance(call, dict)]
    assert steps[1] == {"distill/step": 2, "distill/loss": 1.25, "distill/sft/cross_entropy": 1.25}
    assert steps[2]["teacher/step"] == 1
    assert rest[-1] == "finish"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_extra_ends_the_run_before_it_starts(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KdzooError, match=rf"^trackers: '{name}' needs .*; pip install 'kdzoo\[{name}\]', or leave it"):
        follow(tmp_path, name)


def test_a_library_that_refuses_ends_the_run_before_it_starts_in_one_line(monkeypatch, tmp_path):
    def refuse(**_: Any) -> None:
        raise ValueError("no login\nmany lines more")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(
        KdzooError, match=r"^trackers: 'wandb' cannot start \(ValueError: no login\); mend it, or leave"
    ):
        follow(tmp_path, "wandb")


def test_a_wrong_name_is_told_by_the_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"trackers\[0\]: 'wandbb' is not .*, did you mean 'wandb'\?"):
        load_recipe(SFT, sets=['trackers=["wandbb"]'])


class Broken(Tracker):
    """Fails at its second step."""

    name = "broken"
    heard: list[Any]

    def __init__(self, folder: Path, recipe: Any) -> None:
        Broken.heard = []

    def step_logged(self, step: int, metrics: Any, stage: str) -> None:
        self.heard.append(step)
        if step == 2:
            raise OSError("no route to host")

    def close(self) -> None:
        self.heard.append("closed")


@pytest.fixture
def registry() -> Registry:
    installed = load_plugins()
    return replace(installed, things={**installed.things, ("tracker", "broken"): Broken})


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(registry, tmp_path, capfd):
    follow(tmp_path, "broken", "tensorboard", registry=registry)
    assert Broken.heard == [1, 2]
    assert (
        capfd.readouterr().err.count(
            "the tracker 'broken' failed and was disabled for this run (OSError: no route to host)"
        )
        == 1
    )
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("wanted", [["broken"], ["broken", "wandb"]])
def test_a_tracker_is_closed_where_the_run_or_another_tracker_fails(registry, monkeypatch, tmp_path, wanted):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = Trackers(registry, tmp_path)
    loaded = replace(RECIPE, recipe=RECIPE.recipe.model_copy(update={"trackers": wanted}))
    with pytest.raises((ZeroDivisionError, KdzooError)), trackers.open(loaded):
        raise ZeroDivisionError
    assert Broken.heard == ["closed"]
