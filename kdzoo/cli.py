"""The command line.

What a command needs is imported inside it, and torch only after the arguments were checked: a wrong name is refused
at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdzoo.errors import KdzooError, PluginError, did_you_mean

if TYPE_CHECKING:
    from kdzoo.plugin.declarations import Declarations, Declared
    from kdzoo.recipe.load import LoadedRecipe
    from kdzoo.recipe.model import LossSlot, ModelSource, Recipe, Stage
    from kdzoo.report.write import Places

FILE = click.Path(path_type=Path)

plugin_option = click.option(
    "--plugin", "plugins", type=FILE, multiple=True, metavar="FILE", help="Load a plugin from this file. Repeatable."
)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """RECIPE and what is merged over it, the same for every command that reads one."""
    for decorate in (
        plugin_option,
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set one key, such as stages.distill.steps=100; null deletes the key. Repeatable.",
        ),
        click.option(
            "--on",
            type=FILE,
            multiple=True,
            metavar="PAIR",
            help="Merge another recipe over RECIPE, such as a pair of models. Repeatable.",
        ),
        click.argument("recipe", type=FILE),
    ):
        command = decorate(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kdzoo")
def cli() -> None:
    """White-box knowledge distillation for language models.

    A RECIPE, PAIR or SUITE is a file, or the name of one that comes with kdzoo ('kdzoo list --recipes').
    """


@cli.command()
@recipe_options
@click.option(
    "--ranks", type=click.IntRange(min=1), metavar="N", help="Number of processes (default: one per GPU, or 1)."
)
@click.option("--out", type=FILE, metavar="DIR", help="Run folder (default: runs/<time>-<title>).")
def run(
    recipe: Path,
    on: Sequence[Path],
    sets: Sequence[str],
    plugins: Sequence[Path],
    ranks: int | None,
    out: Path | None,
) -> int:
    """Train and evaluate a recipe.

    RECIPE is a file, or the name of a recipe that comes with kdzoo.
    """
    from kdzoo.run import launch_run

    return launch_run(recipe_path=recipe, on=on, sets=sets, plugins=plugins, ranks=ranks, out=out)


@cli.command()
@recipe_options
def validate(recipe: Path, on: Sequence[Path], sets: Sequence[str], plugins: Sequence[Path]) -> None:
    """Check a recipe and summarize it in one line.

    All faults are printed at once, each with the file or flag that caused it.
    """
    from kdzoo.recipe.load import load_recipe

    loaded = load_recipe(recipe, on, sets, plugins)
    click.echo(f"{loaded.path}: {_summary(loaded.recipe)}")


@cli.command()
@recipe_options
@click.option("--origin", is_flag=True, help="Print one line per value, with the file or flag that set it.")
def show(recipe: Path, on: Sequence[Path], sets: Sequence[str], plugins: Sequence[Path], origin: bool) -> None:
    """Print a recipe as JSON, with all files and flags merged."""
    from kdzoo.recipe.load import load_recipe

    loaded = load_recipe(recipe, on, sets, plugins)
    click.echo("\n".join(_origins(loaded)) if origin else _json(loaded.resolved))


@cli.command("eval")
@click.option(
    "--on",
    "sets",
    multiple=True,
    metavar="SETS",
    help="Evaluation sets, separated by commas (default: those of the run).",
)
@click.option(
    "--decoding",
    "decodings",
    multiple=True,
    metavar="NAME",
    help="Decoding to use, such as greedy or sampling (default: all). Repeatable.",
)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    metavar="N",
    help="Sampling seed (default: 10 20 30 40 50). Repeatable.",
)
@click.option(
    "--no-repeat-ngram-size",
    type=click.IntRange(min=0),
    metavar="N",
    help="Forbid repeated n-grams of this length; 0 allows all.",
)
@click.option(
    "--max-prompt-length", type=click.IntRange(min=1), metavar="N", help="Cut prompts to this number of tokens."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Longest answer, in tokens.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Evaluate only the first N rows of each set.")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Number of prompts per batch and process.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Precision of the weights.")
@click.option("--chat/--no-chat", default=None, help="Use the tokenizer's own chat template, or do not.")
@click.option(
    "--engine",
    type=click.Choice(["own", "vllm"]),
    default="own",
    help="Generate with kdzoo's own engine (default) or with vLLM.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of processes (default: one per GPU, or 1); with vLLM, number of GPUs (default: 1).",
)
@click.option("--out", type=FILE, metavar="DIR", help="Write answers and scores to this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print scores and settings as JSON.")
@plugin_option
@click.argument("model", metavar="MODEL_OR_RUN")
def evaluate(
    model: str,
    sets: Sequence[str],
    decodings: Sequence[str],
    seeds: Sequence[int],
    engine: str,
    ranks: int | None,
    plugins: Sequence[Path],
    **asked: Any,
) -> int:
    """Evaluate a model or the student of a run.

    MODEL_OR_RUN is a run folder, a model folder, or a model name on the Hugging Face hub. A run is evaluated with its
    own settings, any other model with the settings that are usual in the literature.
    """
    from kdzoo.run.evaluation_plan import Asked, plan, require_places

    names = tuple(name for given in sets for name in given.split(",") if name)
    wanted = Asked(model, names, tuple(decodings), tuple(seeds), plugins=tuple(plugins), **asked)
    require_places(plan(wanted))
    # What is imported from here on takes seconds.
    from kdzoo.run import launch
    from kdzoo.run.evaluation import EvaluationTask, evaluate_with_vllm

    if engine == "own":
        return launch(EvaluationTask(wanted), ranks)
    evaluate_with_vllm(wanted, ranks or 1)
    return 0


@cli.command()
@click.option(
    "--on", type=FILE, multiple=True, metavar="PAIR", help="Pair of models, instead of those of SUITE. Repeatable."
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one key of every recipe. Repeatable.",
)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    metavar="N",
    help="Training seed, instead of those of SUITE. Repeatable.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, metavar="N", help="Number of parallel runs (default: 1)."
)
@click.option("--ranks", type=click.IntRange(min=1), metavar="N", help="Number of processes of each run.")
@click.option(
    "--out",
    type=FILE,
    default=Path("runs/compare"),
    metavar="DIR",
    help="Folder for run folders and results (default: runs/compare).",
)
@click.option("--ledger", type=FILE, metavar="DIR", help="Folder for the results (default: that of --out).")
@click.option("--dry-run", is_flag=True, help="List the missing runs and stop.")
@plugin_option
@click.argument("suite", type=FILE)
def compare(
    suite: Path,
    on: Sequence[Path],
    sets: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
    ranks: int | None,
    out: Path,
    ledger: Path | None,
    dry_run: bool,
    plugins: Sequence[Path],
) -> int:
    """Run a suite of recipes and training seeds, and report.

    SUITE is a file, or the name of a suite that comes with kdzoo. Finished runs are kept: an interrupted comparison
    continues where it stopped.
    """
    from kdzoo.compare.suite import load_suite

    loaded = load_suite(suite, on, sets, plugins, seeds)
    from kdzoo.compare.runner import Comparison

    file = (ledger or out) / f"{loaded.name}.json"
    comparison = Comparison(loaded, out / "cells", file, _report_beside, jobs, ranks)
    return comparison.list_missing() if dry_run else comparison.run()


@cli.command()
@click.option("--title", metavar="TEXT", help="Title of the page (default: that of the first suite).")
@click.option("--markdown", type=FILE, metavar="FILE", help="Markdown file (default: beside the first RESULTS).")
@click.option("--html", type=FILE, metavar="FILE", help="HTML file (default: beside the first RESULTS).")
@click.option("--figures", type=FILE, metavar="DIR", help="Folder for the figures as PNG (default: figures beside it).")
@click.argument("suites", type=FILE, nargs=-1, required=True, metavar="RESULTS...")
def report(
    suites: Sequence[Path], title: str | None, markdown: Path | None, html: Path | None, figures: Path | None
) -> None:
    """Write the report of a comparison again, from its results alone.

    RESULTS is a file that 'kdzoo compare' wrote, such as runs/compare/lab.json. Several files give one page.
    """
    from kdzoo.report.write import Places

    beside = Places.beside(suites[0])
    places = Places(markdown or beside.markdown, html or beside.html, figures or beside.figures)
    _report(suites, places, title)


@cli.command()
@click.option("--suite", "of_suites", is_flag=True, help="Print the schema of suites instead.")
@plugin_option
@click.option("--write", type=FILE, metavar="PATH", help="Write to this file instead of the screen.")
def schema(of_suites: bool, plugins: Sequence[Path], write: Path | None) -> None:
    """Print the JSON Schema of recipes or suites.

    The schema of recipes has the parameters of all plugins.
    """
    _print_or_write(_json(_schema_of_suites() if of_suites else _schema_of_recipes(plugins)) + "\n", write)


@cli.command()
@plugin_option
@click.option("--write", type=FILE, metavar="PATH", help="Write to this file instead of the screen.")
def docs(plugins: Sequence[Path], write: Path | None) -> None:
    """Print the documentation of all plugins as Markdown."""
    from kdzoo.plugin.declarations import declarations
    from kdzoo.plugin.markdown import page

    _print_or_write(page(declarations(plugins)), write)


@cli.command("list")
@click.option("--recipes", is_flag=True, help="List the recipes and suites that come with kdzoo instead.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@plugin_option
def list_(recipes: bool, as_json: bool, plugins: Sequence[Path]) -> None:
    """List plugins with their parameters, or recipes by name."""
    if recipes:
        _list_recipes(as_json)
    else:
        _list_plugins(plugins, as_json)


@cli.command()
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set one parameter of the loss. Repeatable.")
@click.option("--ranks/--no-ranks", default=True, help="Also test on two ranks of ZeRO-3, which takes half a minute.")
@plugin_option
@click.argument("name_or_file")
def check(name_or_file: str, sets: Sequence[str], ranks: bool, plugins: Sequence[Path]) -> int:
    """Test a loss, or token weights, against the rules that all of them must keep.

    NAME_OR_FILE is a name, or a plugin file, of which every loss and all token weights are tested.
    """
    from kdzoo.recipe.load import flag
    from kdzoo.recipe.merge import merge

    _require_loss(name_or_file, plugins)
    params = merge([flag(text) for text in sets]).document
    # What is imported from here on takes seconds.
    from kdzoo.plugin.registry import checked_classes
    from kdzoo.testing import conformance

    kept = True
    for checked in checked_classes(name_or_file, plugins):
        results = conformance(checked, params, ranks=ranks)
        click.echo(f"{checked.name}{f' with {json.dumps(params)}' if params else ''}")
        for result in results:
            text, color = MARKS[result.status]
            click.echo(f"  {click.style(f'{text:<7}', fg=color)}  {result.check:<13}{result.promise}")
            if result.reason:
                click.echo(f"           {result.reason}")
            kept = kept and result.status == "ok"
    return 0 if kept else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for what the user can fix."""
    try:
        code = cli.main(arguments, prog_name="kdzoo", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except KdzooError as error:
        for line in str(error).splitlines():
            click.echo(f"error: {line}", err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader went away. Python would flush standard output once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _print_or_write(text: str, file: Path | None) -> None:
    if file is None:
        click.echo(text, nl=False)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise KdzooError(f"{file}: cannot be written ({error.strerror})") from error


# report


def _report_beside(suite: Path) -> None:
    from kdzoo.report.write import Places

    _report([suite], Places.beside(suite))


def _report(suites: Sequence[Path], places: Places, title: str | None = None) -> None:
    from kdzoo.report.write import spoken, write_report

    document = write_report(suites, places, title)
    click.echo(f"{spoken(document)}\n\nreport: {places.html}, {places.markdown}, {places.figures}{os.sep}")


# schema


def _schema_of_suites() -> dict[str, Any]:
    from kdzoo.compare.suite import suite_schema

    return suite_schema()


def _schema_of_recipes(plugins: Sequence[Path]) -> dict[str, Any]:
    """Without what suites need: an editor asks for this often, and a recipe's schema is in a cache."""
    from kdzoo.plugin.declarations import declarations
    from kdzoo.recipe.schema import recipe_schema

    return recipe_schema(declarations(plugins))


# validate and show


def _summary(recipe: Recipe) -> str:
    losses = ", ".join(_term(name, slot) for name, slot in recipe.losses.items())
    places = {"teacher": 0, "sft": 1, "answers": 2, "distill": 4}  # what makes an artifact stands between, as it runs
    lengths = {name: _length(name, stage) for name, stage in recipe.stages.items()}
    if recipe.stages.answers is not None:
        lengths["answers"] = f"answers ({recipe.stages.answers.share:.0%} of the rows)"
    stages = ", ".join(lengths[name] for name in sorted(lengths, key=lambda name: places.get(name, 3)))
    models = f"{_model(recipe.student)}{_lora(recipe.student)} learns from {_model(recipe.teacher)}"
    return f"'{recipe.title}': {models}; losses {losses}; stages {stages}; {recipe.precision}"


def _model(source: ModelSource) -> str:
    if source.config is not None:
        return f"a new {source.config.get('model_type', 'model')}"
    if source.layers is not None:
        return f"{len(source.layers)} layers of the teacher"
    return f"'{source.name or source.gguf_file or source.gguf_package}'"


def _lora(source: ModelSource) -> str:
    return f" with LoRA of rank {source.lora.rank}" if source.lora is not None else ""


def _term(name: str, slot: LossSlot) -> str:
    weight = slot.weight
    amount = f"{weight:g}" if isinstance(weight, float) else f"{weight.start:g} to {weight.end:g}"
    alias = f" as '{name}'" if name != slot.use else ""
    return f"{amount} × {slot.use}{alias}" + (f" weighed by '{slot.weights}'" if slot.weights is not None else "")


def _length(name: str, stage: Stage) -> str:
    count, unit = (stage.steps, "step") if stage.steps else (stage.epochs, "epoch")
    balance = f", balanced by '{stage.balance}'" if stage.balance is not None else ""
    return f"{name} ({count:g} {unit}{'' if count == 1 else 's'}{balance})"


def _origins(loaded: LoadedRecipe) -> Iterator[str]:
    """One line per leaf: its address, its value, and who set it."""
    from kdzoo.recipe.merge import in_text, leaves

    for at, value in leaves(loaded.resolved):
        address = in_text(at)
        yield f"{address} = {json.dumps(value, ensure_ascii=False)}  ({loaded.provenance[address]})"


# check


MARKS = {"ok": ("ok", "green"), "failed": ("FAILED", "red"), "skipped": ("skipped", "yellow")}
"""The status of a check -> how it is printed."""


def _require_loss(name_or_file: str, plugins: Sequence[Path]) -> None:
    """Refuse what is neither a loss nor a file, before torch is imported."""
    if Path(name_or_file).is_file():
        return
    if name_or_file.endswith(".py"):
        raise PluginError(f"{name_or_file}: no such file; give a loss of 'kdzoo list', or a plugin's file")
    from kdzoo.plugin.declarations import declarations

    declared = declarations(plugins)
    known = {**declared.of("loss"), **declared.of("token_weights")}
    if name_or_file not in known:
        close = did_you_mean(name_or_file, known)
        raise PluginError(f"{name_or_file}: no such loss{close}; give a loss of 'kdzoo list', or a plugin's file")


# list


def _list_recipes(as_json: bool) -> None:
    from kdzoo.recipe.library import RECIPES, SUITES, library, shelf

    titles = {folder: {name: _title(file) for name, file in shelf(folder).items()} for folder in (*RECIPES, *SUITES)}
    if as_json:
        click.echo(_json({folder or "recipes": names for folder, names in titles.items()}))
        return
    for folder, names in titles.items():
        width = max(map(len, names))
        click.echo(f"{folder or 'recipes'} ({library() / folder}):")
        for name, title in names.items():
            click.echo(f"  {name:<{width}}  {title}".rstrip())


def _title(file: Path) -> str:
    """What a recipe says that it is; of one that only others extend, nothing."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return str(content.get("title") or content.get("pair") or "")


def _list_plugins(plugins: Sequence[Path], as_json: bool) -> None:
    from dataclasses import asdict

    from kdzoo.plugin.declarations import declarations

    declared = declarations(plugins)
    if as_json:
        click.echo(_json(asdict(declared)["by_kind"]))
    elif sys.stdout.isatty():
        _print_tables(declared)
    else:
        click.echo("\n".join(_lines(declared)))


def _lines(declared: Declarations) -> Iterator[str]:
    """What is declared, in plain lines."""
    for kind, plugins in _kinds(declared):
        yield f"{kind}:"
        for plugin in plugins.values():
            yield f"  {plugin.name}  [{plugin.plugin}]  {_first_paragraph(plugin.doc)}"
            for note in filter(None, (plugin.formula, plugin.paper)):
                yield f"      {note}"
            for parameter, doc in _parameters(plugin.params):
                yield f"      {parameter}" + (f": {doc}" if doc else "")


def _print_tables(declared: Declarations) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    for kind, plugins in _kinds(declared):
        columns = (Column(name, overflow="fold") for name in ("name", "plugin", "what it is", "parameters"))
        table = Table(*columns, title=kind, title_justify="left", show_lines=True)
        for plugin in plugins.values():
            what = filter(None, (_first_paragraph(plugin.doc), plugin.formula, plugin.paper))
            parameters = (parameter for parameter, _ in _parameters(plugin.params))
            cells = (plugin.name, plugin.plugin, "\n".join(what), "\n".join(parameters))
            table.add_row(*map(Text, cells))  # Text: a formula's brackets are no markup
        console.print(table)


def _kinds(declared: Declarations) -> Iterator[tuple[str, dict[str, Declared]]]:
    """Those of which there are any, in the plural."""
    for kind, plugins in declared.by_kind.items():
        words = kind.replace("_", " ")
        yield words + ("es" if words.endswith("ss") else "" if words.endswith("s") else "s"), plugins


def _parameters(schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of each parameter: `width (integer ≥ 1, default 64)`, and its documentation on one line."""
    from kdzoo.plugin.json_schema import in_words, value_in_words

    for name, parameter in schema.get("properties", {}).items():
        default = f", default {value_in_words(parameter['default'])}" if "default" in parameter else ""
        yield f"{name} ({in_words(parameter)}{default})", " ".join(parameter.get("description", "").split())


def _first_paragraph(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())
