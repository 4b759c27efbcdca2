"""A run whose student learns the teacher's own answers: however it is split, from the model or from the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import TINY, Run, run, run_on_two_ranks, sets

from kdzoo.data.mixing import row_order

pytestmark = pytest.mark.slow

LOSSES = 'losses={"sft": null, "dskd": null, "seq_kd": {"use": "seq_kd"}, "residual": {"weight": 0.5}}'
SAMPLED = '{"sample": true, "temperature": 0.5, "seeds": [1, 2, 3]}'
FLAGS = {
    "greedy": ("stages.answers.share=1.0",),
    "best of 3": ("stages.answers.share=0.5", f"stages.answers.decoding={SAMPLED}", "stages.answers.seed=3"),
}
SHORT = (LOSSES, "stages.distill.steps=6", "evaluation.sets=null")


def emptied(warm: Path, place: Path) -> Path:
    """The cache with teacher, student and projectors, without answers."""
    return Path(shutil.copytree(warm, place, ignore=shutil.ignore_patterns("answers")))


@pytest.fixture(scope="module")
def own_cache(first: Run, warm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emptied(warm, tmp_path_factory.mktemp("answers") / "cache")


@pytest.fixture(scope="module")
def one_rank(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("one-rank")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDZOO_CACHE", str(own_cache))
        return {name: run(folder / name, *sets(*SHORT, *flags)) for name, flags in FLAGS.items()}


@pytest.fixture(scope="module")
def two_ranks(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("two-ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDZOO_CACHE", str(emptied(own_cache, folder / "cache")))
        commands = {folder / name: [str(TINY), *sets(*SHORT, *flags)] for name, flags in FLAGS.items()}
        return run_on_two_ranks(folder, commands)


@pytest.mark.parametrize("name", FLAGS)
def test_two_ranks_give_the_answers_and_losses_of_one(
    one_rank: dict[str, Run], two_ranks: dict[str, Run], name: str
) -> None:
    one, two = one_rank[name], two_ranks[name]
    assert two.read("environment.json")["ranks"] == 2
    for ours, theirs in zip(one.lines("answers.jsonl"), two.lines("answers.jsonl"), strict=True):
        assert theirs == ours | {"logprob": pytest.approx(ours["logprob"], rel=1e-4)}
    for ours, theirs in zip(one.lines(), two.lines(), strict=True):
        for key in ("loss", "seq_kd/seq_kd", "residual/wrong_rows"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4), f"{key} at step {ours['step']}"


def test_the_rows_of_the_share_have_the_answers(one_rank: dict[str, Run]) -> None:
    answers = one_rank["best of 3"].lines("answers.jsonl")
    assert [answer["id"] for answer in answers] == [f"train-{row}" for row in sorted(row_order(20, seed=3)[:10])]
    assert all(answer["tokens"] <= 16 and answer["logprob"] < 0 for answer in answers)
    (logged,) = one_rank["best of 3"].lines("metrics-answers.jsonl")
    assert logged["share"] == pytest.approx(sum(bool(answer["text"]) for answer in answers) / 20)
    assert logged["tokens"] == pytest.approx(sum(answer["tokens"] for answer in answers) / 10)
    card = (one_rank["best of 3"].folder / "student" / "README.md").read_text()
    assert "rows of 'train'; 10 of them with the teacher's own answer as the response" in card


def test_the_screen_tells_what_the_rows_have_become(one_rank: dict[str, Run]) -> None:
    screen = one_rank["greedy"].screen
    assert "answers: 20 of 20 rows have the teacher's answer as their response" in screen
    assert screen.count("with the teacher's answers: 20 training rows; two tokenizers, ") == 1
    assert screen.count("teacher: wrong on ") == 1


def test_answers_are_found_in_the_cache_and_change_nothing(
    one_rank: dict[str, Run], own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDZOO_CACHE", str(own_cache))
    before = sorted((own_cache / "answers").iterdir())
    again = run(tmp_path / "again", *sets(*SHORT, *FLAGS["greedy"]))
    assert "answers: made before, found in the cache (1 of 1 part)" in again.screen
    assert sorted((own_cache / "answers").iterdir()) == before
    assert again.lines("answers.jsonl") == one_rank["greedy"].lines("answers.jsonl")
    for ours, theirs in zip(one_rank["greedy"].lines(), again.lines(), strict=True):
        assert theirs["loss"] == ours["loss"]


def test_the_same_answers_are_learnt_by_cross_entropy(
    one_rank: dict[str, Run], own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method is in the rows."""
    monkeypatch.setenv("KDZOO_CACHE", str(own_cache))
    plain = run(tmp_path / "plain", *sets(*SHORT, *FLAGS["greedy"], "losses.seq_kd.use=cross_entropy"))
    for ours, theirs in zip(one_rank["greedy"].lines(), plain.lines(), strict=True):
        assert theirs["loss"] == ours["loss"]


def test_another_stage_learns_from_the_data_as_before(first: Run, own_cache: Path, one_rank: dict[str, Run]) -> None:
    """Stages that train before `distill`, and their cache entries, know nothing of answers."""
    assert not (one_rank["greedy"].folder / "metrics-sft.jsonl").exists()
    assert not (one_rank["greedy"].folder / "metrics-projectors.jsonl").exists()
