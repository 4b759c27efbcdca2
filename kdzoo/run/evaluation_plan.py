"""What `kdzoo eval` evaluates and how, from what the user asked: settled before torch or a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from kdzoo.data.lab import lab_splits
from kdzoo.data.place import existing_file, hub_folder, local_folder
from kdzoo.data.sets import SETS, set_file
from kdzoo.errors import DataError, KdzooError, ModelError, did_you_mean
from kdzoo.recipe.model import Adapter, Data, Decoding, Evaluation, ModelSource, Recipe, Source, Template
from kdzoo.run.folder import RunFolder

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

    def conditions(self) -> dict[str, Any]:
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


def require_places(planned: Plan) -> None:
    """Raises KdzooError where the model or a set is nowhere: no such folder, file or name of the hub."""
    address, name = "MODEL_OR_RUN", planned.source.name
    if name is not None and local_folder(name, address, ModelError) is None:
        hub_folder(name, None, ("config.json", "adapter_config.json"), address, ModelError)
    for title, source in planned.evaluation.sets.items():
        if source.jsonl is not None:
            existing_file(source.jsonl, f"--on {title}", DataError)
        elif source.set is not None:
            set_file(source.set, f"--on {title}")


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
