from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from kdzoo.data.rows import Row
from kdzoo.data.template import prompt_of
from kdzoo.errors import DataError
from kdzoo.recipe.model import Template

Make = Callable[[str], PreTrainedTokenizerFast]

BARE = Row("a", "Add {input}.", "", ("2",))
FULL = Row("b", "Add {input}.", "{instruction} 1", ("2",))


def test_the_two_forms_are_this_literatures(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_of(BARE, Template(), bytes_tokenizer) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {input}.\n\n### Response:\n"
    )
    assert prompt_of(FULL, Template(), bytes_tokenizer).endswith(
        "\n\n### Instruction:\nAdd {input}.\n\n### Input:\n{instruction} 1\n\n### Response:\n"
    )


def test_other_braces_and_another_order_are_left_alone(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template(prompt_with_input='{"q": {}} {input} -> {instruction}!')
    assert prompt_of(FULL, template, bytes_tokenizer) == '{"q": {}} {instruction} 1 -> Add {input}.!'


def test_a_form_that_loses_the_row_is_refused(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"^data.template.prompt_with_input: has no '\{input\}'"):
        prompt_of(FULL, Template(prompt_with_input="{instruction}"), bytes_tokenizer)


def test_a_chat_template_is_the_tokenizers_own(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bytes")
    with pytest.raises(DataError, match=r"^data.template.chat: .* has no chat template"):
        prompt_of(BARE, Template(chat=True), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[me|{% endif %}"
    assert prompt_of(FULL, Template(chat=True), tokenizer) == "[user|Add {input}.\n\n{instruction} 1][me|"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match=r"^data.template.chat: .* fails \(TemplateError: no\)"):
        prompt_of(BARE, Template(chat=True), tokenizer)
