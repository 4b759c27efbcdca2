"""The conformance kit finds what is wrong with a loss, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from broken import (
    BROKEN,
    ByPlace,
    ColumnByColumn,
    Forgets,
    HalfPrecision,
    MeanOfChunk,
    NoDivergence,
    Normalised,
    NotAligned,
    NotFinite,
    OncePerSequence,
    OnTheFirstRank,
    SaysCoupled,
    SeesPadding,
    SkipsEmpty,
    Undeclared,
    Unread,
    UnreadStage,
    Unused,
    WrongGradient,
)

from kdzoo.cli import main
from kdzoo.errors import KdzooError
from kdzoo.testing import check_loss, conformance
from kdzoo.testing.promises import CHECKS, RANKS
from kdzoo.testing.promises.world import Subject, World, rearranged
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL

FOUND = {
    NotFinite: {"finite", "split"},
    Unread: {"needs"},
    UnreadStage: {"needs"},
    NotAligned: {"needs"},
    SkipsEmpty: {"gradients"},
    Unused: {"gradients"},
    MeanOfChunk: {"chunks", "finite", "split"},
    SeesPadding: {"padding"},
    Normalised: {"split"},
    ByPlace: {"order", "split"},
    SaysCoupled: {"coupling"},
    NoDivergence: {"divergence"},
    WrongGradient: {"derivative"},
    HalfPrecision: {"bf16"},
    ColumnByColumn: {"tokenizers"},
    Forgets: {"state"},
    Undeclared: {"needs", "tokenizers"},
    OnTheFirstRank: {"ranks"},
    OncePerSequence: {"ranks"},
}
"""Every broken loss, and the checks that it cannot pass."""


def faults(loss, ranks=False):
    return {r.check: r.fault for r in conformance(loss, ranks=ranks) if r.fault and not r.fault.startswith("not tried")}


@pytest.mark.parametrize("loss", [loss for loss in FOUND if FOUND[loss] != {"ranks"}], ids=lambda loss: loss.name)
def test_each_broken_loss_is_caught_by_its_check_and_by_no_other(loss):
    assert faults(loss).keys() == FOUND[loss]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "fault"),
    [
        (OnTheFirstRank, "two ranks of ZeRO-3 are not one process: the loss is "),
        (OncePerSequence, "call every module equally often on each rank"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_only_several_ranks_show_is_caught_on_them(loss, fault):
    found = faults(loss, ranks=True)
    assert found.keys() == {"ranks"} and fault in found["ranks"]


def test_every_check_has_a_loss_that_it_catches():
    assert set(FOUND) == set(BROKEN)
    assert set().union(*FOUND.values()) == {check.name for check in CHECKS} | {RANKS[0]}


@pytest.mark.parametrize(
    ("loss", "check", "advice"),
    [
        (SkipsEmpty, "gradients", "run every module also on 0 rows, never branch around one"),
        (Unread, "needs", "the student's site 'hidden.0' is declared and not read; take it out of 'needs'"),
        (Undeclared, "needs", "reads the site 'hidden.0' that its needs do not declare, did you mean 'hidden.last'?"),
        (NotAligned, "needs", "say 'aligned=True' in 'needs' (two tokenizers)"),
        (ColumnByColumn, "tokenizers", "mend it for two tokenizers, or say tokenizers='same' in 'needs'"),
        (MeanOfChunk, "chunks", "return sums over rows, and name 'per'"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_failure_says_what_to_do(loss, check, advice):
    assert advice in faults(loss)[check]


def test_an_exception_is_told_once_with_its_line():
    results = {result.check: result.fault for result in conformance(Undeclared, ranks=False)}
    assert results["finite"] == "not tried; mend 'tokenizers' first" or "'needs'" in results["finite"]
    lines = Path(__file__).with_name("broken.py").read_text().splitlines()
    place = next(n for n, line in enumerate(lines, 1) if "ops.forward_kl(p, q).sum(), per" in line)
    assert f"(broken.py:{place})" in faults(ColumnByColumn)["tokenizers"]


def test_check_loss_raises_with_every_fault_and_is_silent_on_a_sound_loss():
    check_loss(ForwardKL, {"temperature": 2.0}, ranks=False)
    with pytest.raises(AssertionError, match=r"'by_place' does not keep what a loss promises:\nsplit: .*\norder: "):
        check_loss(ByPlace, ranks=False)


def test_parameters_that_the_loss_does_not_have_are_one_line():
    with pytest.raises(KdzooError, match=r"^forward_kl: temperatur: extra inputs are not permitted$"):
        conformance(ForwardKL, {"temperatur": 2.0})


def test_the_command_checks_a_loss_by_name(capsys):
    assert main(["check", "forward_kl", "--set", "temperature=2", "--no-ranks"]) == 0
    out = capsys.readouterr().out
    assert out.startswith('forward_kl with {"temperature": 2}\n')
    assert out.count("  ok  ") == len(CHECKS) and "FAILED" not in out


def test_the_command_checks_every_loss_of_a_file_and_fails_if_one_does(capsys, tmp_path):
    file = tmp_path / "mine.py"
    broken = Path(__file__).with_name("broken.py").read_text()
    file.write_text(broken.replace("for loss in BROKEN:", "for loss in (Unread, SeesPadding):"))
    assert main(["check", str(file), "--no-ranks"]) == 1
    out = capsys.readouterr().out
    assert "unread\n" in out and "sees_padding\n" in out and out.count("FAILED") == 2
    assert "\n          padding changes something: " in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forwardkl", "no such loss, did you mean 'forward_kl'?; give a loss of 'kdzoo list', or a plugin's file"),
        ("no_such.py", "no such file"),
        ("plugins/kdzoo_aligners.py", "registers no loss"),
    ],
)
def test_the_command_says_what_it_cannot_find(name, message, capsys):
    assert main(["check", name]) == 2
    assert message in capsys.readouterr().err


# The world itself.


def test_a_batch_in_its_own_order_is_the_batch():
    world = World(Subject.of(CrossEntropy), same_tokens=False)
    batch = world.batch()
    again = rearranged(batch, range(4))
    for side, other in ((batch.student, again.student), (batch.teacher, again.teacher)):
        for name in ("input_ids", "attention_mask", "rows", "labels", "inputs", "sample", "span"):
            torch.testing.assert_close(getattr(other, name), getattr(side, name), msg=name)
    torch.testing.assert_close(again.pairs, batch.pairs)


def test_the_same_seed_is_the_same_world():
    subject = Subject.of(ForwardKL)
    worlds = [World(subject, True), World(subject, True)]
    first, second = (world.run([world.slot()], world.batch()) for world in worlds)
    assert first.difference(second, tolerance=0.0) == ""
