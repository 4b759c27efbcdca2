"""`kdzoo` as these tests run it: in this process, and on ranks that work off several runs one after the other.

Importing torch and DeepSpeed takes longer than a tiny run: a process of its own is for what only that shows.
"""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from kdzoo.cli import main
from kdzoo.testing.ranks import on_ranks

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = Path(__file__).with_name("tiny.json")
DECODINGS = '{"greedy": {}, "sampled": {"sample": true, "top_p": 0.9, "seeds": [10, 20], "no_repeat_ngram_size": 6}}'
"""Of the runs of `tiny.json` that are scored in several ways."""


class Done(NamedTuple):
    """What a command ended with, and what it wrote."""

    code: int
    output: str
    screen: str


def kdzoo(*arguments: str) -> Done:
    """A command in this process. What other processes write is not in it."""
    output, screen = StringIO(), StringIO()
    with redirect_stdout(output), redirect_stderr(screen), warnings.catch_warnings():
        # Python's own filters, as at a prompt: what libraries tell their developers is no error of ours.
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        code = main(arguments)
    return Done(code, output.getvalue(), screen.getvalue())


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


class Run(NamedTuple):
    """A run that went well."""

    folder: Path
    output: str = ""
    screen: str = ""

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def lines(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def run(folder: Path, *flags: str, recipe: Path = TINY) -> Run:
    """`kdzoo run` into the folder, in this process and on one rank if the flags do not say otherwise."""
    done = kdzoo("run", str(recipe), "--out", str(folder), "--ranks", "1", *flags)
    assert done.code == 0, done.screen
    return Run(folder, done.output, done.screen)


def run_on_two_ranks(work: Path, commands: Mapping[Path, Sequence[str]]) -> dict[str, Run]:
    """`kdzoo run` with every folder's arguments, all in the same two processes; the runs by their folders' names."""
    with ExitStack() as probes:
        found = [probes.enter_context(socket.socket()) for _ in commands]
        for probe in found:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in found]
    arguments = [["run", *command, "--out", str(folder)] for folder, command in commands.items()]
    assert on_ranks(2, work, _one_after_the_other, arguments, ports) == [[0] * len(commands)] * 2
    return {folder.name: Run(folder) for folder in commands}


def _one_after_the_other(commands: list[list[str]], ports: list[int]) -> list[int]:
    """Exit codes on this rank. Every command meets the other rank at a port of its own."""
    codes = []
    for command, port in zip(commands, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(command))
    return codes
