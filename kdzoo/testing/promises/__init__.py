"""Conformance: what a loss promises by being one, tried in a tiny world."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.multiprocessing import ProcessExitedException

from kdzoo.errors import KdzooError
from kdzoo.plugin.contracts import Loss
from kdzoo.testing.promises.checks import CHECKS, Check
from kdzoo.testing.promises.ranks import two_ranks
from kdzoo.testing.promises.world import Subject, World
from kdzoo.testing.ranks import ADVICE
from kdzoo.testing.replay import valid_params

RANKS = "ranks", "two ranks of ZeRO-3 are one process"


@dataclass(frozen=True)
class Result:
    """One promise of a loss, and why it is not kept; nothing where it is."""

    check: str
    promise: str
    fault: str


def conformance(
    loss: type[Loss],
    params: Mapping[str, Any] | None = None,
    *,
    artefacts: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: bool = True,
) -> Iterator[Result]:
    """Every check of `loss` with `params`, as it ends.

    `artefacts` are the tensors of the stages that it names in its needs; by default, what the loss of that name begins
    with. `ranks`: also on two ranks of ZeRO-3, which takes half a minute. Parameters that the loss does not have are a
    `KdzooError`.
    """
    return _results(Subject(loss, valid_params(loss.name, loss, params or {}), artefacts or {}), ranks)


def _results(subject: Subject, ranks: bool) -> Iterator[Result]:
    shut = {True: "", False: ""}  # with one tokenizer, with two: the check that shut it
    failed: list[str] = []
    for check in CHECKS:
        fault = _fault(check, subject, shut)
        failed += [check.name] if fault else []
        yield Result(check.name, check.promise, fault)
    if ranks:
        # What stalls the ranks, or fails anywhere, is known by now: processes would only say it less clearly.
        known = next((name for name in ("needs", "tokenizers", "finite", "gradients") if name in failed), None)
        yield Result(*RANKS, f"not tried; mend '{known}' first" if known else _rank_fault(subject))


def check_loss(
    loss: type[Loss],
    params: Mapping[str, Any] | None = None,
    *,
    artefacts: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: bool = True,
) -> None:
    """Raise an `AssertionError` that names every promise which `loss` does not keep, with what to do.

    The arguments are those of `conformance`.
    """
    results = conformance(loss, params, artefacts=artefacts, ranks=ranks)
    faults = [f"{result.check}: {result.fault}" for result in results if result.fault]
    if faults:
        raise AssertionError("\n".join([f"'{loss.name}' does not keep what a loss promises:", *faults]))


def _fault(check: Check, subject: Subject, shut: dict[bool, str]) -> str:
    """What is wrong, in either world; worlds that cannot be tried are `shut`."""
    for same_tokens in {"each": (True, False), "same": (True,), "two": (False,)}[check.worlds]:
        if shut[same_tokens]:
            if all(shut.values()):
                return f"not tried; mend '{shut[same_tokens]}' first"
            continue
        try:
            if not same_tokens and not subject.fits_two_tokenizers:
                continue
            world = World(subject, same_tokens)
            fault = "" if check.unless_coupled and world.needs.batch_coupled else check.fault(world)
        except Exception as error:
            fault = str(error) if isinstance(error, KdzooError) else _in_one_line(error, subject.loss)
            if not same_tokens and not isinstance(error, KdzooError):
                fault += "; mend it for two tokenizers, or say tokenizers='same' in 'needs'"
            if check.blocks:
                shut[same_tokens] = check.name
                shut[False] = check.name if same_tokens else shut[False]
        if fault:
            return f"{fault} ({'one tokenizer' if same_tokens else 'two tokenizers'})"
    return ""


def _rank_fault(subject: Subject) -> str:
    tried = [(subject, same) for same in (True, False) if same or subject.fits_two_tokenizers]
    try:
        return next(filter(None, two_ranks(tried)), "")
    except KdzooError as error:
        return str(error)
    except ProcessExitedException:
        return f"a rank died in a collective call; {ADVICE}"
    except Exception as error:  # of another process: its last line says what it was
        return " ".join(str(error).strip().splitlines()[-1:])


def _in_one_line(error: Exception, loss: type[Loss]) -> str:
    """The exception, and the line of the loss's own file that it passed last."""
    file = Path(inspect.getfile(loss))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    place = f" ({file.name}:{lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


__all__ = ["CHECKS", "RANKS", "Result", "check_loss", "conformance"]
