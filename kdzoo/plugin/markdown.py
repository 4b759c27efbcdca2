"""What plugins declare as a page of Markdown, for readers on the web."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from kdzoo.plugin.declarations import Declarations, Declared
from kdzoo.plugin.json_schema import in_words

MODELS = ("student", "teacher")

OTHERS = {
    "token_weights": (
        "Token weights",
        "How much each token of a response counts in a loss: `token_weights` in a recipe, which a loss names in "
        "`weights`. A weighted sum is divided by the sum of all weights of the optimizer step, so that tokens of "
        "weight 0 are as if they were not there.",
    ),
    "aligner": ("Aligners", "Which tokens of two tokenizers belong together: `align` in a recipe."),
    "fusion": ("Fusions", "What a block of experts of the teacher is read as: `fuse` in a recipe."),
    "tracker": ("Trackers", "Where the steps of a run are sent: `trackers` in a recipe."),
}
"""Kind -> its title and what it is for."""


def page(declared: Declarations) -> str:
    """Everything that is declared: a table of all losses, then a section for each, then the other kinds."""
    blocks = [
        "<!-- Written by `kdzoo docs`, from the plugins; change those. -->",
        "# The zoo",
        "What each plugin offers, as it declares it. A recipe names a loss in `use` and sets its parameters in "
        "`params`; values here are written as in a recipe. What a loss reads is what it reads with its default "
        "parameters. With a value that couples the samples of a batch, as some authors' code does, a sample's loss "
        "depends on its neighbours.",
        *_losses(list(declared.of("loss").values())),
        *(block for kind, plugins in _other_kinds(declared) for block in _others(*_about(kind), plugins)),
        *_families(list(declared.of("model_adapter"))),
    ]
    return "\n\n".join(blocks) + "\n"


# Losses


def _losses(losses: Sequence[Declared]) -> Iterator[str]:
    if not losses:
        return
    yield "## Losses"
    yield _table(
        ("`use`", "paper", "tokenizers", "reads"),
        ((_link(loss), _short_paper(loss.paper), _tokenizers(loss), _in_short(loss)) for loss in losses),
    )
    for position, loss in enumerate(losses):
        yield from _loss(loss, [other for other in losses[:position] if other.plugin == loss.plugin])


def _loss(loss: Declared, before: Sequence[Declared]) -> Iterator[str]:
    """Its section; `before` are the losses of its plugin that have theirs above."""
    yield f"### `{loss.name}`"
    yield _paragraphs(loss.doc)
    yield _code(loss.formula)
    yield _with_links(_prose(loss.paper))
    yield "\n".join(f"- {name}: {what}" for name, what in _facts(loss))
    yield from _parameters(loss, before)
    yield from _deviations(loss)


def _deviations(plugin: Declared) -> Iterator[str]:
    if plugin.deviations:
        yield "**Where it differs from its authors' code**"
        yield _list(map(_prose, plugin.deviations))


def _facts(loss: Declared) -> Iterator[tuple[str, str]]:
    yield "plugin", f"`{loss.plugin}`"
    yield "tokenizers", _tokenizers(loss)
    if loss.needs:
        one, two = _reads(loss.needs["one"]), _reads(loss.needs.get("two", loss.needs["one"]))
        yield "reads", _together(what for what in one if what in two)
        for count, these, those in (("one tokenizer", one, two), ("two tokenizers", two, one)):
            if more := [what for what in these if what not in those]:
                yield f"with {count} also", _together(more)
        if streams := loss.needs["one"]["streams"]:
            yield "sends states of its own through heads", ", ".join(f"`{name}`" for name in streams)
        if stages := loss.needs["one"]["artifacts"]:
            yield "needs the stage", ", ".join(f"`{stage}`" for stage in stages)
    if loss.couples:
        yield "couples the samples of a batch with", _values(loss.couples)


def _tokenizers(loss: Declared) -> str:
    return "one or two" if "two" in loss.needs else "one" if loss.needs else "see its parameters"


def _reads(needs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the core must have at hand: whose, and what."""
    student, teacher = ([*(["logits"] if model in needs["logits"] else []), *needs[model]] for model in MODELS)
    of_both = [what for what in student if what in teacher]
    found = [("both models'", what) for what in of_both]
    found += [("the student's", what) for what in student if what not in of_both]
    found += [("the teacher's", what) for what in teacher if what not in of_both]
    found = [(whose, what if what == "logits" else _code(what)) for whose, what in found]
    found += [("the fact", _code(fact)) for fact in needs["facts"]]
    found += [("the map of entries", _code(name)) for name in needs["entries"]]
    says = {
        "aligned": ("the aligner's", "pairs or spans"),
        "vocabularies": ("both vocabularies'", "texts"),
        "statistics": ("the teacher's", "training rows before the first step"),
    }
    return found + [phrase for key, phrase in says.items() if needs[key]]


def _together(found: Iterable[tuple[str, str]]) -> str:
    """both models' logits and `hidden.last`; the fact `teacher.correct`"""
    whose: dict[str, list[str]] = {}
    for owner, what in found:
        whose.setdefault(owner, []).append(what)
    return "; ".join(f"{owner} {_listed(what, 'and')}" for owner, what in whose.items())


def _in_short(loss: Declared) -> str:
    """For the table: kinds of things, not names."""
    both = list(loss.needs.values())
    sites = {site.partition(".")[0] for needs in both for site in (*needs["student"], *needs["teacher"])}
    kinds = {
        "logits": any(needs["logits"] or needs["streams"] for needs in both),
        "states": "hidden" in sites,
        "embeddings": "embed" in sites,
        "experts": bool(sites & {"experts", "router", "fused"}),
        "heads": "head" in sites,
        "facts": any(needs["facts"] for needs in both),
        "vocabularies": any(needs["vocabularies"] or needs["entries"] for needs in both),
        "alignment": any(needs["aligned"] for needs in both),
        "a stage": any(needs["artifacts"] for needs in both),
    }
    return ", ".join(kind for kind, is_read in kinds.items() if is_read)


def _values(pairs: Iterable[Sequence[Any]]) -> str:
    """`matching` "rank_batch"; `reduction` "padded" or "padded_last", all in code."""
    by_name = ((name, [value for _, value in group]) for name, group in groupby(pairs, key=lambda pair: pair[0]))
    return "; ".join(f"`{name}` {_listed(list(map(_value, values)), 'or')}" for name, values in by_name)


# The other kinds


def _other_kinds(declared: Declarations) -> Iterator[tuple[str, Mapping[str, Declared]]]:
    """Kinds with a section for each plugin: those with a sentence of their own first, then whatever else there is."""
    rest = [kind for kind in declared.by_kind if kind not in OTHERS and kind not in ("loss", "model_adapter")]
    yield from ((kind, declared.of(kind)) for kind in (*OTHERS, *rest))


def _about(kind: str) -> tuple[str, str]:
    """Its title, and what it is for."""
    return OTHERS.get(kind, (f"{kind.replace('_', ' ').capitalize()} plugins", f"Plugins of the kind `{kind}`."))


def _others(title: str, what: str, plugins: Mapping[str, Declared]) -> Iterator[str]:
    if not plugins:
        return
    yield f"## {title}"
    yield what
    declared = list(plugins.values())
    for position, plugin in enumerate(declared):
        yield f"### `{plugin.name}`"
        yield _paragraphs(plugin.doc)
        if plugin.formula:
            yield _code(plugin.formula)
            yield _with_links(_prose(plugin.paper))
        yield from _parameters(plugin, [other for other in declared[:position] if other.plugin == plugin.plugin])
        yield from _deviations(plugin)


def _families(families: Sequence[str]) -> Iterator[str]:
    if families:
        yield "## Model families"
        yield "By `model_type` of a model's configuration: " + ", ".join(f"`{name}`" for name in families) + "."


# Parameters


def _parameters(plugin: Declared, before: Sequence[Declared]) -> Iterator[str]:
    """Its parameters; those which an earlier one of `before` has in the same words are named with a link."""
    own: list[str] = []
    shared: dict[str, list[str]] = {}
    for name, parameter in plugin.params.get("properties", {}).items():
        same = next((other for other in before if other.params.get("properties", {}).get(name) == parameter), None)
        if same is not None:
            shared.setdefault(_link(same), []).append(f"`{name}`")
        else:
            own.append(_parameter(name, parameter))
    own += [f"{_listed(names, 'and')}: as of {link}" for link, names in shared.items()]
    if own:
        yield "**Parameters**"
        yield _list(own)


def _parameter(name: str, parameter: Mapping[str, Any]) -> str:
    """`name`: what it takes, its default; then its documentation on a line of its own."""
    default = f", default {_value(parameter['default'])}" if "default" in parameter else ", required"
    meaning = " ".join(parameter.get("description", "").split())
    return f"`{name}`: {_takes(parameter)}{default}" + (f"\\\n  {_prose(meaning)}" if meaning else "")


def _takes(schema: Mapping[str, Any]) -> str:
    match schema:
        case {"const": value}:
            return _value(value)
        case {"enum": values}:
            return _listed(list(map(_value, values)), "or")
        case {"anyOf": branches}:
            return ", or ".join(_takes(branch) for branch in branches)
        case {"type": "null"}:
            return "`null`"
    return in_words(schema)


# Markdown


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _link(plugin: Declared) -> str:
    return f"[`{plugin.name}`](#{plugin.name})"


def _listed(words: Sequence[str], last: str) -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if words[1:] else words[0]


def _code(text: str) -> str:
    return f"`{text}`"


def _value(value: Any) -> str:
    return _code(json.dumps(value, ensure_ascii=False))


def _paragraphs(text: str) -> str:
    return "\n\n".join(_prose(" ".join(part.split())) for part in re.split(r"\n\s*\n", text))


def _prose(text: str) -> str:
    """A docstring's sentence, with nothing in it that Markdown would take for its own but code."""
    return re.sub(r"(`[^`]*`)|([\\<*~])", lambda found: found[1] or "\\" + found[2], text)


ADDRESS = re.compile(r"(?<![\w/.])((?:[a-z][\w-]*\.)+[a-z]{2,}/[^\s;,)]+)")


def _with_links(text: str) -> str:
    return ADDRESS.sub(r"[\1](https://\1)", text)


def _short_paper(paper: str) -> str:
    """Of "Authors, Title, Venue and year, address": first and third, as a link; all of it where no address is."""
    parts = paper.split(", ")
    at = next((place for place, part in enumerate(parts) if ADDRESS.match(part)), None)
    if not at:
        return _prose(paper)
    address = ADDRESS.match(parts[at])
    assert address is not None
    return f"[{_prose(f'{parts[0]}, {parts[at - 1]}' if at > 1 else parts[0])}](https://{address[1]})"


__all__ = ["page"]
