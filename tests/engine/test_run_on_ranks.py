"""Where work runs, and what it leaves behind in the process that asked for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdzoo.engine import distributed
from kdzoo.engine.distributed import launched_from_outside, run_on_ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def found() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in VARIABLES}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher has started the tests."""
    for name in (*VARIABLES, "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def test_one_rank_finds_itself_and_leaves_no_trace() -> None:
    seen: list[dict[str, str | None]] = []

    def work() -> int:
        seen.append(found())
        return 3

    assert run_on_ranks(1, work) == 3
    assert {name: seen[0][name] for name in VARIABLES[:4]} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert seen[0]["MASTER_PORT"] is not None
    assert found() == dict.fromkeys(VARIABLES)
    assert not launched_from_outside()


def test_one_rank_leaves_no_trace_when_it_fails() -> None:
    def work() -> int:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        run_on_ranks(1, work)
    assert found() == dict.fromkeys(VARIABLES)


def test_a_variable_that_was_set_before_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "a.node")
    run_on_ranks(1, lambda: 0)
    assert os.environ["MASTER_ADDR"] == "a.node"


def test_a_rank_that_a_launcher_started_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run_on_ranks(1, lambda: int(os.environ["RANK"])) == 1
    assert os.environ["RANK"] == "1"


class SaysItsRank:
    """Leaves a file named after rank and number of ranks. Defined here, so that other processes can import it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> int:
        (self.folder / f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}").touch()
        return 0


@pytest.mark.slow
def test_two_ranks_after_one_are_two(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    handlers = [signal.getsignal(number) for number in SIGNALS]
    for ranks, folder in ((1, one), (2, two)):
        folder.mkdir()
        assert run_on_ranks(ranks, SaysItsRank(folder)) == 0
    assert [path.name for path in one.iterdir()] == ["0 of 1"]
    assert sorted(path.name for path in two.iterdir()) == ["0 of 2", "1 of 2"]
    assert found() == dict.fromkeys(VARIABLES)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.slow
def test_one_process_may_join_a_group_again() -> None:
    """DeepSpeed remembers the groups that it made, and would ask torch for those of the run before."""

    def work() -> int:
        from deepspeed.utils import groups

        distributed.start()
        try:
            return dist.get_rank(group=groups._get_data_parallel_group())
        finally:
            distributed.stop()

    assert [run_on_ranks(1, work), run_on_ranks(1, work)] == [0, 0]


@pytest.mark.slow
def test_numbers_too_small_for_the_normal_range_are_numbers_again_after_a_run() -> None:
    tiny = torch.tensor(1e-39)
    halves: list[float] = []

    def work() -> int:
        distributed.start()
        try:
            halves.append((tiny / 2).item())
        finally:
            distributed.stop()
        return 0

    run_on_ranks(1, work)
    assert (tiny / 2).item() > 0
    assert torch.cuda.is_available() or halves == [0.0]
