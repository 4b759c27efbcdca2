"""A model's own answers: their tokens, their likelihood, and which of several is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdzoo.data.encode import Encoder
from kdzoo.data.rows import Row
from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.engine.frozen import FrozenModel
from kdzoo.evaluate.answers import Candidates, OwnAnswer, best, log_likelihoods, own_answers
from kdzoo.evaluate.generation import Continuation, continue_prompts
from kdzoo.plugin.registry import load_plugins
from kdzoo.recipe.model import Answers, Data, Decoding, Evaluation, Source, Template
from kdzoo.testing.tiny import save_tiny_model

ROWS = [Row(str(i), text, "", ("gold",)) for i, text in enumerate(["Add 3 and 4.", "Name it", "Say so", "And then?"])]
SAMPLED = Decoding(sample=True, seeds=[1, 2, 3])


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    data = Data(train=Source(), template=Template(prompt="Q: {instruction} A: "), max_prompt_length=20)
    return Encoder(load_tokenizer("lab:bytes"), data)


@pytest.fixture(scope="module")
def model(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrozenModel]:
    folder: Path = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "gpt2", len(encoder.tokenizer))
    config = {"zero_optimization": {"stage": 0}}
    yield FrozenModel(folder, load_plugins().model_adapters, "fp32", config, torch.device("cpu"))


def continuations(model: FrozenModel, encoder: Encoder, decoding: Decoding, seed: int) -> list[Continuation]:
    prompts = [f"Q: {row.instruction} A: " for row in ROWS]
    settings = {"max_new_tokens": 8, "max_prompt_length": 20, "batch": 3, "add_special_tokens": True}
    return continue_prompts(model.model, encoder.tokenizer, prompts, decoding, seed, **settings)


def by_hand(model: FrozenModel, found: Continuation) -> float:
    """One sequence, no padding, all logits at once, in float64 from there on."""
    ids = torch.tensor([[*found.prompt_ids, *found.ids]])
    with torch.no_grad():
        log_p = model.model(ids).logits[0].double().log_softmax(-1)
    start = len(found.prompt_ids) - 1
    return sum(float(log_p[start + i, token]) for i, token in enumerate(found.ids))


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(sample=True, temperature=0.5, top_p=0.9)])
@pytest.mark.parametrize("batch", [1, 3, 10])
def test_the_likelihood_is_that_of_the_models_own_tokens_at_temperature_1(model, encoder, decoding, batch):
    found = continuations(model, encoder, decoding, 1)
    sums = log_likelihoods(model, encoder.tokenizer.pad_token_id, found, batch, batches=-(-len(found) // batch) + 1)
    assert sums == pytest.approx([by_hand(model, one) for one in found], rel=1e-4)


def test_a_continuation_keeps_its_end_and_says_so(model, encoder):
    end = encoder.tokenizer.eos_token_id
    found = continuations(model, encoder, Decoding(), 0)
    for one in found:
        assert one.ended == (one.ids[-1] == end)
        assert end not in one.ids[:-1]
        assert one.ended or len(one.ids) == 8
        text = encoder.tokenizer.decode(one.ids[:-1] if one.ended else one.ids, clean_up_tokenization_spaces=False)
        assert one.text == text.strip()


def test_the_likeliest_of_all_seeds_is_the_answer(model, encoder):
    heard: list[int] = []
    answers = own_answers(model, encoder, ROWS, Candidates(SAMPLED, "sum_logprob", 8, 3), heard.append)
    assert heard == [3, 4, 7, 8, 11, 12]
    per_seed = [continuations(model, encoder, SAMPLED, seed) for seed in SAMPLED.seeds]
    for number, answer in enumerate(answers):
        candidates = [found[number] for found in per_seed]
        kept = max(candidates, key=lambda one: (bool(one.text), one.ended, by_hand(model, one)))
        assert (answer.ended, answer.tokens) == (kept.ended, len(kept.ids))
        assert answer.text == (kept.text if kept.ended else kept.text.rstrip("\ufffd").rstrip())
        assert answer.logprob == pytest.approx(by_hand(model, kept), rel=1e-4)


def answer(text: str, logprob: float, tokens: int = 2, ended: bool = True) -> OwnAnswer:
    return OwnAnswer(text, ended, tokens, logprob)


def test_sums_prefer_the_short_and_means_do_not():
    short, long = answer("short", -4.0, 2), answer("long", -5.0, 5)
    assert best([long, short], "sum_logprob") is short
    assert best([short, long], "mean_logprob") is long


def test_what_was_cut_or_is_empty_loses_to_any_other():
    cut, empty, whole = answer("cu", -1.0, ended=False), answer("", -0.1), answer("whole", -50.0)
    assert best([cut, empty, whole], "sum_logprob") is whole
    assert best([empty, cut], "mean_logprob") is cut
    assert best([empty], "sum_logprob") is empty


def test_the_first_of_equals_is_kept():
    first, second = answer("a", -1.0), answer("b", -1.0)
    assert best([first, second], "sum_logprob") is first


def test_a_character_that_the_cut_went_through_is_left_out(model, encoder, monkeypatch):
    tokens = encoder.tokenizer("ab é", add_special_tokens=False)["input_ids"][:-1]
    text = encoder.tokenizer.decode(tokens)
    assert text.endswith("\ufffd")
    found = [Continuation([1], tokens, text, ended=False), Continuation([1], tokens, text, ended=True)]
    monkeypatch.setattr("kdzoo.evaluate.answers.continue_prompts", lambda *_, **__: found)
    cut, ended = own_answers(model, encoder, ROWS[:2], Candidates(Decoding(), "sum_logprob", 8, 2), print)
    assert (cut.text, ended.text) == ("ab", text)  # what the model has ended is its answer as it stands


def test_what_a_stage_leaves_open_is_as_in_the_evaluation():
    evaluation = Evaluation(max_new_tokens=33, batch=5)
    assert Candidates.of(Answers(), evaluation) == Candidates(Decoding(), "sum_logprob", 33, 5)
    own = Candidates.of(Answers(max_new_tokens=7, batch=2, score="mean_logprob", decoding=SAMPLED), evaluation)
    assert (own.max_new_tokens, own.batch, own.score) == (7, 2, "mean_logprob")
    assert (own.seeds, Candidates.of(Answers(), evaluation).seeds) == ([1, 2, 3], [0])
