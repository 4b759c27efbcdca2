"""The command line. What a command needs is imported inside it: only `run` waits for torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdzoo.errors import KdzooError

if TYPE_CHECKING:
    from kdzoo.plugin.declarations import Declarations, Declared
    from kdzoo.recipe.load import LoadedRecipe
    from kdzoo.recipe.model import LossSlot, ModelSource, Recipe, Stage
    from kdzoo.report.write import Places

FILE = click.Path(path_type=Path)

plugin_option = click.option(
    "--plugin", "plugins", type=FILE, multiple=True, metavar="FILE", help="A loose plugin file; repeatable."
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
            help="Set one key, such as stages.distill.steps=100; null deletes it; repeatable.",
        ),
        click.option(
            "--on",
            type=FILE,
            multiple=True,
            metavar="PAIR",
            help="Merge this recipe over it, such as a pair; repeatable.",
        ),
        click.argument("recipe", type=FILE),
    ):
        command = decorate(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kdzoo")
def cli() -> None:
    """Distil a language model into a smaller one, from the teacher's inside."""


@cli.command()
@recipe_options
@click.option("--ranks", type=click.IntRange(min=1), metavar="N", help="Processes; by default one per GPU, or one.")
@click.option("--out", type=FILE, metavar="DIR", help="The run folder.")
def run(
    recipe: Path,
    on: Sequence[Path],
    sets: Sequence[str],
    plugins: Sequence[Path],
    ranks: int | None,
    out: Path | None,
) -> int:
    """Train and evaluate what RECIPE says."""
    from kdzoo.run import launch_run

    return launch_run(recipe_path=recipe, on=on, sets=sets, plugins=plugins, ranks=ranks, out=out)


@cli.command()
@recipe_options
def validate(recipe: Path, on: Sequence[Path], sets: Sequence[str], plugins: Sequence[Path]) -> None:
    """Say what RECIPE would do, or everything that is wrong with it."""
    from kdzoo.recipe.load import load_recipe

    loaded = load_recipe(recipe, on, sets, plugins)
    click.echo(f"{loaded.path}: {_summary(loaded.recipe)}")


@cli.command()
@recipe_options
@click.option("--origin", is_flag=True, help="Show which file or flag set each value.")
def show(recipe: Path, on: Sequence[Path], sets: Sequence[str], plugins: Sequence[Path], origin: bool) -> None:
    """Print RECIPE with everything merged, as JSON."""
    from kdzoo.recipe.load import load_recipe

    loaded = load_recipe(recipe, on, sets, plugins)
    click.echo("\n".join(_origins(loaded)) if origin else _json(loaded.resolved))


@cli.command("eval")
@click.option("--on", "sets", multiple=True, metavar="SETS", help="Sets, separated by commas; a run has its own.")
@click.option("--decoding", "decodings", multiple=True, metavar="NAME", help="greedy or sampling; repeatable.")
@click.option("--seed", "seeds", type=int, multiple=True, help="A decoding seed, not 10 to 50; repeatable.")
@click.option("--no-repeat-ngram-size", type=click.IntRange(min=0), metavar="N", help="0: n-grams may repeat.")
@click.option("--max-prompt-length", type=click.IntRange(min=1), metavar="N", help="Tokens that a prompt keeps.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Tokens of an answer.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first rows of each set only.")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Prompts at a time.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Of the weights.")
@click.option("--chat/--no-chat", default=None, help="The tokenizer's own chat template.")
@click.option("--engine", type=click.Choice(["own", "vllm"]), default="own", help="What generates.")
@click.option("--ranks", type=click.IntRange(min=1), metavar="N", help="Processes; of vLLM: GPUs.")
@click.option("--out", type=FILE, metavar="DIR", help="Keep answers and scores in a folder.")
@click.option("--json", "as_json", is_flag=True, help="Scores, and what they depend on, as JSON.")
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
    """Score a model on SETS: a run's student, a folder, or a name of the hub."""
    from kdzoo.run import launch
    from kdzoo.run.evaluation import Asked, EvaluationTask, evaluate_with_vllm, plan

    names = tuple(name for given in sets for name in given.split(",") if name)
    wanted = Asked(model, names, tuple(decodings), tuple(seeds), plugins=tuple(plugins), **asked)
    plan(wanted)  # before a process is started for nothing
    if engine == "own":
        return launch(EvaluationTask(wanted), ranks)
    evaluate_with_vllm(wanted, ranks or 1)
    return 0


@cli.command()
@click.option(
    "--on", type=FILE, multiple=True, metavar="PAIR", help="Compare on this pair, not on the suite's; repeatable."
)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set one key of every recipe; repeatable.")
@click.option("--seed", "seeds", type=int, multiple=True, help="A training seed, not the suite's; repeatable.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, metavar="N", help="Runs at a time.")
@click.option("--ranks", type=click.IntRange(min=1), metavar="N", help="Processes of each run.")
@click.option("--out", type=FILE, default=Path("runs/compare"), metavar="DIR", help="Where run folders and results go.")
@click.option("--ledger", type=FILE, metavar="DIR", help="Where results go, if not to --out.")
@click.option("--dry-run", is_flag=True, help="Say which runs there are and which are missing, and run none.")
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
    """Run what is missing of SUITE, recipes times training seeds, and report."""
    from kdzoo.compare.suite import load_suite

    loaded = load_suite(suite, on, sets, plugins, seeds)
    from kdzoo.compare.runner import Comparison

    file = (ledger or out) / f"{loaded.name}.json"
    comparison = Comparison(loaded, out / "cells", file, _report_beside, jobs, ranks)
    return comparison.list_missing() if dry_run else comparison.run()


@cli.command()
@click.option("--title", metavar="TEXT", help="Of the page, if not the first suite's.")
@click.option("--markdown", type=FILE, metavar="FILE", help="Where the Markdown goes, if not beside the first SUITE.")
@click.option("--html", type=FILE, metavar="FILE", help="Where the HTML page goes.")
@click.option("--figures", type=FILE, metavar="DIR", help="Where the figures go, as PNG.")
@click.argument("suites", type=FILE, nargs=-1, required=True, metavar="SUITE...")
def report(
    suites: Sequence[Path], title: str | None, markdown: Path | None, html: Path | None, figures: Path | None
) -> None:
    """Make the report of SUITE, a file of a ledger; of several, one page."""
    from kdzoo.report.write import Places

    beside = Places.beside(suites[0])
    places = Places(markdown or beside.markdown, html or beside.html, figures or beside.figures)
    _report(suites, places, title)


@cli.command()
@click.option("--suite", "of_suites", is_flag=True, help="Of suites, not of recipes.")
@plugin_option
@click.option("--write", type=FILE, metavar="PATH", help="Write it to a file.")
def schema(of_suites: bool, plugins: Sequence[Path], write: Path | None) -> None:
    """Print the JSON Schema of recipe files, made from the plugins."""
    _print_or_write(_json(_schema_of_suites() if of_suites else _schema_of_recipes(plugins)) + "\n", write)


@cli.command()
@plugin_option
@click.option("--write", type=FILE, metavar="PATH", help="Write it to a file.")
def docs(plugins: Sequence[Path], write: Path | None) -> None:
    """Print what the plugins offer as a page of Markdown."""
    from kdzoo.plugin.declarations import declarations
    from kdzoo.plugin.markdown import page

    _print_or_write(page(declarations(plugins)), write)


@cli.command("list")
@plugin_option
@click.option("--json", "as_json", is_flag=True, help="Everything that is declared, as JSON.")
def list_plugins(plugins: Sequence[Path], as_json: bool) -> None:
    """List what the plugins offer, with all parameters."""
    from dataclasses import asdict

    from kdzoo.plugin.declarations import declarations

    declared = declarations(plugins)
    if as_json:
        click.echo(_json(asdict(declared)))
    elif sys.stdout.isatty():
        _print_tables(declared)
    else:
        click.echo("\n".join(_lines(declared)))


@cli.command()
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set a parameter of the loss; repeatable.")
@click.option("--ranks/--no-ranks", default=True, help="Whether two ranks of ZeRO-3 are tried, half a minute.")
@plugin_option
@click.argument("name_or_file")
def check(name_or_file: str, sets: Sequence[str], ranks: bool, plugins: Sequence[Path]) -> int:
    """Hold a loss, or every loss of a plugin file, to what losses promise."""
    from kdzoo.plugin.registry import losses_called
    from kdzoo.recipe.load import flag
    from kdzoo.recipe.merge import merge
    from kdzoo.testing import conformance

    params = merge([flag(text) for text in sets]).document
    kept = True
    for loss in losses_called(name_or_file, plugins):
        results = conformance(loss, params, ranks=ranks)
        click.echo(f"{loss.name}{f' with {json.dumps(params)}' if params else ''}")
        for result in results:
            mark = click.style("FAILED", fg="red") if result.fault else click.style("ok", fg="green") + "    "
            click.echo(f"  {mark}  {result.check:<12}{result.promise}")
            if result.fault:
                click.echo(f"          {result.fault}")
                kept = False
    return 0 if kept else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 2 for what the user can fix."""
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
    places = {"teacher": 0, "sft": 1, "distill": 3}  # what makes an artefact stands between, as it runs
    in_order = sorted(recipe.stages.items(), key=lambda item: places.get(item[0], 2))
    stages = ", ".join(_length(name, stage) for name, stage in in_order)
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
    return f"{amount} × {slot.use}" + (f" as '{name}'" if name != slot.use else "")


def _length(name: str, stage: Stage) -> str:
    count, unit = (stage.steps, "step") if stage.steps else (stage.epochs, "epoch")
    return f"{name} ({count:g} {unit}{'' if count == 1 else 's'})"


def _origins(loaded: LoadedRecipe) -> Iterator[str]:
    """One line per leaf: its address, its value, and who set it."""
    from kdzoo.recipe.merge import in_text, leaves

    for at, value in leaves(loaded.resolved):
        address = in_text(at)
        yield f"{address} = {json.dumps(value, ensure_ascii=False)}  ({loaded.provenance[address]})"


# list


def _lines(declared: Declarations) -> Iterator[str]:
    """What is declared, in plain lines."""
    for kind, plugins in _kinds(declared):
        yield f"{kind}:"
        for plugin in plugins.values():
            yield f"  {plugin.name}  [{plugin.plugin}]  {_first_line(plugin.doc)}"
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
            what = filter(None, (_first_line(plugin.doc), plugin.formula, plugin.paper))
            parameters = (parameter for parameter, _ in _parameters(plugin.params))
            cells = (plugin.name, plugin.plugin, "\n".join(what), "\n".join(parameters))
            table.add_row(*map(Text, cells))  # Text: a formula's brackets are no markup
        console.print(table)


def _kinds(declared: Declarations) -> Iterator[tuple[str, dict[str, Declared]]]:
    """Those of which there are any."""
    kinds = {
        "losses": declared.losses,
        "aligners": declared.aligners,
        "fusions": declared.fusions,
        "anatomies": declared.anatomies,
        "trackers": declared.trackers,
    }
    yield from ((kind, plugins) for kind, plugins in kinds.items() if plugins)


def _parameters(schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of each parameter: `width (integer ≥ 1, default 64)`, and its documentation on one line."""
    from kdzoo.plugin.json_schema import in_words, value_in_words

    for name, parameter in schema.get("properties", {}).items():
        default = f", default {value_in_words(parameter['default'])}" if "default" in parameter else ""
        yield f"{name} ({in_words(parameter)}{default})", " ".join(parameter.get("description", "").split())


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
