from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from kdzoo.evaluate import ModelScores
from kdzoo.recipe.model import Lora, Ramp
from kdzoo.run.card import CardLoss, write_model_card

LOSSES = [
    CardLoss("sft", "next_token", "Standard training.", "-log q(y)", 0.5),
    CardLoss(
        "kd",
        "forward_kl",
        "A Paper, 2015, https://example.org/paper",
        "KL(p || q)",
        Ramp(start=0.1, end=0.5, steps=100),
    ),
]


def scores(mean: float) -> ModelScores:
    rouge = {"greedy": {"mean": mean, "per_seed": [mean]}}
    return ModelScores(rouge_l=rouge, cross_entropy=1.5, token_accuracy=None)


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    path = write_model_card(
        tmp_path,
        "A title: with a colon",
        "a GPT-2 with random weights",
        LOSSES,
        "recipes/one.json",
        {"held|out": {"teacher": scores(41.2), "student": scores(23.34)}},
        teacher="the lab teacher",
        data="lab 'train', 200 rows",
        base_model="openai-community/gpt2",
    )
    assert path == tmp_path / "README.md"
    return ModelCard.load(path)


def test_the_hub_reads_the_front_matter(card):
    assert card.data.to_dict() == {
        "base_model": "openai-community/gpt2",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "kdzoo"],
    }


@pytest.mark.parametrize(
    ("export", "library", "kept"),
    [("merged", "transformers", "merged into the weights"), ("adapter", "peft", "this folder holds nothing else")],
)
def test_lora_is_said_and_how_the_folder_loads(tmp_path: Path, export: str, library: str, kept: str) -> None:
    lora = Lora.model_validate({"rank": 256, "alpha": 8, "dropout": 0.1, "targets": ["q_proj"], "export": export})
    card = ModelCard.load(write_model_card(tmp_path, "A title", "a GPT-2", LOSSES, "one.json", {}, lora=lora))
    assert card.data.library_name == library
    assert f"- Trained: LoRA, rank 256, alpha 8, dropout 0.1, on `q_proj`; {kept}\n" in card.text
    assert f"from {library} import Auto" in card.text


def test_every_method_is_named_with_its_weight_formula_and_paper(card):
    assert "- **sft** (`next_token`, weight 0.5): `-log q(y)`\n  Standard training." in card.text
    assert "- **kd** (`forward_kl`, weight 0.1 to 0.5 over 100 steps): `KL(p || q)`" in card.text
    assert "https://example.org/paper" in card.text


def test_it_says_from_what_it_was_made(card):
    assert card.text.strip().startswith("# A title: with a colon\n")
    for line in (
        "- Student: a GPT-2 with random weights",
        "- Teacher: the lab teacher",
        "- Data: lab 'train', 200 rows",
        "- Recipe: `recipes/one.json`",
    ):
        assert line in card.text


def test_scores_are_a_markdown_table_per_set_with_a_legend(card):
    assert (
        "### held|out\n\n"
        "| model | Rouge-L greedy | cross-entropy |\n"
        "| --- | ---: | ---: |\n"
        "| teacher | 41.20 | 1.500 |\n"
        "| student | 23.34 | 1.500 |\n\n"
        "- Rouge-L: 0 to 100, higher is better.\n"
    ) in card.text


def test_a_bar_in_a_name_does_not_break_the_table(tmp_path):
    path = write_model_card(tmp_path, "t", "b", [], "r", {"s": {"a|b": scores(1.0)}})
    assert "| a\\|b | 1.00 | 1.500 |" in path.read_text("utf-8")


def test_what_is_not_known_is_left_out(tmp_path):
    text = write_model_card(tmp_path, "t", "b", LOSSES, "r", {}).read_text("utf-8")
    assert "base_model" not in text
    assert "Teacher" not in text
    assert "## Scores" not in text
    assert "None" not in text
