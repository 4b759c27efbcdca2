"""Conformance: what a loss promises by being one, tried in a tiny world."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.multiprocessing import ProcessExitedException

from kdzoo.api.loss import Loss
from kdzoo.api.plugin import NoParams, Plugin
from kdzoo.api.token_weights import TokenWeights
from kdzoo.errors import KdzooError
from kdzoo.testing.promises.checks import CHECKS, Check
from kdzoo.testing.promises.ranks import two_ranks
from kdzoo.testing.promises.token_weights import CHECKS as CHECKS_OF_WEIGHTS
from kdzoo.testing.promises.token_weights import Carrier
from kdzoo.testing.promises.world import Subject, World
from kdzoo.testing.ranks import ADVICE
from kdzoo.testing.replay import valid_params

RANKS = "ranks", "two ranks of ZeRO-3 are one process"


@dataclass(frozen=True)
class Result:
    """One promise of a loss."""

    check: str
    promise: str
    status: Literal["ok", "failed", "skipped"] = "ok"
    reason: str = ""
    """What is wrong and what to do, or why it was not tried."""


def conformance(
    checked: type[Loss] | type[TokenWeights],
    params: Mapping[str, Any] | None = None,
    *,
    artifacts: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: bool = True,
) -> Iterator[Result]:
    """Every check of a loss, or of token weights, with `params`, as it ends.

    `artifacts` are the tensors of the stages that it names in its needs; by default, what the loss of that name begins
    with. `ranks`: also on two ranks of ZeRO-3, which takes half a minute. Parameters that the loss does not have are a
    `KdzooError`.
    """
    valid = valid_params(checked.name, checked, params or {})
    if issubclass(checked, TokenWeights):
        return _results(Subject(Carrier, NoParams(), {}, checked, valid), CHECKS_OF_WEIGHTS, ranks)
    return _results(Subject(checked, valid, artifacts or {}), CHECKS, ranks)


def _results(subject: Subject, checks: Sequence[Check], ranks: bool) -> Iterator[Result]:
    tried = _Tried(subject)
    for check in checks:
        yield tried.result(check)
    if ranks:
        # What stalls the ranks, or fails anywhere, is known by now: processes would only say it less clearly.
        known = next((name for name in BEFORE_RANKS if name in tried.failed), None)
        if known is not None:
            yield Result(*RANKS, "skipped", _mend(known))
        elif fault := _rank_fault(subject):
            yield Result(*RANKS, "failed", fault)
        else:
            yield Result(*RANKS)


BEFORE_RANKS = ("declarations", "tokenizers", "finite", "empty", "modules", "gradients")


def _mend(check: str) -> str:
    return f"mend '{check}' first"


def check_loss(
    loss: type[Loss] | type[TokenWeights],
    params: Mapping[str, Any] | None = None,
    *,
    artifacts: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: bool = True,
) -> None:
    """Raise an `AssertionError` that names every promise which a loss (or token weights) does not keep, with what to
    do.

    The arguments are those of `conformance`.
    """
    results = conformance(loss, params, artifacts=artifacts, ranks=ranks)
    faults = [f"{result.check}: {result.reason}" for result in results if result.status == "failed"]
    if faults:
        raise AssertionError("\n".join([f"'{loss.name}' does not keep what a loss promises:", *faults]))


class _Tried:
    """The checks of one subject, one after the other, in its two worlds."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.failed: list[str] = []
        self._worlds: dict[bool, World | None] = {}
        self._shut: dict[bool, str] = {}
        """With one tokenizer (True), with two: the check whose finding the others would only repeat."""

    def result(self, check: Check) -> Result:
        worlds = {"each": (True, False), "same": (True,), "two": (False,)}[check.worlds]
        open_worlds = [same for same in worlds if same not in self._shut]
        if not open_worlds:
            return Result(check.name, check.promise, "skipped", _mend(self._shut[worlds[0]]))
        for same_tokens in open_worlds:
            if fault := self._fault(check, same_tokens):
                self.failed.append(check.name)
                if check.blocks:
                    self._shut |= dict.fromkeys((True, False) if same_tokens else (False,), check.name)
                where = "one tokenizer" if same_tokens else "two tokenizers"
                return Result(check.name, check.promise, "failed", f"{fault} ({where})")
        return Result(check.name, check.promise)

    def _fault(self, check: Check, same_tokens: bool) -> str:
        try:
            world = self._world(same_tokens)
            return "" if world is None or (check.unless_coupled and world.needs.batch_coupled) else check.fault(world)
        except KdzooError as error:
            return str(error)
        except Exception as error:
            fault = _in_one_line(error, self.subject.checked)
            if same_tokens:
                return fault
            other = "" if self.subject.weights is not None else ", or say tokenizers='same' in 'needs'"
            return f"{fault}; mend it for two tokenizers{other}"

    def _world(self, same_tokens: bool) -> World | None:
        """None where the loss refuses two tokenizers."""
        if same_tokens not in self._worlds:
            fits = same_tokens or self.subject.fits_two_tokenizers
            self._worlds[same_tokens] = World(self.subject, same_tokens) if fits else None
        return self._worlds[same_tokens]


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


def _in_one_line(error: Exception, checked: type[Plugin]) -> str:
    """The exception, and the line of the plugin's own file that it passed last."""
    file = Path(inspect.getfile(checked))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    place = f" ({file.name}:{lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


__all__ = ["CHECKS", "CHECKS_OF_WEIGHTS", "RANKS", "Result", "check_loss", "conformance"]
