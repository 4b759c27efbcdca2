"""The evaluation sets of this literature by name, as files of one folder or from the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kdzoo.data.place import one_line
from kdzoo.errors import DataError, did_you_mean
from kdzoo.quiet import quiet_hub

VARIABLE = "KDZOO_DATA"


@dataclass(frozen=True)
class NamedSet:
    """`file` is under $KDZOO_DATA; on the hub it is `hub_file` of the data set `hub`, where there is one."""

    title: str
    file: str
    hub: str | None = None
    hub_file: str = "valid.jsonl"


SETS = {
    "dolly": NamedSet("Dolly", "dolly/test.jsonl", "MiniLLM/dolly"),
    "self_instruct": NamedSet("SelfInst", "self_instruct/test.jsonl", "MiniLLM/self-inst"),
    "vicuna": NamedSet("VicunaEval", "vicuna/test.jsonl", "MiniLLM/Vicuna"),
    # Of both, what this literature scores: responses of eleven words and more.
    "sni": NamedSet("Super-Natural Instructions", "sni/test.jsonl", "MiniLLM/sinst", "11_/valid.jsonl"),
    "unni": NamedSet("Unnatural Instructions", "unni/test.jsonl", "MiniLLM/uinst", "11_/valid.jsonl"),
    "unni_short": NamedSet("Unnatural Instructions with answers of a word or two", "unni_short/test.jsonl"),
}


def set_file(name: str, address: str) -> Path:
    """The JSONL file of a set: that of $KDZOO_DATA where it is there, else the hub's. Raises DataError."""
    if name not in SETS:
        raise DataError(
            f"{address}: unknown evaluation set '{name}'{did_you_mean(name, SETS)}; known are {', '.join(SETS)}"
        )
    known = SETS[name]
    place = os.environ.get(VARIABLE)
    own = None if place is None else Path(place).expanduser() / known.file
    if own is not None and own.is_file():
        return own
    missing = f"${VARIABLE} is not set" if own is None else f"'{own}' does not exist"
    if known.hub is None:
        raise DataError(f"{address}: {missing}, and '{name}' is not on the hub; save it as ${VARIABLE}/{known.file}")
    from huggingface_hub import hf_hub_download

    try:
        with quiet_hub():
            return Path(hf_hub_download(known.hub, known.hub_file, repo_type="dataset"))
    except Exception as error:  # the hub's client raises a dozen kinds: network, access, names
        raise DataError(
            f"{address}: {missing}, and '{known.hub}' cannot be fetched from the hub ({one_line(error)}); save the "
            f"file as ${VARIABLE}/{known.file}, or check the network"
        ) from error
