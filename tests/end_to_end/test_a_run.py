"""A run as a user meets it: what stands on the screen and in its folder, what it finds in the cache, who may join."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from running import DECODINGS, TINY, Run, kdzoo, run
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

MODELS = ("teacher", "untrained student", "student, data alone", "student")
"""In the order of their scores, after the copy of the input."""

STEP = r"  loss \d+\.\d{3}  [\d,]+ rows/s(  \d+:\d\d left|  took \d+:\d\d)?"
SCREEN = (
    r"20 training rows; two tokenizers, \d+\.\d% of the student's response tokens lie in aligned spans "
    r"and \d+\.\d% in pairs \('by_bytes'; read by 'residual'\)",
    r"teacher: a mixture of 4 experts; 'dskd' reads its own state; 'residual' reads 'expert_attention'",
    rf"(teacher|sft|projectors|distill) +\d+/\d+{STEP}",
    r"teacher: wrong on \d+\.\d% of the response tokens of the training rows",
    r"projectors: on (training|held-out) rows [a-z_ ]+\d.*",
    r"evaluate (teacher|untrained student|student, data alone|student) +\d+/24(  \d+:\d\d left|  took \d+:\d\d)?",
    r"run folder: .+",
)
"""All that may stand on standard error, in whole lines."""

PLUGIN = '''
import kdzoo


class Sharpened(kdzoo.Loss):
    """The student's entropy."""

    name, paper, formula = "sharpened", "a test", "L = - sum q log q"

    @kdzoo.visit
    def tokens(self, student):
        log_q = student.logprobs()
        return kdzoo.Terms().add("entropy", -(log_q.exp() * log_q).sum(-1))


@kdzoo.hookimpl
def register_plugins(register):
    register(Sharpened)
'''

LISTENER = """
import kdzoo


@kdzoo.hookimpl
def step_logged(step, metrics, folder):
    with (folder / "heard.txt").open("a") as file:
        print(step, metrics["loss"], file=file)
"""


@pytest.fixture(scope="module")
def second(first: Run, warm: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDZOO_CACHE", str(warm))
        return run(first.folder.with_name("second"), "--set", f"evaluation.decoding={DECODINGS}")


def test_the_screen_shows_stages_and_scores_and_nothing_else(first: Run) -> None:
    lines = first.screen.splitlines()
    assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in SCREEN)] == []
    assert lines[-1] == f"run folder: {first.folder}"
    for stage, steps in {"teacher": 6, "sft": 6, "projectors": 5, "distill": 20}.items():
        assert any(line.startswith(f"{stage} ") and f"{steps}/{steps}" in line for line in lines)
    starts = ("train", "held out", "seen", "cross-", "entropy", "teacher", "Rouge-L", "copy", "greedy", "sampled")
    starts += ("token", "accuracy", "±")
    for line in filter(str.strip, first.output.splitlines()):
        assert line.strip().startswith((*starts, *MODELS)), line


def test_the_folder_holds_what_the_readme_says(first: Run) -> None:
    names = {path.name for path in first.folder.iterdir()}
    stages = {f"metrics-{stage}.jsonl" for stage in ("teacher", "sft", "projectors")}
    files = {"recipe.json", "environment.json", "metrics.jsonl", "scores.json"}
    assert names == files | stages | {"predictions", "student", "checkpoints"}
    assert (first.folder / "checkpoints" / "latest").read_text() == "step-20"
    assert any((first.folder / "checkpoints" / "step-20").iterdir())


def test_the_recipe_is_kept_as_it_was_resolved(first: Run) -> None:
    shown = kdzoo("show", str(TINY), "--set", f"evaluation.decoding={DECODINGS}")
    assert first.read("recipe.json") == json.loads(shown.output)
    assert first.read("recipe.json")["evaluation"]["decoding"]["sampled"]["seeds"] == [10, 20]


def test_the_environment_says_what_the_numbers_may_depend_on(first: Run) -> None:
    found = first.read("environment.json")
    keys = ("started", "command", "python", "platform", "packages", "plugins", "git", "device", "ranks")
    assert set(keys) <= found.keys()
    assert found["ranks"] == 1
    assert found["packages"]["torch"] == torch.__version__
    assert found["command"][1] == "run"
    assert {"data.train", "data.held_out", "evaluation.sets.seen"} <= found["data"].keys()


def test_every_step_is_logged_with_every_term(first: Run) -> None:
    steps = first.lines()
    assert [step["step"] for step in steps] == list(range(1, 21))
    wanted = {"loss", "gradient_norm", "lr", "rows", "rows_per_second", "memory_gb"}
    wanted |= {"sft/cross_entropy", "dskd/t2s_ce", "dskd/t2s_kd", "dskd/s2t_kd"}
    wanted |= {"residual/right_rows", "residual/wrong_rows", "sft/token_accuracy"}
    for step in steps:
        assert wanted <= step.keys()
        assert all(isinstance(value, int | float) for value in step.values()), step
    for stage, count in {"teacher": 6, "sft": 6, "projectors": 5}.items():
        assert [step["step"] for step in first.lines(f"metrics-{stage}.jsonl")] == list(range(1, count + 1))


def test_the_loss_is_the_weighted_sum_of_its_terms(first: Run) -> None:
    terms = ("sft/cross_entropy", "dskd/t2s_ce", "dskd/t2s_kd", "dskd/s2t_kd")
    for step in first.lines():
        total = sum(step[term] for term in (*terms, "residual/right_rows", "residual/wrong_rows"))
        assert step["loss"] == pytest.approx(0.5 * total, rel=1e-5)


def test_every_model_has_scores_and_its_answers(first: Run) -> None:
    scores = first.read("scores.json")
    assert list(scores) == ["train", "held out", "seen"]
    assert list(scores["train"]) == ["teacher"]
    assert list(scores["held out"]) == ["student, data alone", "student"]
    for found in scores["held out"].values():
        apart = found["by_verdict"]
        parts = (1 - apart["wrong_share"]) * apart["right"] + apart["wrong_share"] * apart["wrong"]
        assert parts == pytest.approx(found["cross_entropy"])
    assert list(scores["seen"]) == ["copy of the input", *MODELS]
    for model in MODELS:
        found = scores["seen"][model]
        assert list(found["rouge_l"]) == ["greedy", "sampled"]
        assert [len(found["rouge_l"][decoding]["per_seed"]) for decoding in ("greedy", "sampled")] == [1, 2]
        assert found["cross_entropy"] > 0
        assert 0 <= found["token_accuracy"] <= 1
        for decoding, seeds in {"greedy": [None], "sampled": [10, 20]}.items():
            name = f"seen.{model.replace(',', '%2C')}.{decoding}.jsonl"
            answers = first.lines(f"predictions/{name}")
            assert [answer["seed"] for answer in answers] == [seed for seed in seeds for _ in range(8)]
            mean = sum(answer["rouge_l"] for answer in answers) / len(answers)
            assert mean == pytest.approx(found["rouge_l"][decoding]["mean"], abs=1e-9)
    assert len(list((first.folder / "predictions").iterdir())) == 1 + 2 * len(MODELS)


def test_training_lowers_the_cross_entropy_on_rows_that_nobody_trained_on(first: Run) -> None:
    seen = first.read("scores.json")["seen"]
    assert seen["student"]["cross_entropy"] < seen["untrained student"]["cross_entropy"] - 0.1


def test_the_student_is_a_folder_that_transformers_loads(first: Run) -> None:
    folder = first.folder / "student"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answer = first.lines("predictions/seen.student.greedy.jsonl")[0]
    prompt = tokenizer(answer["prompt"], return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text = tokenizer.decode(new[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == answer["prediction"]


def test_the_model_card_names_methods_papers_and_scores(first: Run) -> None:
    card = (first.folder / "student" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for text in ("# tiny", "`dskd`", "EMNLP 2024", "`residual`", "ICLR 2026", "mixtral with random weights"):
        assert text in card
    value = first.read("scores.json")["seen"]["student"]["cross_entropy"]
    assert f"{value:.3f}" in card


def test_a_second_run_finds_in_the_cache_what_does_not_depend_on_it(first: Run, second: Run) -> None:
    for stage in ("teacher", "sft"):
        assert f"{stage}: trained before, found in the cache" in second.screen
    assert second.screen.count("(cached)") == 2  # the projectors' report, on training and on held-out rows
    evaluated = [line for line in second.screen.splitlines() if line.startswith("evaluate ")]
    assert evaluated and all(line.startswith("evaluate student  ") for line in evaluated)
    assert not list(second.folder.glob("metrics-*.jsonl"))


def test_a_second_run_gives_the_same_numbers(first: Run, second: Run) -> None:
    measured = {"rows_per_second", "memory_gb"}
    for ours, theirs in zip(first.lines(), second.lines(), strict=True):
        assert {k: v for k, v in ours.items() if k not in measured} == {
            k: v for k, v in theirs.items() if k not in measured
        }
    assert first.read("scores.json") == second.read("scores.json")
    for path in (first.folder / "predictions").iterdir():
        assert path.read_text() == (second.folder / "predictions" / path.name).read_text()


def test_loose_plugins_train_and_hear_of_every_step(warm_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "sharpened.py").write_text(PLUGIN)
    (tmp_path / "listener.py").write_text(LISTENER)
    recipe = tmp_path / "loose.json"
    patch = {"extends": str(TINY), "plugins": ["listener.py"], "losses": {"dskd": None, "residual": None}}
    recipe.write_text(json.dumps(patch | {"evaluation": {"sets": None}}))
    flags = ("--plugin", str(tmp_path / "sharpened.py"), "--set", "losses.sharp.use=sharpened")
    done = run(tmp_path / "run", *flags, "--set", "stages.distill.steps=4", recipe=recipe)
    steps = done.lines()
    for step in steps:
        assert step["loss"] == pytest.approx(0.5 * step["sft/cross_entropy"] + step["sharp/entropy"], rel=1e-5)
    assert steps[-1]["sharp/entropy"] < steps[0]["sharp/entropy"]
    heard = [line.split() for line in (done.folder / "heard.txt").read_text().splitlines()]
    assert [int(step) for step, _ in heard][-4:] == [1, 2, 3, 4]
    assert [float(loss) for _, loss in heard][-4:] == [step["loss"] for step in steps]
