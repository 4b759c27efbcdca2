"""CONTRIBUTING.md, followed to the letter in a copy of the checkout, adds a loss that works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PARTS = ("kdzoo", "plugins", "recipes", "tests", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
PROGRAMS: Mapping[str, list[str]] = {
    "kdzoo": [sys.executable, "-m", "kdzoo"],
    "pytest": [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"],
    "python": [sys.executable],
}


def section() -> str:
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return page.partition("\n## From a formula to a plugin\n")[2].partition("\n## ")[0]


def steps() -> Iterator[tuple[str, str, str]]:
    """(language, file, text) of every block: the file is the first that the paragraph before it names."""
    file = ""
    parts = iter(re.split(r"^```(\w*)\n(.*?)^```$", section(), flags=re.MULTILINE | re.DOTALL))
    for prose, language, text in zip(parts, parts, parts, strict=False):
        for paragraph in prose.split("\n\n"):
            if named := re.search(r"`([\w/]+\.(?:py|json|toml))`", paragraph):
                file = named[1]
        yield language, file, text


class Checkout:
    """A copy in which what the page says is done. Installing it writes what pip would write, without the network."""

    def __init__(self, folder: Path) -> None:
        self.root, self.site = folder / "checkout", folder / "site"
        self.root.mkdir()
        for part in PARTS:
            source = REPOSITORY / part
            if source.is_dir():
                shutil.copytree(source, self.root / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, self.root)
        path = os.pathsep.join(map(str, (self.site, self.root, self.root / "plugins")))
        self.environment = os.environ | {"PYTHONPATH": path, "KDZOO_CACHE": str(folder / "cache")}
        self.said: dict[str, str] = {}

    def do(self, language: str, file: str, text: str) -> None:
        if language == "diff":
            self.insert(self.root / file, text)
        elif language:
            assert not (self.root / file).exists(), f"{file} is there already"
            (self.root / file).write_text(text, encoding="utf-8")
        else:
            for command in text.splitlines():
                self.said[command] = self.run(command)

    def insert(self, file: Path, diff: str) -> None:
        """A diff of one line that is there and lines that come after it."""
        there, *added = diff.splitlines()
        assert there.startswith(" ") and all(line.startswith("+") for line in added)
        lines = file.read_text(encoding="utf-8").splitlines()
        assert lines.count(there[1:]) == 1, f"{file.name}: {there}"
        at = lines.index(there[1:]) + 1
        lines[at:at] = [line[1:] for line in added]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def run(self, command: str) -> str:
        program, *arguments = shlex.split(command)
        if program == "pip":
            self.install()
            return ""
        if arguments[0] == "check":
            arguments.append("--no-ranks")  # as another test does for every loss
        done = subprocess.run(
            [*PROGRAMS[program], *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self) -> None:
        project = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = self.site / f"{project['name']}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(metadata)
        entries = [f"{name} = {module}" for name, module in project["entry-points"]["kdzoo"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[kdzoo]", *entries]) + "\n")


@pytest.mark.slow
def test_followed_to_the_letter_it_adds_a_working_loss(tmp_path):
    checkout = Checkout(tmp_path)
    for step in steps():
        checkout.do(*step)
    said = checkout.said

    assert "  hellinger  [kdzoo_hellinger]  " in said["kdzoo list"]
    assert "0.5 × hellinger as 'kd'" in said["kdzoo validate recipes/hellinger.json"]
    assert '"loss.hellinger"' in (checkout.root / "recipes" / "recipe.schema.json").read_text()
    assert "### `hellinger`" in (checkout.root / "docs" / "zoo.md").read_text()
    assert "FAILED" not in said["kdzoo check hellinger"]
    for command, output in said.items():
        if command.startswith("pytest"):
            assert re.search(r"^[1-9]\d* passed", output, flags=re.MULTILINE), command

    # What holds the whole repository together knows the new loss too.
    together = (
        "test_layers.py",
        "plugin/test_zoo_page.py::test_the_committed_page_is_the_generated_one",
        "plugins/test_promises.py::test_every_loss_is_tried",
        "recipe/test_recipe_schema.py::test_the_committed_schema_is_the_generated_one",
        "recipe/test_recipe_schema.py::test_every_recipe_is_valid[hellinger]",
    )
    checkout.run(" ".join(["pytest", *(f"tests/{test}" for test in together)]))
