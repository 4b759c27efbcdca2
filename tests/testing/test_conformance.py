"""The conformance kit finds what is wrong with a loss, and only that."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from broken import (
    BROKEN,
    BareParameter,
    ByPlace,
    ColumnByColumn,
    DividesTwice,
    EditsLogits,
    EditsLogprobs,
    EditsStates,
    Forgets,
    ForgetsAfterSteps,
    HalfPrecision,
    HandsBackASum,
    LeavesOutTokens,
    MeanOfBatch,
    MeanOfChunk,
    MeanOfTokens,
    MeanPerToken,
    Misspelt,
    MisspeltEach,
    MovesWithinSteps,
    NoDivergence,
    NoFormula,
    Normalised,
    NotAligned,
    NotANumberAtEquality,
    NotCalled,
    NotFinite,
    NothingLearns,
    OftenOnTheFirstRank,
    OncePerSequence,
    OnlyItsOwn,
    OnTheFirstRank,
    PacksInSilence,
    PerSequence,
    SaysCoupled,
    SeesPadding,
    SkipsEmpty,
    Undeclared,
    Unread,
    UnreadEntries,
    UnreadStage,
    Unused,
    WrongGradient,
)
from broken_weights import BROKEN as BROKEN_WEIGHTS
from broken_weights import (
    AboveTheMean,
    ByWidth,
    NeedsTokens,
    Negative,
    NoSuchFact,
    OnePerSpan,
    Trains,
    UndeclaredFact,
    UnreadColumn,
    UnreadFact,
)
from broken_weights import ByPlace as WeighsByPlace
from broken_weights import Forgets as ForgetsWeights
from broken_weights import MovesWithinSteps as MovesWeightsWithinSteps
from broken_weights import OnTheFirstRank as WeighsOnTheFirstRank

from kdzoo.cli import main
from kdzoo.errors import KdzooError
from kdzoo.testing import check_loss, conformance
from kdzoo.testing.promises import CHECKS, CHECKS_OF_WEIGHTS, RANKS, Result
from kdzoo.testing.promises.rearrange import rearranged, repeated
from kdzoo.testing.promises.world import Subject, World
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL

FOUND = {
    NoFormula: {"declarations"},
    Undeclared: {"declarations"},
    Misspelt: {"declarations"},
    ColumnByColumn: {"tokenizers"},
    NotFinite: {"finite"},
    MisspeltEach: {"needs"},
    Unread: {"needs"},
    UnreadStage: {"needs"},
    NotAligned: {"needs", "weights"},
    UnreadEntries: {"needs"},
    BareParameter: {"modules"},
    NotCalled: {"modules"},
    OncePerSequence: {"modules"},
    SkipsEmpty: {"empty", "modules"},
    NothingLearns: {"gradients"},
    OnlyItsOwn: {"gradients"},
    Unused: {"gradients"},
    EditsLogits: {"neighbours"},
    EditsLogprobs: {"neighbours"},
    EditsStates: {"neighbours", "derivative"},
    MeanOfChunk: {"chunks", "split", "counts", "weights"},
    MeanOfTokens: {"empty", "split", "counts", "weights"},
    MeanOfBatch: {"split", "counts", "weights"},
    DividesTwice: {"counts", "weights"},
    PerSequence: {"counts"},
    MeanPerToken: {"counts"},
    SeesPadding: {"padding", "weights"},
    Normalised: {"split", "counts", "weights"},
    ByPlace: {"order", "split", "weights"},
    SaysCoupled: {"coupling"},
    HandsBackASum: {"weights"},
    PacksInSilence: {"weights"},
    LeavesOutTokens: {"weights"},
    NoDivergence: {"divergence"},
    NotANumberAtEquality: {"divergence"},
    WrongGradient: {"derivative"},
    HalfPrecision: {"bf16", "weights"},
    Forgets: {"state"},
    ForgetsAfterSteps: {"state"},
    MovesWithinSteps: {"state"},
    OnTheFirstRank: {"ranks"},
    OftenOnTheFirstRank: {"ranks"},
}
"""Every broken loss, and the checks that it cannot pass."""

FOUND_WEIGHTS = {
    NoSuchFact: {"declarations"},
    UndeclaredFact: {"declarations"},
    Trains: {"declarations"},
    OnePerSpan: {"tokenizers"},
    Negative: {"finite"},
    UnreadFact: {"needs"},
    UnreadColumn: {"needs"},
    NeedsTokens: {"empty"},
    ByWidth: {"padding"},
    AboveTheMean: {"split"},
    WeighsByPlace: {"split", "order"},
    ForgetsWeights: {"state"},
    MovesWeightsWithinSteps: {"state"},
    WeighsOnTheFirstRank: {"ranks"},
}
"""The same of token weights."""


@cache
def results(loss) -> dict[str, Result]:
    return {result.check: result for result in conformance(loss, ranks=False)}


def faults(loss) -> dict[str, str]:
    return {check: result.reason for check, result in results(loss).items() if result.status == "failed"}


@pytest.mark.slow
@pytest.mark.parametrize("loss", [loss for loss in FOUND if FOUND[loss] != {"ranks"}], ids=lambda loss: loss.name)
def test_each_broken_loss_is_caught_by_its_check_and_by_no_other(loss):
    assert faults(loss).keys() == FOUND[loss]


@pytest.mark.parametrize("weights", [w for w in FOUND_WEIGHTS if FOUND_WEIGHTS[w] != {"ranks"}], ids=lambda w: w.name)
def test_broken_token_weights_are_caught_by_their_check_and_by_no_other(weights):
    assert faults(weights).keys() == FOUND_WEIGHTS[weights]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "fault"),
    [
        (WeighsOnTheFirstRank, "two ranks of ZeRO-3 are not one process: the loss is "),
        (OnTheFirstRank, "two ranks of ZeRO-3 are not one process: the loss is "),
        (OftenOnTheFirstRank, "call every module equally often on each rank"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_only_several_ranks_show_is_caught_on_them(loss, fault):
    assert faults(loss) == {}
    *_, found = conformance(loss)
    assert found.check == "ranks" and found.status == "failed" and fault in found.reason


def test_every_check_has_a_loss_that_it_catches():
    assert set(FOUND) == set(BROKEN)
    assert set().union(*FOUND.values()) == {check.name for check in CHECKS} | {RANKS[0]}


def test_every_check_of_token_weights_has_some_that_it_catches():
    assert set(FOUND_WEIGHTS) == set(BROKEN_WEIGHTS)
    assert set().union(*FOUND_WEIGHTS.values()) == {check.name for check in CHECKS_OF_WEIGHTS} | {RANKS[0]}


@pytest.mark.parametrize(
    ("loss", "check", "advice"),
    [
        (NoFormula, "declarations", "the class has no 'formula'; give it a line of text"),
        (Undeclared, "declarations", "reads the site 'hidden.0' that its needs do not declare, did you mean 'hidden."),
        (Misspelt, "declarations", "sees a stream 'studnet' that 'streams' does not make, did you mean 'student'?"),
        (MisspeltEach, "needs", "the stream 'twice' is in no visit"),
        (Unread, "needs", "the student's site 'hidden.0' is declared and not read; take it out of 'needs'"),
        (NotAligned, "needs", "say 'aligned=True' in 'needs' (two tokenizers)"),
        (ColumnByColumn, "tokenizers", "mend it for two tokenizers, or say tokenizers='same' in 'needs'"),
        (SkipsEmpty, "empty", "run every module also on 0 tokens, never branch around one"),
        (BareParameter, "modules", "the parameter 'scale' is the loss's own"),
        (NotCalled, "modules", "the module 'project' is never called"),
        (OncePerSequence, "modules", "called 1 times on a rank without tokens and 4 times elsewhere"),
        (NothingLearns, "gradients", "no part of the student gets a gradient"),
        (EditsLogits, "neighbours", "the logits of 'teacher' in 'tokens' is changed in place"),
        (EditsLogprobs, "neighbours", "the log-probabilities of 'teacher' in 'tokens' is changed in place"),
        (EditsStates, "neighbours", "the teacher's site 'hidden.last' is changed in place"),
        (MeanOfChunk, "chunks", "return values of tokens, and name 'per'"),
        (DividesTwice, "counts", "where every sequence is there twice"),
        (PerSequence, "counts", "is divided by sequences, and grows with the length of responses"),
        (MeanPerToken, "counts", "is divided by tokens, and does not grow with the length of responses"),
        (HandsBackASum, "weights", "the term 'square' is a sum, whose tokens cannot be weighed"),
        (PacksInSilence, "weights", "the visit 'gold' sees packings that do not say which tokens they stand"),
        (LeavesOutTokens, "weights", "the term 'square' has 9 values, for 14 weights; hand back"),
        (DividesTwice, "weights", "a sequence whose tokens all weigh 0 is not as if it were not there"),
        (NotANumberAtEquality, "divergence", "the loss is nan where both models say the same"),
        (ForgetsAfterSteps, "state", "'after_step' changes 'mean', which no checkpoint keeps"),
        (MovesWithinSteps, "state", "the buffer 'seen' moves with every micro-batch; move it in 'after_step'"),
        (NoSuchFact, "declarations", "no fact of tokens is called 'student.entropie', did you mean 'student.entropy'?"),
        (UndeclaredFact, "declarations", "token weights read the fact 'teacher.entropy'; declare it in 'needs'"),
        (Trains, "declarations", "the parameter 'scale.weight' would never be trained; make it a buffer"),
        (OnePerSpan, "tokenizers", "the weights are [12], of 14 tokens; return one for each"),
        (UnreadColumn, "needs", "the column 'weight' is declared and not read"),
        (AboveTheMean, "split", "compare tokens by 'scores_of_step', or within a sequence"),
        (ForgetsWeights, "state", "'after_step' changes 'power', which no checkpoint keeps"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_failure_says_what_to_do(loss, check, advice):
    assert advice in faults(loss)[check]


@pytest.mark.parametrize(
    ("loss", "check"),
    [(Undeclared, "declarations"), (NotFinite, "finite")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_all_other_checks_would_repeat_is_told_once_and_they_are_skipped(loss, check):
    found = results(loss)
    names = list(found)
    after = names[names.index(check) + 1 :]
    assert {found[name].status for name in after} == {"skipped"}
    assert {found[name].reason for name in after} == {f"mend '{check}' first"}


def test_ranks_are_not_started_for_what_one_process_shows():
    *_, ranks = conformance(SkipsEmpty)
    assert (ranks.check, ranks.status, ranks.reason) == ("ranks", "skipped", "mend 'empty' first")


def test_an_exception_is_told_with_its_line():
    lines = Path(__file__).with_name("broken.py").read_text().splitlines()
    place = next(n for n, line in enumerate(lines, 1) if 'ops.forward_kl(p, q), per="pairs"' in line)
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
    assert out.count("\n  ok  ") == len(CHECKS) and "FAILED" not in out


def test_the_command_checks_every_loss_of_a_file_and_fails_if_one_does(capsys, tmp_path):
    file = tmp_path / "mine.py"
    broken = Path(__file__).with_name("broken.py").read_text()
    file.write_text(broken.replace("for loss in BROKEN:", "for loss in (Undeclared, SeesPadding):"))
    assert main(["check", str(file), "--no-ranks"]) == 1
    out = capsys.readouterr().out
    assert "undeclared\n" in out and "sees_padding\n" in out and out.count("FAILED") == 3
    assert out.count("\n  skipped  ") == out.count("\n           mend 'declarations' first\n") == len(CHECKS) - 1
    assert "\n           padding changes something: " in out


def test_the_command_checks_token_weights_by_name(capsys):
    assert main(["check", "entropy", "--set", "of=gap", "--no-ranks"]) == 0
    out = capsys.readouterr().out
    assert out.startswith('entropy with {"of": "gap"}\n')
    assert out.count("\n  ok  ") == len(CHECKS_OF_WEIGHTS) and "FAILED" not in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("entropi", "no such loss, did you mean 'entropy'?; give a loss of 'kdzoo list', or a plugin's file"),
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
        for name in ("input_ids", "attention_mask", "positions", "labels", "inputs", "sample", "span"):
            torch.testing.assert_close(getattr(other, name), getattr(side, name), msg=name)
    torch.testing.assert_close(again.pairs, batch.pairs)


def test_the_same_seed_is_the_same_world():
    subject = Subject.of(ForwardKL)
    worlds = [World(subject, True), World(subject, True)]
    first, second = (world.run([world.term()], world.batch()) for world in worlds)
    assert first.difference(second, tolerance=0.0) == ""


@pytest.mark.parametrize("same_tokens", [True, False], ids=["one tokenizer", "two tokenizers"])
def test_a_repeated_batch_keeps_each_tokens_text_pair_and_span(same_tokens):
    batch = World(Subject.of(CrossEntropy), same_tokens).batch()
    assert batch.student is not None and batch.teacher is not None
    for longer in (False, True):
        again, made = repeated(batch, 3, longer)
        assert again.counts == {per: n * (1 if longer and per == "sequences" else 3) for per, n in batch.counts.items()}
        for model, side, other in (
            ("student", batch.student, again.student),
            ("teacher", batch.teacher, again.teacher),
        ):
            assert other is not None and (other.positions[1:] > other.positions[:-1]).all()
            assert (other.sample[1:] >= other.sample[:-1]).all()
            torch.testing.assert_close(other.labels, side.labels[made[model].tokens])
            torch.testing.assert_close(made[model].positions[other.positions], side.positions[made[model].tokens])
            assert sorted(other.span.bincount()) == sorted(side.span.bincount().tile(3))
        first = torch.stack([made[m].tokens[again.pairs[:, n]] for n, m in enumerate(("student", "teacher"))], -1)
        assert {tuple(pair) for pair in first.tolist()} == {tuple(pair) for pair in batch.pairs.tolist()}
