"""Everything that is wrong with a merged recipe, one line each: `address: what; what to do (who set it)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from jsonschema import Draft202012Validator, ValidationError

from kdzoo.errors import did_you_mean
from kdzoo.plugin.json_schema import in_words, value_in_words
from kdzoo.recipe.merge import Address, Merged, in_text
from kdzoo.recipe.model import ROW_SOURCES

MODEL_SOURCES = ("name", "gguf_file", "gguf_package", "config", "layers")
COMPANIONS = {"revision": "name", "subset": "dataset", "split": "dataset"}
"""Keys that mean nothing without another."""

NAMED_STAGES = ("teacher", "sft", "answers", "distill")

DEEPSPEED_KEYS = (
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "hybrid_engine",
    "load_universal_checkpoint",
    "memory_breakdown",
    "monitor_config",
    "prescale_gradients",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "use_data_before_expert_parallel",
    "use_node_local_storage",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
"""The keys of DeepSpeed's configuration that a run of ours can use."""

OWNED_BY_THE_RECIPE = {
    "train_batch_size": "'stages.{stage}.batch'",
    "train_micro_batch_size_per_gpu": "'stages.{stage}.micro_batch'",
    "gradient_accumulation_steps": "'stages.{stage}.micro_batch', from which it follows",
    "managed_gradient_accumulation": "'stages.{stage}.micro_batch', from which accumulation follows",
    "elasticity": "'stages.{stage}.batch'",
    "gradient_clipping": "'stages.{stage}.clip'",
    "optimizer": "'stages.{stage}.lr', 'stages.{stage}.betas' and 'stages.{stage}.weight_decay'",
    "scheduler": "'stages.{stage}.schedule' and 'stages.{stage}.warmup'",
    "fp16": "'precision'",
    "bf16": "'precision'",
    "bfloat16": "'precision'",
    "amp": "'precision'",
    "torch_autocast": "'precision'",
}
"""Keys of DeepSpeed's configuration, and what to use instead."""


def faults(merged: Merged, schema: Mapping[str, Any]) -> list[str]:
    """All of them, sorted; none for a valid recipe. `schema` is the one for whole recipes."""
    errors = Draft202012Validator(schema).iter_errors(merged.document)
    lines = [line for error in errors for leaf in _leaves(error) for line in _schema_fault(merged, leaf)]
    checks: Sequence[Callable[[Merged], Iterator[str]]] = (_models, _rows, _stages, _answers, _losses, _deepspeed)
    lines += chain.from_iterable(check(merged) for check in checks)
    return sorted(set(lines))


def fault(merged: Merged, address: Address, text: str) -> str:
    """A line that ends in who set the value at this address."""
    origin = merged.origin(address)
    return f"{in_text(address) or 'recipe'}: {text}" + (f" (set by {origin.label})" if origin else "")


def _missing(merged: Merged, address: Address, advice: str = "") -> str:
    origin = merged.origins.get(address)
    return f"{in_text(address)}: missing key{advice}" + (f" (removed by {origin.label})" if origin else "")


# What the schema says


def _leaves(error: ValidationError) -> Iterator[ValidationError]:
    """An error of a union is those of the branch that the value's type fits, if there is one such branch.

    Where that branch is one word, the other branches belong into the message as well.
    """
    if error.validator not in ("anyOf", "oneOf"):
        yield error
        return
    branches: dict[Any, list[ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.relative_schema_path[0], []).append(inner)
    fitting = [
        branch
        for branch in branches.values()
        if not any(inner.validator == "type" and not inner.relative_path for inner in branch)
    ]
    if len(fitting) == 1 and not any(inner.validator == "const" and not inner.relative_path for inner in fitting[0]):
        yield from chain.from_iterable(map(_leaves, fitting[0]))
    else:
        yield error


def _schema_fault(merged: Merged, error: ValidationError) -> Iterator[str]:
    """One line, or one for each key where an object has unknown keys or lacks some."""
    address: Address = tuple(error.absolute_path)
    assert isinstance(error.schema, Mapping)
    match error.validator:
        case "additionalProperties":
            known = error.schema.get("properties", {})
            for key in error.instance.keys() - known.keys():
                hint = _hint(key, known, none="no key is allowed here")
                yield fault(merged, (*address, key), f"unknown key{hint}")
        case "required":
            for key in set(error.schema["required"]) - error.instance.keys():
                yield _missing(merged, (*address, key))
        case "enum" if address[-1:] == ("use",):
            hint = _hint(error.instance, error.schema["enum"], none="no plugin of this kind is installed")
            yield fault(merged, address, f"no plugin offers {value_in_words(error.instance)}{hint}")
        case "enum":
            words = [value for value in error.schema["enum"] if isinstance(value, str)]
            hint = did_you_mean(error.instance, words) if isinstance(error.instance, str) else ""
            yield fault(merged, address, f"{_is_not(error)}{hint}")
        case "minItems" if not error.instance and error.validator_value == 1:
            yield fault(merged, address, "is empty; give at least one")
        case "minItems" | "maxItems" | "minLength" | "maxLength":
            yield fault(merged, address, f"{_is_not(error)}; its length is {len(error.instance)}")
        case "type" | "anyOf" | "oneOf" | "const" | "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
            yield fault(merged, address, _is_not(error))
        case _:
            yield fault(merged, address, f"{value_in_words(error.instance)} does not fit; {error.message}")


def _is_not(error: ValidationError) -> str:
    assert isinstance(error.schema, Mapping)
    words = in_words(error.schema)
    article = "" if not words[0].isalpha() or words == "true or false" else "an " if words[0] in "aeiou" else "a "
    return f"{value_in_words(error.instance)} is not {article}{words}"


def _hint(word: Any, known: Sequence[str] | Mapping[str, Any], none: str = "") -> str:
    """The closest known word, or all of them; `none` where there are none."""
    if not known:
        return f"; {none}"
    return did_you_mean(str(word), known) or f"; known are {', '.join(map(repr, sorted(known)))}"


# What the schema cannot say in a readable way


def _models(merged: Merged) -> Iterator[str]:
    for role in ("student", "teacher"):
        for at, source in merged.objects(role):
            yield from _one_of(merged, at, source, MODEL_SOURCES)
            if role == "teacher":
                for key in ("layers", "gradient_checkpointing"):
                    if key in source:
                        yield fault(merged, (*at, key), "is allowed for the student only; remove it")
    yield from _adapters(merged)


def _adapters(merged: Merged) -> Iterator[str]:
    trained = bool(list(merged.objects("stages", "teacher")))
    cut = any(source.get("layers") is not None for _, source in merged.objects("student"))
    for at, lora in merged.objects("teacher", "lora"):
        if not trained:
            yield fault(merged, at, "no stage trains the teacher; add 'stages.teacher', or remove it")
        if "export" in lora:
            yield fault(merged, (*at, "export"), "is allowed for the student only; remove it")
    starts = {"student": ["a student"], "teacher": ["a teacher that is trained"] * trained + ["a student's cut"] * cut}
    for role, from_merged in starts.items():
        for at, adapter in merged.objects(role, "adapter"):
            if adapter.get("merge") is False and from_merged:
                yield fault(merged, (*at, "merge"), f"{from_merged[0]} starts from merged weights; remove it")


def _rows(merged: Merged) -> Iterator[str]:
    sources = (("data", "train"), ("data", "held_out"), ("stages", "*", "data"), ("evaluation", "sets", "*"))
    for at, source in chain.from_iterable(merged.objects(*pattern) for pattern in sources):
        yield from _one_of(merged, at, source, ROW_SOURCES)


def _stages(merged: Merged) -> Iterator[str]:
    if isinstance(merged.document.get("stages"), dict) and "distill" not in merged.document["stages"]:
        yield _missing(merged, ("stages", "distill"), "; every recipe has this stage")
    for at, stage in merged.objects("stages", "*"):
        if at[-1] == "answers":
            continue
        yield from _one_of(merged, at, stage, ("steps", "epochs"))
        name = str(at[-1])
        if name != "distill" and "checkpoint_every" in stage:
            yield fault(merged, (*at, "checkpoint_every"), "only the stage 'distill' writes checkpoints; remove it")
        if stage.get("balance") is not None and ("use" in stage or stage.get("gradients_every", 1) is None):
            why = (
                "a stage that makes an artifact trains one loss; remove it"
                if "use" in stage
                else "follows the gradients that 'gradients_every' measures; give a number there"
            )
            yield fault(merged, (*at, "balance"), why)
        losses = merged.document.get("losses") if at[-1] == "distill" else stage.get("losses")
        if stage.get("balance") is not None and isinstance(losses, dict) and len(losses) < 2:
            yield fault(
                merged, (*at, "balance"), "there is one loss, and nothing to balance; add another, or remove it"
            )
        if name not in NAMED_STAGES:
            if "use" not in stage:
                hint = did_you_mean(name, NAMED_STAGES) or "; name the loss whose module this stage trains"
                yield _missing(merged, (*at, "use"), hint)
            if "losses" in stage:
                yield fault(
                    merged, (*at, "losses"), "a stage that makes an artifact trains the loss in 'use'; remove it"
                )
            continue
        for key in ("use", "params"):
            if key in stage:
                yield fault(merged, (*at, key), "is allowed only in a stage that makes an artifact; remove it")
        if name == "distill" and "losses" in stage:
            yield fault(merged, (*at, "losses"), "this stage trains the recipe's 'losses'; move them there")
        if name != "distill" and not stage.get("losses"):
            yield _missing(merged, (*at, "losses"), "; name the losses of this stage")


def _answers(merged: Merged) -> Iterator[str]:
    """What counts only where several answers are drawn must not be set where one is."""
    for at, decoding in merged.objects("stages", "answers", "decoding"):
        if not decoding.get("sample"):
            for key in ("temperature", "top_p", "seeds"):
                if key in decoding:
                    yield fault(
                        merged, (*at, key), "greedy decoding does not read it; set 'sample' to true, or remove it"
                    )
    for at, stage in merged.objects("stages", "answers"):
        drawn = [decoding for _, decoding in merged.objects(*map(str, at), "decoding") if decoding.get("sample")]
        if "score" in stage and not any(len(decoding.get("seeds", ())) > 1 for decoding in drawn):
            advice = "let 'decoding' sample with several 'seeds', or remove it"
            yield fault(merged, (*at, "score"), f"there is one candidate, so that nothing is chosen; {advice}")


def _losses(merged: Merged) -> Iterator[str]:
    if merged.document.get("losses") == {}:
        yield fault(merged, ("losses",), "is empty; name at least one loss")
    for at, slot in merged.objects("stages", "*", "losses", "*"):
        if slot.get("fuse") is not None:
            yield fault(merged, (*at, "fuse"), "this stage has no teacher whose state a loss could read; remove it")
    of_recipe, of_stages = [*merged.objects("losses", "*")], [*merged.objects("stages", "*", "losses", "*")]
    named = {"fuse": ("fuse", of_recipe), "weights": ("token_weights", [*of_recipe, *of_stages])}
    for key, (section, slots) in named.items():
        known = [str(at[-1]) for at, _ in merged.objects(section, "*")]
        for at, slot in slots:
            name = slot.get(key)
            if isinstance(name, str) and name not in known:
                hint = _hint(name, known, none="it is empty")
                yield fault(merged, (*at, key), f"the recipe's '{section}' has no '{name}'{hint}")


def _deepspeed(merged: Merged) -> Iterator[str]:
    """DeepSpeed itself ignores a misspelt key of its first level without a word."""
    for at, settings in chain(merged.objects("deepspeed"), merged.objects("stages", "*", "deepspeed")):
        for key in settings.keys() - OWNED_BY_THE_RECIPE.keys() - set(DEEPSPEED_KEYS):
            yield fault(merged, (*at, key), f"is not a key of DeepSpeed's configuration{_hint(key, DEEPSPEED_KEYS)}")
        stage = at[1] if len(at) > 1 else "<stage>"
        for key in settings.keys() & OWNED_BY_THE_RECIPE.keys():
            instead = OWNED_BY_THE_RECIPE[key].format(stage=stage)
            yield fault(merged, (*at, key), f"is set by the recipe; use {instead}")


def _one_of(merged: Merged, at: Address, section: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    """Exactly one of these keys, and no key without the one that it goes with."""
    given = [key for key in keys if key in section]
    if not given:
        yield fault(merged, at, f"needs one of {', '.join(map(repr, keys))}")
    if len(given) > 1:
        setters = " and ".join(f"'{key}'" + _set_by(merged, (*at, key)) for key in given)
        yield f"{in_text(at)}: {setters} exclude each other; set all but one to null"
    for key, partner in COMPANIONS.items():
        if partner in keys and key in section and partner not in section:
            yield fault(merged, (*at, key), f"is allowed only together with '{partner}'; remove it")


def _set_by(merged: Merged, address: Address) -> str:
    origin = merged.origin(address)
    return f" (set by {origin.label})" if origin else ""
