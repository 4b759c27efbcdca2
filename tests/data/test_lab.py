"""The built-in lab: its rows are the same everywhere, its splits disjoint, its tokenizers two."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdzoo.data.lab import lab_rows, lab_splits, lab_tokenizer
from kdzoo.data.lab.rows import SPLITS
from kdzoo.data.lab.tasks import TASKS
from kdzoo.data.lab.words import SEEN, UNSEEN
from kdzoo.data.rows import load_rows
from kdzoo.errors import DataError, ModelError
from kdzoo.evaluate.scoring import copied_input
from kdzoo.recipe.load import load_recipe
from kdzoo.recipe.model import Source

RECIPES = Path(__file__).parents[2] / "recipes"
LAB_RECIPES = ["sft", "forward_kl", "dskd", "residual", "dskd_plus_residual"]


def question(row: dict[str, str]) -> tuple[str, str]:
    return row["instruction"], row["input"]


@pytest.fixture(params=["bytes", "words"])
def tokenizer(request):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(lab_tokenizer(request.param))


class TestRows:
    @pytest.mark.parametrize("split", lab_splits())
    def test_have_text_in_every_field_but_the_input(self, split):
        rows = lab_rows(split, 500)
        assert [row["id"] for row in rows] == [f"{split}-{index}" for index in range(len(rows))]
        assert {tuple(row) for row in rows} == {("id", "instruction", "input", "output")}
        for row in rows:
            assert row["instruction"] and 3 <= len(row["output"].split()) <= 25
            assert not set("[]{}|") & set("".join(row.values())), row
            assert all(text == " ".join(text.split()) for text in row.values()), row

    def test_are_these_and_no_others_on_every_machine(self):
        content = json.dumps([lab_rows(split, 300) for split in lab_splits()])
        assert hashlib.sha256(content.encode()).hexdigest()[:16] == "33e254af7f0d514f"

    def test_are_the_first_ones_where_limited(self):
        assert lab_rows("train", 7) == lab_rows("train")[:7]
        assert len(lab_rows("held_out", 10**6)) == SPLITS["held_out"].rows

    def test_of_different_splits_ask_different_questions(self):
        asked: dict[tuple[str, str], str] = {}
        for split in lab_splits():
            for row in lab_rows(split):
                assert asked.setdefault(question(row), split) == split, row

    def test_hold_enough_to_distil_from(self):
        assert len(lab_rows("train")) >= 2_000
        assert SPLITS["teacher"].rows >= 10 * SPLITS["train"].rows

    def test_show_every_task(self):
        assert len(TASKS) >= 12
        assert len({task.name for task in TASKS}) == len(TASKS)

    def test_answer_one_question_in_several_right_ways(self):
        for task in TASKS:
            assert len(task.questions) >= 3 and len(task.answers) >= 3 and task.new_questions

    def test_of_eval_longer_are_longer(self):
        def mean(split):
            return sum(len(" ".join(question(row))) for row in lab_rows(split, 300)) / 300

        assert mean("eval_longer") > 1.2 * mean("eval_seen")

    def test_of_eval_phrasing_use_words_and_phrasings_that_training_never_shows(self):
        new = {*UNSEEN.names, *UNSEEN.things, *UNSEEN.places}
        assert not new & {*SEEN.names, *SEEN.things, *SEEN.places}

        def words(split):
            text = " ".join(" ".join(row.values()) for row in lab_rows(split))
            return set("".join(letter if letter.isalpha() else " " for letter in text).split())

        assert not new & words("train")
        assert len(new & words("eval_phrasing")) > 0.5 * len(new)
        for task in TASKS:
            assert not set(task.questions) & set(task.new_questions)

    @pytest.mark.parametrize("split", ["eval_seen", "eval_longer", "eval_phrasing"])
    def test_are_not_answered_by_a_copy_of_the_input(self, split):
        rows = load_rows(Source(lab=split), "x")
        assert copied_input(rows, ["greedy"]).scores["rouge_l"]["greedy"]["mean"] < 18

    def test_of_an_unknown_split_are_refused_with_the_nearest_name(self):
        with pytest.raises(DataError, match=r"lab split 'trian'.*did you mean 'train'"):
            lab_rows("trian")


@pytest.mark.slow
class TestTokenizers:
    def test_give_every_lab_text_back(self, tokenizer):
        for split in lab_splits():
            for row in lab_rows(split, 100):
                whole = f"{row['instruction']}\nAnswer:\n{row['output']}"
                for text in (row["instruction"], row["input"], row["output"], whole):
                    assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_cover_the_text_with_their_offsets_without_a_gap(self, tokenizer):
        for row in lab_rows("eval_phrasing", 200):
            text = f"{row['instruction']}\nAnswer:\n{row['output']}"
            offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
            assert [start for start, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
            assert offsets[-1][1] == len(text)

    def test_end_but_do_not_begin_with_a_special_token(self, tokenizer):
        assert tokenizer.bos_token is None
        assert tokenizer.eos_token_id != tokenizer.pad_token_id
        assert not set(tokenizer("Sort the words.").input_ids) & set(tokenizer.all_special_ids)
        assert tokenizer.model_input_names == ["input_ids", "attention_mask"]

    def test_differ_in_vocabulary_and_in_sequences(self):
        from transformers import AutoTokenizer

        first, second = (AutoTokenizer.from_pretrained(lab_tokenizer(name)) for name in ("bytes", "words"))
        assert abs(len(first) - len(second)) > 100
        shared = set(first.get_vocab()) & set(second.get_vocab())
        assert len(shared) < 0.6 * min(len(first), len(second))
        answers = [row["output"] for row in lab_rows("train", 200)]
        differ = [len(first(text).input_ids) != len(second(text).input_ids) for text in answers]
        assert sum(differ) > 0.7 * len(answers)

    @pytest.mark.parametrize("name", ["bytes", "words"])
    def test_are_the_same_when_trained_again_elsewhere(self, name, tmp_path):
        here = lab_tokenizer(name)
        again = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from kdzoo.data.lab import lab_tokenizer; print(lab_tokenizer({name!r}))",
            ],
            env={**os.environ, "KDZOO_CACHE": str(tmp_path), "PYTHONHASHSEED": "7"},
            capture_output=True,
            text=True,
            check=True,
        )
        there = Path(again.stdout.split()[-1])
        assert there.name == here.name and there != here
        assert (there / "tokenizer.json").read_bytes() == (here / "tokenizer.json").read_bytes()

    def test_of_an_unknown_name_are_refused_with_the_nearest_name(self):
        with pytest.raises(ModelError, match=r"'lab:word'.*did you mean 'words'"):
            lab_tokenizer("word")


def test_the_lab_is_imported_without_torch():
    heavy = "{'torch', 'transformers', 'tokenizers'}"
    code = f"import sys, kdzoo.data.lab; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
class TestRecipes:
    @pytest.mark.parametrize("name", LAB_RECIPES)
    def test_run_on_the_lab_with_the_student_alone_beside_them(self, name):
        recipe = load_recipe(RECIPES / f"{name}.json").recipe
        assert recipe.data.train.lab == "train"
        sft, distill = recipe.stages["sft"], recipe.stages["distill"]
        assert (sft.steps, sft.batch, sft.lr, sft.warmup) == (
            distill.steps,
            distill.batch,
            distill.lr,
            distill.warmup,
        )
        assert recipe.deepspeed["zero_optimization"]["stage"] == 3

    @pytest.mark.parametrize("pair", ["lab_mixtral_to_gpt2", "lab_mixtral_to_llama", "lab_llama_to_llama"])
    def test_of_every_lab_pair_leave_room_for_every_row(self, pair):
        from transformers import AutoTokenizer

        recipe = load_recipe(RECIPES / "sft.json", on=[RECIPES / "pairs" / f"{pair}.json"]).recipe
        template, room = recipe.data.template, recipe.data.max_length
        for model in (recipe.teacher, recipe.student):
            assert model.tokenizer is not None
            tokenizer = AutoTokenizer.from_pretrained(lab_tokenizer(model.tokenizer.removeprefix("lab:")))
            for split in lab_splits():
                rows = lab_rows(split, 400)
                prompts = [
                    (template.prompt_with_input if row["input"] else template.prompt).format(**row) for row in rows
                ]
                asked = map(len, tokenizer(prompts).input_ids)
                answered = map(len, tokenizer([row["output"] for row in rows]).input_ids)
                for question, answer in zip(asked, answered, strict=True):
                    assert question <= recipe.data.max_prompt_length
                    assert question + answer + 1 <= room
                    assert answer + 1 <= recipe.evaluation.max_new_tokens
