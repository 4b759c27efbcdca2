"""The real pairs, put on recipes that were written for the lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdzoo.recipe.load import load_recipe
from kdzoo.recipe.model import Lora, Recipe, Template

RECIPES = Path(__file__).parents[2] / "recipes"
GEMMA = ("gemma_to_gpt2", "gemma_to_gemma")
PAPER = ("mixtral_to_gpt2", "mixtral_to_tinyllama", "mixtral_to_mistral", "llama2_to_tinyllama")


def on(pair: str, method: str = "residual") -> Recipe:
    return load_recipe(RECIPES / f"{method}.json", [RECIPES / "pairs" / f"{pair}.json"]).recipe


@pytest.mark.parametrize("method", ["residual", "dskd", "sft", "forward_kl"])
@pytest.mark.parametrize("pair", [*GEMMA, *PAPER])
def test_a_pair_leaves_nothing_of_the_lab(pair: str, method: str) -> None:
    recipe = on(pair, method)
    sources = [recipe.data.train, recipe.data.held_out, *recipe.evaluation.sets.values()]
    assert all(source is not None and source.lab is None and source.jsonl for source in sources)
    assert recipe.data.template == Template()
    assert "lab:" not in f"{recipe.student.tokenizer} {recipe.teacher.tokenizer}"
    assert "teacher" not in recipe.stages  # the teacher is trained already
    assert recipe.stages["distill"].steps is None
    projectors = recipe.stages["projectors"].params
    assert projectors.keys() == {"width", "rows", "init"} if pair in GEMMA else projectors == {"width": 64}


@pytest.mark.parametrize("pair", PAPER)
def test_the_papers_pairs_have_the_published_protocol(pair: str) -> None:
    recipe = on(pair)
    small = recipe.student.name == "openai-community/gpt2"
    distill, decoding = recipe.stages["distill"], recipe.evaluation.decoding
    assert (distill.lr, distill.epochs) == ((5e-4, 20) if small else (1e-3, 10))
    adapters = Lora(rank=256, alpha=8, dropout=0.1, targets=["q_proj", "v_proj"])
    assert recipe.student.lora == (None if small else adapters)
    assert (distill.batch, distill.warmup, distill.schedule, distill.weight_decay) == (32, 0, "cosine", 0.01)
    assert (recipe.stages["projectors"].epochs, recipe.stages["projectors"].weight_decay) == (10, 1e-4)
    assert (recipe.precision, recipe.data.max_length, recipe.data.max_prompt_length) == ("bf16", 512, 256)
    assert set(recipe.evaluation.sets) == {"dolly", "self_instruct", "vicuna", "sni", "unni_short"}
    assert list(decoding) == ["sample"]
    assert decoding["sample"].seeds == [10, 20, 30, 40, 50]
    assert decoding["sample"].no_repeat_ngram_size == 6


def test_a_gemma_students_positions_are_enough_for_its_answers() -> None:
    recipe = on("gemma_to_gpt2")
    assert recipe.student.config is not None
    longest = max(recipe.data.max_length, recipe.data.max_prompt_length + recipe.evaluation.max_new_tokens)
    assert longest <= recipe.student.config["n_positions"]
