from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from kdzoo.data.encode import Encoder
from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.recipe.model import Data, Source, Template

Make = Callable[[str], PreTrainedTokenizerFast]

PROMPT = "### Instruction:\nName it.\n\n### Response:\n"
ANSWERS = ["Mont Blanc", " leading space", "\nnewline", "👩‍🚀 漢字", "naïve\n\n  x ", "a"]
REAL = ("gpt2", "mistral-7b-v0.1", "qwen1.5-1.8b", "tinyllama-1.1b")


def data(**lengths: int) -> Data:
    return Data(train=Source(), **lengths)


def real(shared: Path, name: str) -> PreTrainedTokenizerFast:
    return load_tokenizer(shared / "tokenizers" / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_ids_are_the_text_as_the_tokenizer_reads_it_and_its_end(name: str, answer: str, shared: Path) -> None:
    tokenizer = real(shared, name)
    (encoded,) = Encoder(tokenizer, data()).encode([PROMPT], [answer])
    assert encoded.ids == [*tokenizer(PROMPT + answer)["input_ids"], tokenizer.eos_token_id]
    assert encoded.text == answer
    assert len(encoded.starts) == len(encoded.ends) == len(encoded.response_ids)
    assert (encoded.starts[-1], encoded.ends[-1]) == (len(answer), len(answer))
    assert encoded.ends[0] > 0 == encoded.starts[0]
    assert list(encoded.ends) == sorted(encoded.ends)
    if name in ("mistral-7b-v0.1", "tinyllama-1.1b"):
        assert encoded.ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", REAL)
def test_prompts_alone_are_the_beginning_of_both_together(name: str, shared: Path) -> None:
    encoder = Encoder(real(shared, name), data(max_prompt_length=7))
    (prompt,), (both,) = encoder.encode_prompts([PROMPT]), encoder.encode([PROMPT], ["Mont Blanc"])
    assert prompt == both.ids[:7]
    assert both.prompt_length == 7


def test_the_first_tokens_of_the_prompt_stay_and_the_response_is_cut(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    whole = Encoder(bytes_tokenizer, data()).encode([PROMPT], ["Mont Blanc"])[0]
    short = data(max_length=6 + len(whole.response_ids) - 1, max_prompt_length=6)
    cut = Encoder(bytes_tokenizer, short).encode([PROMPT], ["Mont Blanc"])[0]
    assert cut.ids[:6] == whole.ids[:6]
    assert cut.response_ids == whole.response_ids[:-1]
    exact = data(max_length=6 + len(whole.response_ids), max_prompt_length=6)
    assert Encoder(bytes_tokenizer, exact).encode([PROMPT], ["Mont Blanc"])[0].ids[6:] == whole.response_ids


def test_a_cut_never_leaves_a_part_of_a_character(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    ends = set()
    for length in range(9, 22):
        lengths = data(max_length=length, max_prompt_length=8)
        (encoded,) = Encoder(bytes_tokenizer, lengths).encode([PROMPT], ["a👩b漢c"])
        decoded = bytes_tokenizer.decode(encoded.response_ids, skip_special_tokens=True)
        assert decoded == encoded.text[: encoded.ends[-1]]
        ends.add(encoded.ends[-1])
    assert ends == {1, 2, 3, 4, 5}


def test_an_empty_response_and_one_without_room_have_no_tokens(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoder = Encoder(bytes_tokenizer, data(max_length=8, max_prompt_length=8))
    assert [list(encoded.ends) for encoded in encoder.encode([PROMPT, "Q"], ["yes", ""])] == [[], []]
    assert encoder.encode([], []) == []


def test_a_chat_prompt_gets_no_second_special_token(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("spaces")
    prompt = "<s>Q"
    plain = Encoder(tokenizer, data()).encode([prompt], ["A"])[0]
    chat = Encoder(tokenizer, Data(train=Source(), template=Template(chat=True))).encode([prompt], ["A"])[0]
    assert plain.ids[:2] == [tokenizer.bos_token_id] * 2
    assert chat.ids == plain.ids[1:]


def test_an_end_that_the_tokenizer_adds_itself_is_not_doubled(make_tokenizer: Make) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer, plain = make_tokenizer("spaces"), make_tokenizer("spaces")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ours, theirs = Encoder(tokenizer, data()), Encoder(plain, data())
    assert ours.encode(["Q"], ["A"])[0].ids == theirs.encode(["Q"], ["A"])[0].ids
    assert ours.encode_prompts(["Q"]) == theirs.encode_prompts(["Q"])


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_a_response_that_was_cut_has_no_end(kind: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(kind)
    encoder = Encoder(tokenizer, data())
    whole, cut = encoder.encode([PROMPT] * 2, ["Mont Blanc", "Mont Blanc"], [True, False])
    assert whole.ids == [*cut.ids, tokenizer.eos_token_id]
    assert (*cut.starts, 10) == tuple(whole.starts)
    assert (*cut.ends, 10) == tuple(whole.ends)
    assert encoder.encode([PROMPT], ["Mont Blanc"]) == [whole]
