"""`kdzoo eval` on real ranks: the same answers whatever the batch and the number of ranks; unknown families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Done, kdzoo
from transformers import AutoConfig, AutoModelForCausalLM

from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.testing.tiny import save_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer("lab:bytes")
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "llama", len(tokenizer), max_position_embeddings=256)
    tokenizer.save_pretrained(folder)
    return folder


SHORT = ("--on", "seen,phrasing", "--limit", "7", "--max-prompt-length", "40", "--max-new-tokens", "12")


def evaluated(model: Path, *options: str) -> Done:
    return kdzoo("eval", str(model), *options)


def answers(model: Path, out: Path, *options: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Every file of predictions, and the scores."""
    done = evaluated(model, *SHORT, "--json", "--out", str(out), *options)
    assert done.code == 0, done.screen
    predictions = {file.name: file.read_text() for file in (out / "predictions").iterdir()}
    return predictions, json.loads((out / "scores.json").read_text())


def test_what_is_printed_is_what_is_kept(model: Path, tmp_path: Path) -> None:
    done = evaluated(model, *SHORT, "--json", "--out", str(tmp_path), "--ranks", "1", "--decoding", "sampling")
    printed = json.loads(done.output)
    assert printed["evaluation"]["decoding"]["sampling"]["seeds"] == [10, 20, 30, 40, 50]
    assert json.loads((tmp_path / "scores.json").read_text()) == printed["scores"]


def test_answers_do_not_depend_on_the_batch_or_the_number_of_ranks(model: Path, tmp_path: Path) -> None:
    """Seven rows: on two ranks one has fewer, and the last batch is not full."""
    first, scores = answers(model, tmp_path / "a", "--ranks", "1", "--batch", "1")
    assert len(first) == 4  # two sets, greedy and sampling
    assert sorted(text.count("\n") for text in first.values()) == [7, 7, 35, 35]
    for name, options in (("b", ("--ranks", "1", "--batch", "32")), ("c", ("--ranks", "2", "--batch", "3"))):
        found, again = answers(model, tmp_path / name, *options)
        assert found == first
        for set_name, models in scores.items():
            for model_name, expected in models.items():
                other = again[set_name][model_name]
                assert other["rouge_l"] == expected["rouge_l"]
                assert other["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-5)


def test_a_family_no_adapter_knows_is_scored_by_its_answers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("lab:bytes")
    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = evaluated(tmp_path, *SHORT, "--decoding", "greedy")
    assert done.code == 0, done.screen
    assert "no model adapter knows the family 'gpt_neox': cross-entropy is not read" in done.screen
    assert "greedy" in done.output and "cross-entropy" not in done.output


@pytest.mark.sweep
def test_a_fault_of_any_rank_is_one_line(model: Path) -> None:
    done = evaluated(model, "--on", "seen", "--max-new-tokens", "400", "--ranks", "2")
    assert done.code == 2
    assert done.screen.startswith("error: evaluation.max_new_tokens: 400 tokens after a prompt of 256 do not fit")
    assert "Traceback" not in done.screen


def test_a_fault_is_one_line(model: Path) -> None:
    done = evaluated(model, "--on", "seen", "--max-new-tokens", "400", "--ranks", "1")
    assert done.code == 2
    (line,) = done.screen.splitlines()
    assert line.startswith("error: evaluation.max_new_tokens: 400 tokens after a prompt of 256 do not fit")
