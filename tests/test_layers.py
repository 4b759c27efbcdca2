"""Who may import whom: the order of the rooms is the architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdzoo
from kdzoo.plugin.declarations import declarations

REPOSITORY = Path(__file__).parents[1]
CORE = sorted((REPOSITORY / "kdzoo").rglob("*.py"))
PLUGINS = sorted((REPOSITORY / "plugins").rglob("*.py"))

MAY_IMPORT = {
    "api": set(),
    "plugin": set(),
    "step": set(),
    "data": set(),
    "models": {"data", "plugin"},
    "engine": {"step", "plugin"},
    "evaluate": {"engine", "data", "models", "step", "plugin"},
    "recipe": {"plugin"},
    "run": {"evaluate", "engine", "data", "models", "step", "plugin", "recipe"},
    "compare": {"run", "evaluate", "data", "recipe", "plugin"},
    "report": {"compare", "evaluate", "data", "recipe"},
    "testing": {"engine", "data", "models", "step", "plugin", "recipe"},
    "__main__": {"cli"},
    "cli": {"report", "compare", "run", "evaluate", "testing", "recipe", "plugin"},
    "errors": set(),
    "cache": set(),
    "lora": {"api"},
    "peft_private": set(),
    "transformers_private": set(),
}
"""Beside `api`, which every room but the lowest may import: what plugins and the core have in common."""

BELOW_THE_CONTRACT = {"api", "errors", "cache"}

FOR_EVERYBODY = {
    "kdzoo",  # its version
    "kdzoo.errors",
    "kdzoo.cache",
    "kdzoo.recipe.model",  # the recipe's sections, plain data
    "kdzoo.recipe.merge",
    "kdzoo.quiet",  # silences libraries, knows nothing of ours
    "kdzoo.lora",  # LoRA on a Transformers model, through peft
    "kdzoo.transformers_private",
    "kdzoo.peft_private",
}


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside; `from package import module` is the module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, f"{file}: a relative import"
            yield from (_module(f"{node.module}.{alias.name}", node.module) for alias in node.names)


def _module(name: str, parent: str) -> str:
    path = REPOSITORY.joinpath(*name.split("."))
    return name if path.is_dir() or path.with_suffix(".py").is_file() else parent


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def within(file: Path) -> Iterator[str]:
    return (name for name in imports(file) if name == "kdzoo" or name.startswith("kdzoo."))


@pytest.mark.parametrize("file", CORE, ids=module_of)
def test_a_room_imports_only_what_lies_below_it(file):
    module = module_of(file)
    if module == "kdzoo":
        pytest.skip("the public names come from everywhere")
    here = room(module)
    wrong = {
        name
        for name in within(file)
        if name not in FOR_EVERYBODY
        and room(name) not in {here} | MAY_IMPORT[here] | (set() if here in BELOW_THE_CONTRACT else {"api"})
    }
    assert not wrong


@pytest.mark.parametrize("file", [f for f in CORE if room(module_of(f)) == "api"], ids=module_of)
def test_the_contract_imports_no_other_room(file):
    assert {name for name in within(file) if room(name) != "api"} <= {"kdzoo.errors"}


def test_only_the_engine_imports_deepspeed():
    files = [file for file in [*CORE, *PLUGINS] if any(name.split(".")[0] == "deepspeed" for name in imports(file))]
    assert files
    assert {room(module_of(file)) for file in files} == {"engine"}


@pytest.mark.parametrize("file", PLUGINS, ids=lambda file: file.stem)
def test_a_plugin_imports_public_names_and_few_libraries(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "kdzoo":
            assert {alias.name for alias in node.names} <= set(kdzoo.__all__)
    others = {name for name in imports(file) if name.split(".")[0] not in sys.stdlib_module_names}
    own = {"kdzoo_aligners": {"numpy", "rapidfuzz"}, "kdzoo_wandb": {"wandb"}, "kdzoo_trackio": {"trackio"}}
    libraries = {"torch", "pydantic"} | own.get(file.stem, set())
    assert {name for name in others if name.split(".")[0] not in libraries} <= {"kdzoo"}


def test_the_public_names_are_there():
    for name in kdzoo.__all__:
        assert getattr(kdzoo, name) is not None
    with pytest.raises(AttributeError, match=r"^module 'kdzoo' has no attribute 'Los'$"):
        kdzoo.Los  # noqa: B018


def test_the_light_rooms_import_no_heavy_library():
    light = [file for file in CORE if room(module_of(file)) in ("", "cli", "errors", "cache", "recipe")]
    light += [REPOSITORY / "kdzoo" / "plugin" / f"{name}.py" for name in ("discovery", "declarations")]
    code = f"""
import importlib, sys
for module in {[module_of(file) for file in light]}:
    importlib.import_module(module)
print(sorted({{"torch", "deepspeed", "transformers", "datasets", "peft"}} & sys.modules.keys()))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_core_names_no_plugin():
    """But for the default aligner, in the recipe's model. What `ops` computes are names of quantities too, and hidden
    states are a kind of site."""
    declared = declarations()
    names = {name for kind in ("loss", "aligner", "fusion") for name in declared.of(kind)}
    names -= {*dir(kdzoo.ops), "hidden"}
    named = {
        (module_of(file), node.value)
        for file in CORE
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert named == {("kdzoo.recipe.model", "by_bytes")}
