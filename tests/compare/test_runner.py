"""A comparison runs what is missing, keeps what is there, and goes on after a failure; the runs are made up."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from filelock import FileLock
from made_up import made_up_run

from kdzoo.compare.ledger import read_ledger
from kdzoo.compare.runner import Comparison, reason, whole
from kdzoo.compare.suite import Cell, load_suite
from kdzoo.errors import KdzooError


class MadeUp(Comparison):
    """Whose runs take no time: `ran` is which ones; those in `fail` say why and end. `reported` is of which suites."""

    fail: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ran: list[str] = []
        self.reported: list[Path] = []
        self.report = self.reported.append

    def process(self, cell: Cell, recipe: Path, work: Path, log: Path) -> int:
        self.ran.append(cell.name)
        if cell.name in self.fail:
            log.write_text("distill 1/40\nerror: losses.kl: is no good; mend it\n")
            return 2
        made_up_run(work, cell)
        return 0

    def leave_out_what_does_not_fit(self) -> None:
        self.left_out = {"tiny": dict.fromkeys(self.unfit, "does not fit")} if self.unfit else {}


@pytest.fixture
def comparison(suite):
    def make(**settings) -> MadeUp:
        made = MadeUp(load_suite(suite), Path("out/cells"), Path("out/two.json"), print)
        for name, value in settings.items():
            setattr(made, name, value)
        return made

    return make


def test_it_runs_every_cell_once_and_reports_them(comparison):
    first = comparison()
    assert first.run() == 0
    assert first.ran == ["sft-1", "kl-1", "sft-2", "kl-2"]
    found = read_ledger(Path("out/two.json"))
    assert {recipe: list(by_seed) for recipe, by_seed in found.pairs["tiny"].cells.items()} == {
        "sft": [1, 2],
        "kl": [1, 2],
    }
    assert set(found.pairs["tiny"].reference_models) == {"teacher", "copy of the input"}
    second = comparison()
    assert second.run() == 0
    assert second.ran == []
    assert first.reported == second.reported == [Path("out/two.json")]


def test_nothing_is_reported_where_no_cell_is_done(comparison):
    failed = comparison(fail=("sft-1", "sft-2", "kl-1", "kl-2"))
    assert failed.run() == 1
    assert failed.reported == []


def test_a_failure_stops_nothing_and_is_tried_again(comparison, capfd):
    first = comparison(fail=("kl-1",))
    assert first.run() == 1
    assert first.ran == ["sft-1", "kl-1", "sft-2", "kl-2"]
    assert "failed: tiny kl-1: losses.kl: is no good; mend it (out/cells/tiny/kl-1-" in capfd.readouterr().err
    again = comparison()
    assert again.run() == 0
    assert again.ran == ["kl-1"]


def test_cells_of_the_ledger_are_there_without_their_run_folders(comparison):
    comparison().run()
    Path("out/cells").rename("gone")
    again = comparison()
    again.run()
    assert again.ran == []


def test_a_run_folder_that_the_ledger_lacks_is_put_into_it(comparison):
    comparison().run()
    Path("out/tiny/kl-2.json.gz").unlink()
    again = comparison()
    again.run()
    assert again.ran == []
    assert Path("out/tiny/kl-2.json.gz").is_file()


def test_a_recipe_that_changed_is_not_taken_for_the_old_one(comparison, write, suite):
    comparison().run()
    write("kl.json", {"extends": "sft.json", "title": "KL", "losses": {"kl": {"use": "forward_kl", "weight": 2.0}}})
    with pytest.raises(
        KdzooError, match=r"kl-1.json.gz: 'kl-1' was made from another recipe; name another folder with '--ledger'"
    ):
        comparison().run()


def test_what_does_not_fit_is_left_out_and_said(comparison, capfd):
    made = comparison(unfit=("kl",))
    assert made.run() == 0
    assert made.ran == ["sft-1", "sft-2"]
    assert "tiny: leaves out kl: does not fit" in capfd.readouterr().err
    assert read_ledger(Path("out/two.json")).suite.left_out == {"tiny": {"kl": "does not fit"}}


def test_an_interrupted_cell_leaves_nothing_half_done(comparison):
    class Interrupted(MadeUp):
        def process(self, cell: Cell, recipe: Path, work: Path, log: Path) -> int:
            if len(self.ran) == 2:
                work.mkdir(parents=True)
                raise KeyboardInterrupt
            return super().process(cell, recipe, work, log)

    base = comparison()
    stopped = Interrupted(base.suite, base.cells, base.ledger, print)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert stopped.ran == ["sft-1", "kl-1"]
    again = comparison()
    again.run()
    assert again.ran == ["sft-2", "kl-2"]
    assert not list(Path("out/cells").rglob("*.part"))


def test_as_many_run_at_a_time_as_jobs(suite):
    together = threading.Barrier(2, timeout=20)

    class Parallel(MadeUp):
        def process(self, cell: Cell, recipe: Path, work: Path, log: Path) -> int:
            if cell.name in ("kl-1", "sft-2"):  # after the first, which makes what all share
                together.wait()
            return super().process(cell, recipe, work, log)

    made = Parallel(load_suite(suite), Path("out/cells"), Path("out/two.json"), print, jobs=2)
    assert made.run() == 0
    assert made.ran[0] == "sft-1"
    assert sorted(made.ran) == ["kl-1", "kl-2", "sft-1", "sft-2"]


def test_runs_at_a_time_share_the_cores(suite, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    made = Comparison(load_suite(suite), Path("c"), Path("l.json"), print, jobs=2, ranks=2)
    assert made.threads()["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert made.threads()["OMP_NUM_THREADS"] == "1"


def test_two_comparisons_do_not_work_in_one_folder(comparison):
    Path("out/cells").mkdir(parents=True)
    with FileLock("out/cells/.lock"), pytest.raises(KdzooError, match="another comparison is using 'out/cells'"):
        comparison().run()


def test_a_dry_run_says_what_is_missing(comparison, capfd):
    made = comparison()
    assert made.list_missing() == 0
    assert made.ran == []
    assert "0 of 4 cells done" in (told := capfd.readouterr().err)
    assert "missing: tiny  kl  seeds 1, 2" in told


@pytest.mark.parametrize(
    ("text", "why"),
    [("a\nerror: b; c\nd\n", "b; c"), ("a\nRuntimeError: x\n\n", "RuntimeError: x"), ("", "the run printed nothing")],
)
def test_the_reason_of_a_failure_is_its_error_line_else_its_last(tmp_path, text, why):
    (tmp_path / "log").write_text(text)
    assert reason(tmp_path / "log") == why


def test_a_cell_is_a_whole_recipe_that_stands_anywhere(suite, tmp_path):
    hook = "@kdzoo.hookimpl\ndef register_plugins(register):\n    pass\n"
    (tmp_path / "mine.py").write_text(f"import kdzoo\n\n\n{hook}")
    cell = load_suite(suite, loose=[Path("mine.py")]).cells[0]
    assert whole(cell)["plugins"] == [str(tmp_path / "mine.py")]
    assert "plugins" not in whole(load_suite(suite).cells[0])
