"""Trackers get what the log gets, where the recipe names them; a failing one costs no run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdzoo.errors import KdzooError, RecipeError
from kdzoo.plugin import hooks
from kdzoo.plugin.registry import load_plugins
from kdzoo.run.followers import Followers

RECIPE = {"title": "A run", "stages": {"teacher": {}, "distill": {}}}
METRICS = {"loss": 2.5, "sft/cross_entropy": 1.25}


def follow(folder: Path, *wanted: str, manager: pluggy.PluginManager | None = None) -> None:
    followers = Followers(manager or load_plugins().manager, wanted, folder)
    with followers.following(RECIPE):
        for step in (1, 2):
            followers.step_logged(step, {**METRICS, "loss": METRICS["loss"] / step}, "distill")
        followers.step_logged(1, METRICS, "teacher")


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
    assert (first["project"], first["name"], first["config"]) == ("kdzoo", "a-run", RECIPE)
    steps = [call for call in rest if isinstance(call, dict)]
    assert steps[1] == {"distill/step": 2, "distill/loss": 1.25, "distill/sft/cross_entropy": 1.25}
    assert steps[2]["teacher/step"] == 1
    assert rest[-1] == "finish"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_extra_ends_the_run_before_it_starts(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KdzooError, match=rf"^trackers: '{name}' needs .*; pip install 'kdzoo\[{name}\]', or leave it"):
        follow(tmp_path, name)


def test_a_wrong_name_is_told_with_the_right_ones(tmp_path):
    with pytest.raises(RecipeError, match=r"^trackers: 'wandbb' is none of tensorboard, trackio, wandb, did you mean"):
        follow(tmp_path, "wandbb")


class Plugin:
    """One that follows every run, or a tracker with a name that fails at its second step."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @hooks.hookimpl
    def step_logged(self, step: int) -> None:
        self.heard.append(step)

    @hooks.hookimpl
    def run_ended(self) -> None:
        self.heard.append("ended")


class Broken(Plugin):
    @hooks.hookimpl
    def tracker(self) -> str:
        return "broken"

    @hooks.hookimpl
    def step_logged(self, step: int) -> None:
        super().step_logged(step)
        if step == 2:
            raise OSError("no route to host")


def managed(*plugins: Plugin) -> pluggy.PluginManager:
    manager = pluggy.PluginManager("kdzoo")
    manager.add_hookspecs(hooks)
    for plugin in plugins:
        manager.register(plugin)
    return manager


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, capfd):
    other, broken = Plugin(), Broken()
    follow(tmp_path, "broken", manager=managed(other, broken))
    assert broken.heard == [1, 2]
    assert other.heard == [1, 2, 1, "ended"]
    told = capfd.readouterr().err
    assert told.count("the tracker 'broken' failed and hears no more (OSError: no route to host)") == 1


def test_trackers_hear_of_the_end_of_a_run_that_fails(tmp_path):
    broken = Broken()
    followers = Followers(managed(broken), ["broken"], tmp_path)
    with pytest.raises(ZeroDivisionError), followers.following(RECIPE):
        raise ZeroDivisionError
    assert broken.heard == ["ended"]
