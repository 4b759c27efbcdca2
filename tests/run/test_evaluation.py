"""What `kdzoo eval` makes of what it was asked: a run brings its own protocol, another model gets the literature's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdzoo.data.encode import Encoder
from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.engine.loading import load_model
from kdzoo.errors import KdzooError, ModelError
from kdzoo.evaluate.generation import prompt_tokens
from kdzoo.evaluate.vllm import VllmGenerator, require_vllm
from kdzoo.recipe.model import Data, Decoding, Source
from kdzoo.run.evaluation_plan import Asked, plan
from kdzoo.testing.tiny import save_tiny_model

RECIPE: dict[str, Any] = {
    "title": "A run",
    "precision": "bf16",
    "student": {"config": {"model_type": "gpt2"}, "tokenizer": "lab:bytes"},
    "teacher": {"config": {"model_type": "gpt2"}, "tokenizer": "lab:bytes"},
    "data": {"train": {"lab": "train"}, "template": {"prompt": "{instruction}:"}, "max_prompt_length": 99},
    "losses": {"sft": {"use": "cross_entropy"}},
    "stages": {"distill": {"steps": 1}},
    "evaluation": {
        "sets": {"mine": {"lab": "eval_seen", "limit": 7}},
        "decoding": {"drawn": {"sample": True, "seeds": [1, 2]}},
        "max_new_tokens": 12,
    },
}


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "student").mkdir()
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    return tmp_path


def test_another_model_gets_the_protocol_of_the_literature():
    found = plan(Asked("a/model", ("dolly", "vicuna")))
    assert (found.name, found.source.name, found.precision) == ("model", "a/model", "fp32")
    assert found.data.max_prompt_length + found.evaluation.max_new_tokens == 512
    assert found.data.template.prompt.startswith("Below is an instruction")
    assert found.evaluation.sets == {"dolly": Source(set="dolly"), "vicuna": Source(set="vicuna")}
    greedy, sampling = found.evaluation.decoding["greedy"], found.evaluation.decoding["sampling"]
    assert (greedy.sample, greedy.no_repeat_ngram_size) == (False, 0)
    assert (sampling.temperature, sampling.top_p, sampling.no_repeat_ngram_size) == (1.0, 1.0, 6)
    assert sampling.seeds == [10, 20, 30, 40, 50]


def test_a_run_brings_its_own_protocol(run):
    found = plan(Asked(str(run)))
    assert (found.name, found.source.name, found.precision) == ("student", str(run / "student"), "bf16")
    assert (found.data.max_prompt_length, found.evaluation.max_new_tokens) == (99, 12)
    assert found.data.template.prompt == "{instruction}:"
    assert found.evaluation.sets == {"mine": Source(lab="eval_seen", limit=7)}
    assert list(found.evaluation.decoding) == ["drawn"]


def test_what_is_asked_goes_over_it(run):
    asked = Asked(
        str(run),
        ("mine", "longer", "sni", "other.jsonl"),
        ("greedy", "drawn"),
        seeds=(5,),
        no_repeat_ngram_size=3,
        max_prompt_length=50,
        max_new_tokens=10,
        limit=2,
        batch=4,
        precision="fp32",
        chat=True,
    )
    found = plan(asked)
    assert list(found.evaluation.sets.values()) == [
        Source(lab="eval_seen", limit=2),
        Source(lab="eval_longer", limit=2),
        Source(set="sni", limit=2),
        Source(jsonl="other.jsonl", limit=2),
    ]
    assert found.evaluation.decoding == {
        "greedy": Decoding(no_repeat_ngram_size=3),
        "drawn": Decoding(sample=True, seeds=[5], no_repeat_ngram_size=3),
    }
    assert (found.data.max_prompt_length, found.evaluation.max_new_tokens, found.evaluation.batch) == (50, 10, 4)
    assert found.data.template.chat and found.precision == "fp32"


def test_a_student_that_was_left_as_an_adapter_is_put_on_its_base(run):
    recipe = {**RECIPE, "student": {**RECIPE["student"], "lora": {"export": "adapter"}}}
    (run / "recipe.json").write_text(json.dumps(recipe))
    source = plan(Asked(str(run))).source
    assert source.config == {"model_type": "gpt2"} and source.lora is None
    assert source.adapter is not None and (source.adapter.name, source.adapter.merge) == (str(run / "student"), False)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"sets": ()}, r"^--on: name the sets that 'm' is evaluated on, such as dolly, "),
        ({"sets": ("doly",)}, r"^--on: 'doly' is no set, did you mean 'dolly'\?; known are dolly, .*\.jsonl$"),
        ({"sets": ("dolly",), "decodings": ("gredy",)}, r"^--decoding: 'gredy' is none of greedy, sampling, did you"),
    ],
)
def test_a_fault_is_a_line(asked, told):
    with pytest.raises(KdzooError, match=told):
        plan(Asked("m", **asked))


def test_a_run_without_a_student_says_so(run):
    (run / "student").rmdir()
    with pytest.raises(KdzooError, match="the run has left no student; let it end"):
        plan(Asked(str(run)))


class Llm:
    """A stub of vLLM that answers with the tokens of its prompt, and remembers what it was asked."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def generate(self, prompts: list[Any], sampling: list[Any], use_tqdm: bool) -> list[Any]:
        self.asked = prompts, sampling
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=prompt["prompt_token_ids"])]) for prompt in prompts]


@pytest.fixture
def vllm(monkeypatch):
    stub = SimpleNamespace(LLM=Llm, SamplingParams=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    return stub


def test_vllm_is_asked_for_what_our_own_generation_does(vllm, tmp_path):
    encoder = Encoder(load_tokenizer("lab:bytes"), Data(train=Source(), max_prompt_length=20))
    generator = VllmGenerator(tmp_path, encoder, 12, "bf16", gpus=2)
    assert generator.model.settings == {
        "model": str(tmp_path),
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "max_model_len": 32,
        "seed": 0,
        "disable_log_stats": True,
    }
    done: list[int] = []
    prompts = ["one word", "another " * 20]
    decoding = Decoding(sample=True, temperature=0.7, top_p=0.9)
    answers = generator(prompts, decoding, 10, done.append)
    asked, sampling = generator.model.asked
    assert [one["prompt_token_ids"] for one in asked] == prompt_tokens(encoder.tokenizer, prompts, 20, True)
    assert answers[0] == "one word" and done == [2]
    first, second = sampling
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (0.7, 0.9, 12)
    assert first["stop_token_ids"] == [encoder.tokenizer.eos_token_id] and first["ignore_eos"]
    assert first["seed"] != second["seed"]
    assert first["seed"] != generator.sampling(decoding, 20, prompts[0])["seed"]
    greedy = generator.sampling(Decoding(temperature=0.7), 0, prompts[0])
    assert (greedy["temperature"], greedy["top_p"], greedy["seed"]) == (0.0, 1.0, None)


def test_vllm_is_refused_what_it_would_do_otherwise(vllm, monkeypatch):
    require_vllm({"greedy": Decoding()})
    with pytest.raises(KdzooError, match=r"^--engine vllm: it cannot forbid repeated n-grams, and 'sampling' asks"):
        require_vllm({"sampling": Decoding(sample=True, no_repeat_ngram_size=6)})
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(KdzooError, match=r"the package is not there; pip install 'kdzoo\[vllm\]'"):
        require_vllm({"greedy": Decoding()})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "{}",
            r"^.*/recipe\.json: title: field required, so it is no recipe of a run; name the run's 'student' folder$",
        ),
        ("{", r"^.*/recipe\.json: the file: invalid json: .*, so it is no recipe of a run"),
    ],
)
def test_a_run_whose_recipe_cannot_be_read_is_one_line(run, content, told):
    (run / "recipe.json").write_text(content)
    with pytest.raises(KdzooError, match=told):
        plan(Asked(str(run)))


def test_weights_that_cannot_be_read_are_one_line(tmp_path):
    save_tiny_model(tmp_path, "gpt2", 20)
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(
        ModelError, match=r"^model .*: cannot be loaded \(.*header.*\); it must be a Hugging Face folder$"
    ):
        load_model(tmp_path, "fp32", None, torch.device("cpu"))
