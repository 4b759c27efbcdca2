"""How a row becomes a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdzoo.data.place import one_line
from kdzoo.data.rows import Row
from kdzoo.errors import DataError
from kdzoo.recipe.model import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prompt_of(row: Row, template: Template, tokenizer: PreTrainedTokenizerFast) -> str:
    """The prompt that stands before the response.

    Two forms, with and without an input, or with `chat` the tokenizer's own chat template around one user
    turn.
    """
    if template.chat:
        return _chat(row, tokenizer)
    if row.input:
        return _filled("prompt_with_input", template.prompt_with_input, instruction=row.instruction, input=row.input)
    return _filled("prompt", template.prompt, instruction=row.instruction)


def _filled(key: str, form: str, **parts: str) -> str:
    """`form` with its marks replaced, each once; all other braces stay as they are."""
    places = {name: form.find("{" + name + "}") for name in parts}
    missing = [name for name, place in places.items() if place < 0]
    if missing:
        raise DataError(
            f"data.template.{key}: has no '{{{missing[0]}}}', so that every row would lose its {missing[0]}; add it"
        )
    filled, end = [], 0
    for name in sorted(parts, key=places.__getitem__):
        filled += [form[end : places[name]], parts[name]]
        end = places[name] + len(name) + 2
    return "".join([*filled, form[end:]])


def _chat(row: Row, tokenizer: PreTrainedTokenizerFast) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"data.template.chat: the tokenizer '{tokenizer.name_or_path}' has no chat template; "
            "set it to false, or choose a tokenizer that has one"
        )
    content = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
    try:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # the template is a program of its author's
        raise DataError(
            f"data.template.chat: the chat template of '{tokenizer.name_or_path}' fails ({one_line(error)}); "
            "set it to false, or choose another tokenizer"
        ) from error
    assert isinstance(prompt, str)
    return prompt
