"""The model card of an exported student: what it was distilled from, by which methods, how well it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCardData

from kdzoo.evaluate import ModelScores, Scores
from kdzoo.recipe.model import Lora, Ramp
from kdzoo.run.progress import score_columns, score_legend

USE = {
    "transformers": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this file is\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
    ),
    "peft": (
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n\n"
        'folder = "."  # where this file is\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(folder)\n"
    ),
}
"""How a reader loads the folder, by the library that wrote it."""


class CardLoss(NamedTuple):
    """One term of the loss, as the card names it."""

    term: str
    name: str
    paper: str
    formula: str
    weight: float | Ramp


def write_model_card(
    folder: Path,
    title: str,
    base: str,
    losses: Sequence[tuple[str, str, str, str, float | Ramp]],
    recipe_name: str,
    scores: Scores,
    *,
    teacher: str | None = None,
    data: str | None = None,
    base_model: str | None = None,
    lora: Lora | None = None,
) -> Path:
    """`README.md` in `folder`, Markdown with the front matter that the Hugging Face hub reads.

    `base`, `teacher` and `data` name in words what the student started from, learnt from and was trained on;
    `base_model` is the student's name on the hub, where it has one. Losses are in the order of `CardLoss`.
    """
    facts = {
        "Student": base,
        "Trained": None if lora is None else _trained(lora),
        "Teacher": teacher,
        "Data": data,
        "Recipe": f"`{recipe_name}` (`recipe.json`)",
    }
    library = "peft" if lora is not None and lora.export == "adapter" else "transformers"
    parts = [
        f"---\n{_front_matter(base_model, library)}\n---",
        f"# {title}",
        "A language model distilled with kdzoo.",
        "\n".join(f"- {name}: {text}" for name, text in facts.items() if text),
        "## Methods",
        "\n".join(_method(CardLoss(*loss)) for loss in losses),
        *_score_parts(scores),
        "## Use",
        f"```python\n{USE[library]}```",
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _trained(lora: Lora) -> str:
    targets = "all linear modules" if isinstance(lora.targets, str) else ", ".join(f"`{name}`" for name in lora.targets)
    alpha = lora.rank if lora.alpha is None else lora.alpha
    kept = "merged into the weights" if lora.export == "merged" else "this folder holds nothing else"
    return f"LoRA, rank {lora.rank}, alpha {alpha:g}, dropout {lora.dropout:g}, on {targets}; {kept}"


def _front_matter(base_model: str | None, library: str) -> str:
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        base_model=base_model,
        tags=["distillation", "kdzoo"],
    )
    return data.to_yaml().strip()


def _method(loss: CardLoss) -> str:
    """A list item: a table would break at the bars of a formula."""
    weight = loss.weight
    if isinstance(weight, Ramp):
        weight_text = f"{weight.start:g} to {weight.end:g} over {weight.steps} steps"
    else:
        weight_text = f"{weight:g}"
    return f"- **{loss.term}** (`{loss.name}`, weight {weight_text}): `{loss.formula}`\n  {loss.paper}"


def _score_parts(scores: Scores) -> list[str]:
    if not scores:
        return []
    parts = ["## Scores"]
    for name, models in scores.items():
        parts += [f"### {name}", _score_table(models)]
    return [*parts, "\n".join(f"- {line}" for line in score_legend(scores))]


def _score_table(models: Mapping[str, ModelScores]) -> str:
    columns = score_columns(models)
    titles = [
        "model",
        *("".join(c.title) if c.title[0].endswith("-") else " ".join(c.title) for c in columns),
    ]
    rows = [[model, *(column.cells.get(model, "–") for column in columns)] for model in models]
    return "\n".join([_row(titles), _row(["---", *("---:" for _ in columns)]), *(_row(cells) for cells in rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
