"""What a run prints, sentence by sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdzoo.run import messages


def test_one_tokenizer_needs_no_alignment():
    assert messages.one_tokenizer(20) == "20 training rows; teacher and student share one tokenizer"


@pytest.mark.parametrize(
    ("readers", "end"),
    [
        ([], "('by_bytes'; no loss reads them)"),
        (["alm"], "('by_bytes'; read by 'alm')"),
        (["alm", "dskd"], "('by_bytes'; read by 'alm', 'dskd')"),
    ],
)
def test_two_tokenizers_show_how_much_is_aligned_and_who_reads_it(readers, end):
    assert messages.two_tokenizers(7, 0.9876, 0.5, "by_bytes", readers) == (
        "7 training rows; two tokenizers, 98.8% of the student's response tokens lie in aligned spans and 50.0% in "
        f"pairs {end}"
    )


def test_padded_heads_show_three_sizes():
    assert messages.padded_heads(151936, 152064, 151646) == (
        "their heads are padded, the student's to 151,936 entries and the teacher's to 152,064; the 151,646 of the "
        "tokenizer are compared"
    )


@pytest.mark.parametrize(
    ("model", "same_text", "line"),
    [
        ("teacher", True, "entries: 41,950 of the teacher's 151,646 (27.7%) are in both vocabularies ('kd')"),
        (
            "student",
            False,
            "entries: 41,950 of the student's 151,646 (27.7%) have one that is near ('kd')",
        ),
    ],
)
def test_a_map_of_entries_shows_how_many_have_a_partner(model, same_text, line):
    assert messages.mapped_entries(model, 41950, 151646, same_text, ["kd"]) == line


def test_a_mixture_shows_which_state_each_loss_reads():
    assert messages.mixture(8, {"residual": "mean", "kd": None}) == (
        "teacher: a mixture of 8 experts; 'residual' reads 'mean'; 'kd' reads its own state"
    )
    assert messages.mixture(8, {}) == "teacher: a mixture of 8 experts"
    assert messages.nothing_to_fuse("all") == ("fuse.all: the teacher is no mixture of experts; its own state is read")


def test_the_teachers_errors_are_a_share():
    assert messages.teacher_accuracy(0.75) == "teacher: wrong on 25.0% of the response tokens of the training rows"


@pytest.mark.parametrize(
    ("split", "cached", "text"),
    [
        ("train", False, "projectors: on training rows cross entropy 1.500, accuracy 0.250"),
        ("held_out", True, "projectors: on held-out rows cross entropy 1.500, accuracy 0.250 (cached)"),
    ],
)
def test_an_artifact_is_reported_by_its_terms(split, cached, text):
    values = {"projectors/cross_entropy": 1.5, "projectors/accuracy": 0.25}
    assert messages.artifact_report("projectors", split, values, cached) == text


def test_places_are_named():
    assert messages.found_in_cache("sft", Path("a/b")) == "sft: trained before, found in the cache (a/b)"
    assert messages.run_folder(Path("runs/x")) == "run folder: runs/x"


def test_an_error_is_one_line_whatever_its_text():
    assert messages.first_line(ValueError("\n no login\nmany lines more")) == "ValueError: no login"
    assert messages.first_line(ValueError()) == "ValueError: "
    assert messages.tracker_disabled("wandb", OSError("no route")) == (
        "warning: the tracker 'wandb' failed and was disabled for this run (OSError: no route)"
    )


def test_answers_are_told_in_lines_that_fit_a_screen():
    metrics = {"tokens": 61.26, "cut": 0.333, "empty": 0.012, "logprob_per_answer": -123.456, "logprob_per_token": -2}
    lines = list(messages.answers(12345, 6000, metrics, 256))
    assert lines == [
        "answers: 6,000 of 12,345 rows have the teacher's answer as their response",
        "answers: 61.3 tokens and a log-likelihood of -123.46 per answer, -2.000 per token",
        "answers: 33.3% cut after 256 tokens; no end is taught there",
        "answers: 1.2% empty; these rows keep the data's response",
    ]
    assert len(list(messages.answers(2, 2, metrics | {"cut": 0, "empty": 0}, 64))) == 2
    assert messages.answers_in_cache(1, 1) == "answers: made before, found in the cache (1 of 1 part)"


def test_the_card_says_how_many_responses_are_the_teachers():
    assert messages.trained_on(20, "train", 0) == "20 rows of 'train'"
    assert messages.trained_on(20, "train", 5) == (
        "20 rows of 'train'; 5 of them with the teacher's own answer as the response"
    )
    assert messages.with_answers("all") == "with the teacher's answers: all"
