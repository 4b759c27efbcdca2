"""`kdzoo eval`: any causal language model on any sets, by the protocol of this literature or by that of its own run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
from transformers import AutoConfig

from kdzoo.data.encode import Encoder
from kdzoo.data.rows import Row, load_rows
from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.engine import distributed
from kdzoo.engine.distributed import rank, rank_0_first, world
from kdzoo.engine.frozen import FrozenModel
from kdzoo.engine.loading import load_model
from kdzoo.errors import KdzooError
from kdzoo.evaluate import ModelScores, Scores
from kdzoo.evaluate.generation import require_positions
from kdzoo.evaluate.scoring import Generate, Scored, own_generator, score_answers, score_model
from kdzoo.evaluate.vllm import VllmGenerator, require_vllm
from kdzoo.models.source import LocalModel, resolve_model
from kdzoo.plugin.registry import load_plugins
from kdzoo.recipe.model import Decoding
from kdzoo.run import messages
from kdzoo.run.evaluation_plan import Asked, Plan, plan
from kdzoo.run.folder import RunFolder
from kdzoo.run.inputs import rows_fingerprint
from kdzoo.run.progress import print_message, print_scores
from kdzoo.run.sets import Score, Sets, score_sets


@dataclass(frozen=True)
class EvaluationTask:
    """On every rank: each answers its share of the prompts with the whole model."""

    asked: Asked

    def __call__(self) -> None:
        device = distributed.start()
        planned = plan(self.asked)
        folder = _folder(self.asked) if rank() == 0 else None
        registry = load_plugins(self.asked.plugins)
        with rank_0_first():
            model = resolve_model(
                planned.source, "student", teacher_folder=None, model_adapters=registry.model_adapters, address="model"
            )
        encoder, rows = _opened(planned, model)
        config: dict[str, Any] = {"zero_optimization": {"stage": 0}}
        family = AutoConfig.from_pretrained(model.folder).model_type
        evaluation = planned.evaluation
        if family in registry.model_adapters:
            frozen = FrozenModel(
                model.folder, registry.model_adapters, planned.precision, config, device, adapter=model.adapter
            )

            def score(name: str, rows: Sequence[Row], on_done: Callable[[int], None]) -> Scored:
                return score_model(frozen, encoder, rows, evaluation, f"--on {name}", on_done)

        else:
            print_message(messages.unknown_family(family), enabled=rank() == 0)
            plain = load_model(model.folder, planned.precision, config, device).eval()
            generator = own_generator(plain, encoder, evaluation)

            score = partial(_answers_alone, generator, encoder, evaluation.decoding)

        _score_all(self.asked, planned, rows, folder, score)


def evaluate_with_vllm(asked: Asked, gpus: int) -> None:
    """In this process; vLLM starts its own."""
    planned, folder = plan(asked), _folder(asked)
    require_vllm(planned.evaluation.decoding)
    model_adapters = load_plugins(asked.plugins).model_adapters
    model = resolve_model(
        planned.source, "student", teacher_folder=None, model_adapters=model_adapters, address="model"
    )
    if model.adapter is not None:
        raise KdzooError(f"--engine vllm: '{asked.model}' is an adapter; run it with student.lora.export=merged")
    encoder, rows = _opened(planned, model)
    generator = VllmGenerator(model.folder, encoder, planned.evaluation.max_new_tokens, planned.precision, gpus)
    print_message("vLLM generates: cross-entropy is not read")

    score = partial(_answers_alone, generator, encoder, planned.evaluation.decoding)
    _score_all(asked, planned, rows, folder, score)


def _folder(asked: Asked) -> RunFolder | None:
    """Before anything is loaded: hours must not end at a folder that is taken."""
    return None if asked.out is None else RunFolder.create("evaluation", asked.out)


def _opened(planned: Plan, model: LocalModel) -> tuple[Encoder, dict[str, list[Row]]]:
    """Tokenizer and rows; what cannot work is told before weights are loaded."""
    encoder = Encoder(load_tokenizer(model.tokenizer, "model"), planned.data)
    rows = {name: load_rows(source, f"--on {name}") for name, source in planned.evaluation.sets.items()}
    config = AutoConfig.from_pretrained(model.folder)
    require_positions(config, planned.data.max_prompt_length, planned.evaluation.max_new_tokens)
    return encoder, rows


def _answers_alone(
    generator: Generate,
    encoder: Encoder,
    decodings: Mapping[str, Decoding],
    _: str,
    rows: Sequence[Row],
    on_done: Callable[[int], None],
) -> Scored:
    rouge, answers = score_answers(generator, encoder, rows, decodings, on_done)
    return Scored(ModelScores(rouge_l=rouge, cross_entropy=None, token_accuracy=None), answers)


def _score_all(asked: Asked, planned: Plan, rows: Sets, folder: RunFolder | None, score: Score) -> None:
    scores: dict[str, dict[str, ModelScores]] = {}
    for name, scored in score_sets("evaluate", rows, planned.evaluation.decoding, score):
        scores[name] = {planned.name: scored.scores}
        if folder is not None:
            for decoding, answers in scored.answers.items():
                folder.write_predictions(name, planned.name, decoding, answers)
    if rank() == 0:
        told = {**planned.conditions(), "data": {name: rows_fingerprint(found) for name, found in rows.items()}}
        if folder is not None:
            folder.write_scores(scores)
            folder.write_environment({"ranks": world(), "evaluation": told})
        _print(asked, told, scores)


def _print(asked: Asked, told: Mapping[str, Any], scores: Scores) -> None:
    if asked.as_json:
        click.echo(json.dumps({"evaluation": told, "scores": scores}, indent=2, ensure_ascii=False))
        return
    print_scores(scores)
    if asked.out is not None:
        print_message(f"answers: {asked.out}")
