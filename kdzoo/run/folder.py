"""The run folder: everything a run leaves behind, in plain files.

    recipe.json            the resolved recipe
    environment.json       versions, plugins, commits, device, command line
    metrics.jsonl          one object per optimizer step of `distill`; other stages: metrics-<stage>.jsonl
    answers.jsonl          the teacher's answers that rows of `distill` have, where a stage makes them
    predictions/           <set>.<model>.<decoding>.jsonl
    scores.json
    checkpoints/ student/  the engine's, and the exported student

JSON here is UTF-8, its keys in the order in which they were given, which is the same in every run. A number
that is not finite becomes `null`: JSON has no NaN.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import kdzoo
from kdzoo.errors import KdzooError
from kdzoo.evaluate import Scores

if TYPE_CHECKING:
    from kdzoo.evaluate.scoring import Answer

PACKAGES = (
    "kdzoo",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "accelerate",
    "peft",
    "pluggy",
    "pydantic",
    "jsonschema",
    "rouge-score",
    "numpy",
)
"""What a result may depend on."""


@dataclass(frozen=True)
class RunFolder:
    """A folder that exists. Rank 0 holds it; the other ranks write nothing."""

    path: Path

    @classmethod
    def create(cls, title: str, out: Path | None, root: Path = Path("runs")) -> RunFolder:
        """`out`, or a new `root/<YYYYmmdd-HHMMSS>-<title>`.

        Raises KdzooError where `out` holds something already, or the folder cannot be written.
        """
        if out is not None:
            with _writing(out):
                if out.is_dir() and any(out.iterdir()):
                    raise KdzooError(f"--out: '{out}' is not empty; name a new folder, or empty this one")
                out.mkdir(parents=True, exist_ok=True)
                return cls(_writable(out))
        named = root / f"{datetime.now():%Y%m%d-%H%M%S}-{slug(title)}"
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
            return cls(_writable(_make_new(named)))

    def discard_if_unused(self) -> None:
        """Take the folder away where no step was logged: a recipe alone is no result."""
        if any(self.path.glob("metrics*.jsonl")):
            return
        for name in ("recipe.json", "environment.json"):
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    @property
    def student(self) -> Path:
        """Where the exported student goes."""
        return self.path / "student"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions"

    def write_recipe(self, resolved: Mapping[str, Any]) -> Path:
        return self._write_json("recipe.json", resolved)

    def write_environment(self, extra: Mapping[str, Any]) -> Path:
        """What this process runs on, and `extra` (ranks, tokenizers, parameters, ...) after it."""
        return self._write_json("environment.json", {**environment(), **extra})

    def write_scores(self, scores: Scores) -> Path:
        return self._write_json("scores.json", scores)

    def predictions_of(self, set: str, model: str, decoding: str) -> Path:
        """The file of a model's answers. A set that is named by a path may begin with a dot: no file is hidden."""
        name = ".".join(quote(name, safe=" ") for name in (set, model, decoding, "jsonl"))
        return self.predictions / (f"%2E{name[1:]}" if name.startswith(".") else name)

    def write_predictions(self, set: str, model: str, decoding: str, answers: Iterable[Answer]) -> Path:
        """One JSON object per answer. Names are escaped as in a URL where a file name could not hold them."""
        path = self.predictions_of(set, model, decoding)
        with _writing(self.path):
            self.predictions.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(_json_line(asdict(answer)) for answer in answers)
        return path

    def write_answers(self, answers: Iterable[Mapping[str, Any]]) -> Path:
        """One JSON object per answer that rows were trained on."""
        path = self.path / "answers.jsonl"
        with _writing(self.path), path.open("w", encoding="utf-8") as file:
            file.writelines(map(_json_line, answers))
        return path

    def log_step(self, metrics: Mapping[str, float], stage: str) -> None:
        """One optimizer step, on disk when this returns: a run that is killed leaves every finished step."""
        name = "metrics.jsonl" if stage == "distill" else f"metrics-{quote(stage, safe=' ')}.jsonl"
        with _writing(self.path), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(_json_line(metrics))

    def _write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        path = self.path / name
        with _writing(self.path):
            text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
        return path


def slug(title: str) -> str:
    """A title as part of a file name: lower case, words joined by hyphens, at most 60 characters."""
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return words[:60].rstrip("-") or "run"


def environment() -> dict[str, Any]:
    """Versions, plugins, commits, device and command line of this process."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "plugins": _plugin_distributions(),
        "git": {"working_directory": _commit(Path.cwd()), "kdzoo": _own_commit()},
        "device": _device(),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:  # kdzoo itself, where it is on the path and not installed
        return None


def _plugin_distributions() -> dict[str, dict[str, Any]]:
    """Every installed distribution with a kdzoo plugin: its version and its entry points."""
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(entry_points(group="kdzoo"), key=lambda e: (e.dist.name if e.dist else "", e.name)):
        assert entry.dist is not None, "an installed entry point belongs to a distribution"
        own = found.setdefault(entry.dist.name, {"version": entry.dist.version, "plugins": []})
        own["plugins"].append(entry.name)
    return found


def _own_commit() -> dict[str, Any] | None:
    """The commit of kdzoo's checkout; none where it is installed, perhaps inside somebody else's checkout."""
    [room, *_] = kdzoo.__path__
    checkout = Path(room).parent
    return _commit(checkout) if (checkout / ".git").exists() else None


def _commit(folder: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; none outside git or before the first commit."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or one too slow to ask
        return None
    return done.stdout.strip()


def _device() -> dict[str, Any]:
    import torch  # here, since who only looks for a run should not wait for it

    if not torch.cuda.is_available():
        return {"type": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "type": "cuda",
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "visible": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def _make_new(path: Path) -> Path:
    """A folder that nobody else has: two runs of one second get two."""
    for attempt in range(1, 1000):
        new = path if attempt == 1 else path.with_name(f"{path.name}-{attempt}")
        try:
            new.mkdir()
        except FileExistsError:
            continue
        return new
    raise AssertionError("a thousand runs started in one second")


def _writable(path: Path) -> Path:
    """The folder, after a file was written into it: a run must not find out at its end."""
    probe = path / ".writable"
    probe.touch()
    probe.unlink()
    return path


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KdzooError(
            f"run folder '{path}': cannot be written ({error.strerror}); name another with '--out'"
        ) from error


def _json_line(content: Mapping[str, Any]) -> str:
    return json.dumps(_finite(content), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same plain data with `None` for every number that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
