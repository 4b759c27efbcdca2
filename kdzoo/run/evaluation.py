"""`kdzoo eval`: any causal language model on any sets, by the protocol of this literature or by that of its own run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import ValidationError
from transformers import AutoConfig

from kdzoo.data.encode import Encoder
from kdzoo.data.lab import lab_splits
from kdzoo.data.rows import Row, load_rows
from kdzoo.data.sets import SETS
from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.engine import distributed
from kdzoo.engine.distributed import rank, rank_0_first, world
from kdzoo.engine.frozen import FrozenModel
from kdzoo.engine.loading import load_model
from kdzoo.errors import KdzooError, did_you_mean
from kdzoo.evaluate import ModelScores, Scores
from kdzoo.evaluate.generation import require_positions
from kdzoo.evaluate.scoring import Generate, Scored, own_generator, score_answers, score_model
from kdzoo.evaluate.vllm import VllmGenerator, require_vllm
from kdzoo.models.source import LocalModel, resolve_model
from kdzoo.plugin.registry import load_plugins
from kdzoo.recipe.model import Adapter, Data, Decoding, Evaluation, ModelSource, Recipe, Source, Template
from kdzoo.run.folder import RunFolder
from kdzoo.run.progress import print_scores, say
from kdzoo.run.session import rows_fingerprint
from kdzoo.run.sets import Score, Sets, score_sets

PROTOCOL = {
    "greedy": Decoding(),
    "sampling": Decoding(sample=True, seeds=[10, 20, 30, 40, 50], no_repeat_ngram_size=6),
}
"""Sampling is how this literature scores: temperature 1, top-p 1, five decoding seeds."""

PROMPT, ANSWER = 256, 256
"""Tokens: 512 in all."""

LAB = {split.removeprefix("eval_"): split for split in lab_splits()}
"""The lab's splits as its recipes call them: `seen`, `longer`, `phrasing`, ..."""


@dataclass(frozen=True)
class Asked:
    """What the user said, and no more: `None` and empty leave the run's own, else the protocol's."""

    model: str
    sets: tuple[str, ...] = ()
    decodings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    no_repeat_ngram_size: int | None = None
    max_prompt_length: int | None = None
    max_new_tokens: int | None = None
    limit: int | None = None
    batch: int | None = None
    precision: Literal["fp32", "bf16"] | None = None
    chat: bool | None = None
    plugins: tuple[Path, ...] = ()
    out: Path | None = None
    as_json: bool = False


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and how. `data` says how rows become prompts."""

    name: str
    """How the model is called in tables."""
    source: ModelSource
    precision: Literal["fp32", "bf16"]
    data: Data
    evaluation: Evaluation

    def told(self) -> dict[str, Any]:
        """All that the scores depend on but the weights."""
        return {
            "model": self.source.model_dump(mode="json", exclude_defaults=True),
            "precision": self.precision,
            "template": self.data.template.model_dump(mode="json"),
            "max_prompt_length": self.data.max_prompt_length,
            **self.evaluation.model_dump(mode="json", exclude={"sets"}),
            "sets": {
                name: source.model_dump(mode="json", exclude_defaults=True)
                for name, source in self.evaluation.sets.items()
            },
        }


def plan(asked: Asked) -> Plan:
    """Raises KdzooError: no such run, set or decoding."""
    folder = Path(asked.model)
    if (folder / "recipe.json").is_file():
        return _changed(_of_run(folder), asked, own=True)
    return _changed(_of_model(asked), asked, own=False)


def _of_run(folder: Path) -> Plan:
    """The exported student with all that its recipe says."""
    recipe = _recipe_of(folder / "recipe.json")
    student = RunFolder(folder).student
    if not student.is_dir():
        raise KdzooError(f"{folder}: the run has left no student; let it end, or name a model's folder")
    source = ModelSource(name=str(student))
    if recipe.student.lora is not None and recipe.student.lora.export == "adapter":
        if recipe.student.layers is not None:
            raise KdzooError(
                f"{folder}: its student is an adapter on blocks of a teacher that is not there any more; run it with "
                "student.lora.export=merged"
            )
        source = recipe.student.model_copy(update={"lora": None, "adapter": Adapter(name=str(student), merge=False)})
    return Plan("student", source, recipe.precision, recipe.data, recipe.evaluation)


def _recipe_of(file: Path) -> Recipe:
    try:
        return Recipe.model_validate_json(file.read_bytes())
    except OSError as error:
        raise KdzooError(f"{file}: cannot be read ({error.strerror}); name the run's 'student' folder") from error
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "the file"
        raise KdzooError(
            f"{file}: {at}: {first['msg'].lower()}, so it is no recipe of a run; name the run's 'student' folder"
        ) from error


def _of_model(asked: Asked) -> Plan:
    if not asked.sets:
        raise KdzooError(f"--on: name the sets that '{asked.model}' is evaluated on, such as {', '.join(SETS)}")
    data = Data(
        train=Source(),  # nothing is trained
        template=Template(),
        max_length=PROMPT + ANSWER,
        max_prompt_length=PROMPT,
    )
    evaluation = Evaluation(decoding=PROTOCOL, max_new_tokens=ANSWER)
    name = Path(asked.model).name or asked.model
    return Plan(name, ModelSource(name=asked.model), "fp32", data, evaluation)


def _changed(found: Plan, asked: Asked, own: bool) -> Plan:
    data, evaluation = found.data, found.evaluation
    if asked.max_prompt_length is not None:
        data = data.model_copy(update={"max_prompt_length": asked.max_prompt_length})
    if asked.chat is not None:
        data = data.model_copy(update={"template": data.template.model_copy(update={"chat": asked.chat})})
    new: dict[str, Any] = {
        "sets": _sets(asked, evaluation.sets),
        "decoding": _decodings(asked, evaluation.decoding if own else PROTOCOL),
    }
    if asked.max_new_tokens is not None:
        new["max_new_tokens"] = asked.max_new_tokens
    if asked.batch is not None:
        new["batch"] = asked.batch
    return replace(
        found,
        precision=asked.precision or found.precision,
        data=data,
        evaluation=evaluation.model_copy(update=new),
    )


def _sets(asked: Asked, own: Mapping[str, Source]) -> dict[str, Source]:
    found = {name: _set(name, own) for name in asked.sets} or dict(own)
    if not found:
        raise KdzooError(f"--on: the run has no evaluation sets of its own; name some, such as {', '.join(SETS)}")
    if asked.limit is None:
        return found
    return {name: source.model_copy(update={"limit": asked.limit}) for name, source in found.items()}


def _set(name: str, own: Mapping[str, Source]) -> Source:
    if name in own:
        return own[name]
    if name in SETS:
        return Source(set=name)
    if name in LAB or name in lab_splits():
        return Source(lab=LAB.get(name, name))
    if name.endswith(".jsonl"):
        return Source(jsonl=name)
    known = [*own, *SETS, *LAB]
    raise KdzooError(
        f"--on: '{name}' is no set{did_you_mean(name, known)}; known are {', '.join(dict.fromkeys(known))}, "
        "or a file that ends in .jsonl"
    )


def _decodings(asked: Asked, own: Mapping[str, Decoding]) -> dict[str, Decoding]:
    known = {**PROTOCOL, **own}
    for name in asked.decodings:
        if name not in known:
            raise KdzooError(f"--decoding: '{name}' is none of {', '.join(known)}{did_you_mean(name, known)}")
    found = {name: known[name] for name in asked.decodings} or dict(own)
    if asked.seeds:
        found = {n: d.model_copy(update={"seeds": list(asked.seeds)}) if d.sample else d for n, d in found.items()}
    if asked.no_repeat_ngram_size is not None:
        size = {"no_repeat_ngram_size": asked.no_repeat_ngram_size}
        found = {name: decoding.model_copy(update=size) for name, decoding in found.items()}
    return found


# The work


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
                planned.source, "student", teacher_folder=None, anatomies=registry.anatomies, address="model"
            )
        encoder, rows = _opened(planned, model)
        config: dict[str, Any] = {"zero_optimization": {"stage": 0}}
        family = AutoConfig.from_pretrained(model.folder).model_type
        evaluation = planned.evaluation
        if family in registry.anatomies:
            frozen = FrozenModel(
                model.folder, registry.anatomies, planned.precision, config, device, adapter=model.adapter
            )

            def score(name: str, rows: Sequence[Row], on_done: Callable[[int], None]) -> Scored:
                return score_model(frozen, encoder, rows, evaluation, f"--on {name}", on_done)

        else:
            say(f"no anatomy knows the family '{family}': cross-entropy is not read", enabled=rank() == 0)
            plain = load_model(model.folder, planned.precision, config, device).eval()
            generator = own_generator(plain, encoder, evaluation)

            score = partial(_answers_alone, generator, encoder, evaluation.decoding)

        _score_all(self.asked, planned, rows, folder, score)


def evaluate_with_vllm(asked: Asked, gpus: int) -> None:
    """In this process; vLLM starts its own."""
    planned, folder = plan(asked), _folder(asked)
    require_vllm(planned.evaluation.decoding)
    anatomies = load_plugins(asked.plugins).anatomies
    model = resolve_model(planned.source, "student", teacher_folder=None, anatomies=anatomies, address="model")
    if model.adapter is not None:
        raise KdzooError(f"--engine vllm: '{asked.model}' is an adapter; run it with student.lora.export=merged")
    encoder, rows = _opened(planned, model)
    generator = VllmGenerator(model.folder, encoder, planned.evaluation.max_new_tokens, planned.precision, gpus)
    say("vLLM generates: cross-entropy is not read")

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
        told = {**planned.told(), "data": {name: rows_fingerprint(found) for name, found in rows.items()}}
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
        say(f"answers: {asked.out}")
