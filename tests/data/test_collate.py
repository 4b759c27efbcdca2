from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kdzoo.api.aligner import Aligner, Alignment, Tokens
from kdzoo.api.plugin import NoParams
from kdzoo.data.collate import Example, build_examples, collate
from kdzoo.data.encode import Encoded, Encoder
from kdzoo.data.rows import Row
from kdzoo.errors import DataError
from kdzoo.recipe.model import Data, Source, Template

ROWS = [Row("a", "One", "", ("Mont Blanc",)), Row("b", "Two", "of them", ("Elbrus", "Mont Blanc"))]


class FirstTwo(Aligner):
    """The first two tokens of the student belong to the teacher's first, the next to the next."""

    name = "first_two"

    def align(self, student: Tokens, teacher: Tokens) -> Alignment:
        return Alignment(pairs=[(2, 1)], spans=[(0, 2, 0, 1), (2, 3, 1, 2)])


def encoded(prompt: Sequence[int], response: Sequence[int]) -> Encoded:
    places = range(1, len(response) + 1)
    return Encoded(
        [*prompt, *response], len(prompt), [place - 1 for place in places], list(places), "x" * len(response)
    )


def example(student: Encoded, teacher: Encoded) -> Example:
    return Example("e", student, teacher, FirstTwo(NoParams()).align(None, None))  # type: ignore[arg-type]


TWO = [
    example(encoded([1, 2], [3, 4, 5]), encoded([11], [12, 13])),
    example(encoded([6], [7, 8, 9, 10]), encoded([14, 15, 16], [17, 18])),
]
BOTH = {"same_tokens": False, "rows": "response", "pad_id_student": 0, "pad_id_teacher": 99}


def test_tokens_are_the_positions_that_predict_a_response_token() -> None:
    batch = collate(TWO, **BOTH)
    student, teacher = batch.student, batch.teacher
    assert student is not None and teacher is not None
    assert student.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert student.positions.tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert student.labels.tolist() == [3, 4, 5, 7, 8, 9, 10]
    assert student.inputs.tolist() == [2, 3, 4, 6, 7, 8, 9]
    assert student.sample.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert teacher.input_ids.tolist() == [[11, 12, 13, 99, 99], [14, 15, 16, 17, 18]]
    assert teacher.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert teacher.positions.tolist() == [0, 1, 7, 8]
    assert teacher.labels.tolist() == [12, 13, 17, 18]


def test_spans_are_numbered_over_the_batch_and_pairs_name_packed_tokens() -> None:
    batch = collate(TWO, **BOTH)
    assert batch.student is not None and batch.teacher is not None
    assert batch.student.span.tolist() == [0, 0, 1, 2, 2, 3, -1]
    assert batch.teacher.span.tolist() == [0, 1, 2, 3]
    assert batch.pairs.tolist() == [[2, 1], [5, 3]]
    assert batch.counts == {"tokens": 7, "teacher_tokens": 4, "pairs": 2, "spans": 4, "sequences": 2}


def test_every_real_token_of_the_teacher_can_be_scored() -> None:
    batch = collate(TWO, **{**BOTH, "rows": "sequence", "pad_id_student": None})
    assert batch.student is None and batch.teacher is not None
    assert batch.teacher.positions.tolist() == [0, 1, 5, 6, 7, 8]
    assert batch.teacher.labels.tolist() == [12, 13, 15, 16, 17, 18]
    assert batch.teacher.span.tolist() == [0, 1, -1, -1, 2, 3]
    assert batch.counts == {"tokens": 0, "teacher_tokens": 6, "pairs": 0, "spans": 0, "sequences": 2}
    with_student = collate(TWO, **{**BOTH, "rows": "sequence"})
    assert with_student.student is not None and len(with_student.student) == 7
    assert with_student.pairs.tolist() == [[2, 1], [5, 5]]


def test_a_text_without_a_prompt_does_not_score_its_first_token() -> None:
    lone = [example(encoded([], [3, 4, 5]), encoded([], [12, 13]))]
    batch = collate(lone, **BOTH)
    assert batch.student is not None
    assert batch.student.positions.tolist() == [0, 1]
    assert batch.student.span.tolist() == [0, 1]
    assert batch.pairs.tolist() == [[1, 0]]
    assert batch.counts["spans"] == 1  # of the two, the first has no row on the teacher's side
    assert collate([replace(lone[0], alignment=Alignment([(0, 0)], []))], **BOTH).pairs.tolist() == []


@pytest.mark.parametrize("absent", [None, "pad_id_student", "pad_id_teacher"])
def test_without_examples_there_is_a_stand_in_without_tokens(absent: str | None) -> None:
    batch = collate([], **{**BOTH, **({absent: None} if absent else {})})
    assert set(batch.counts.values()) == {0.0}
    assert batch.pairs.shape == (0, 2)
    for side, name in ((batch.student, "pad_id_student"), (batch.teacher, "pad_id_teacher")):
        assert (side is None) == (name == absent)
        if side is not None:
            assert side.input_ids.shape == (1, 2)
            assert side.attention_mask.all()
            assert len(side) == len(side.labels) == len(side.span) == 0
            assert side.positions.dtype == side.labels.dtype == torch.long


def test_collating_parts_scores_the_same_tokens_as_the_whole() -> None:
    whole, parts = collate(TWO, **BOTH), [collate([one], **BOTH) for one in TWO]
    for key in whole.counts:
        assert whole.counts[key] == sum(part.counts[key] for part in parts)
    assert whole.student is not None
    labels = torch.cat([part.student.labels for part in parts if part.student is not None])
    assert whole.student.labels.equal(labels)


DATA = Data(train=Source(), template=Template(prompt="{instruction}:\n", prompt_with_input="{instruction} {input}:\n"))


def test_one_tokenizer_is_asked_once_and_aligned_with_itself(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoder = Encoder(bytes_tokenizer, DATA)
    examples = build_examples(ROWS, encoder, encoder, None, same=True, address="data.train")
    assert [one.id for one in examples] == ["a", "b"]
    assert all(one.student is one.teacher for one in examples)
    batch = collate(examples, same_tokens=True, rows="response", pad_id_student=0, pad_id_teacher=0)
    assert batch.student is not None and batch.teacher is not None
    every_row = torch.arange(len(batch.student))
    assert batch.pairs.equal(every_row[:, None].expand(-1, 2))
    assert batch.student.span.equal(every_row) and batch.teacher.span.equal(every_row)
    assert batch.student.labels.equal(batch.teacher.labels)
    said = bytes_tokenizer.decode(batch.student.labels[batch.student.sample == 1])
    assert said == "Elbrus<end>"  # of several references, the first


def test_two_tokenizers_are_aligned_by_the_aligner(
    bytes_tokenizer: PreTrainedTokenizerFast, spaces_tokenizer: PreTrainedTokenizerFast
) -> None:
    student, teacher = Encoder(bytes_tokenizer, DATA), Encoder(spaces_tokenizer, DATA)
    first_two = FirstTwo(NoParams())

    def align(ours: Sequence[Tokens], theirs: Sequence[Tokens]) -> list[Alignment]:
        return [first_two.align(mine, yours) for mine, yours in zip(ours, theirs, strict=True)]

    (one, _) = build_examples(ROWS, student, teacher, align, same=False, address="data.train")
    assert one.alignment is not None and one.alignment.pairs == [(2, 1)]
    assert one.student is not None and one.teacher is not None
    assert one.student.text == one.teacher.text == "Mont Blanc"


def test_one_model_alone_has_no_alignment(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(bytes_tokenizer, DATA)
    alone = build_examples(ROWS, None, encoder, None, same=False, address="data.train")
    assert all(one.student is None and one.teacher is not None and one.alignment is None for one in alone)
    alone = build_examples(ROWS, encoder, None, None, same=True, address="data.train")
    assert all(one.student is not None and one.teacher is None for one in alone)


def test_rows_without_a_response_token_are_counted_and_the_first_is_named(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [*ROWS, Row("c", "Three", "", ("",)), Row("d", "Four", "", ("",))]
    with pytest.raises(
        DataError, match=r"^data.train: 2 rows have no response token; the first, 'c', has an empty resp"
    ):
        build_examples(rows, Encoder(bytes_tokenizer, DATA), None, None, same=False, address="data.train")
    full = DATA.model_copy(update={"max_length": 8, "max_prompt_length": 8})
    rows = [Row("long", "A long prompt that has many tokens", "", ("x",))]
    with pytest.raises(
        DataError, match=r"^data.train: 1 row has no .* 'long', has a prompt as long as 'data.max_length' \(8 "
    ):
        build_examples(rows, Encoder(bytes_tokenizer, full), None, None, same=False, address="data.train")


# Columns of the rows, for token weights


def examples_of(tokenizer: PreTrainedTokenizerFast, column: float | tuple[float, ...], **data: int) -> list[Example]:
    rows = [Row("a", "One of the mountains", "", ("Elbrus, or Mont Blanc",), {"weight": column})]
    encoder = Encoder(tokenizer, Data(train=Source(lab="train"), template=Template(prompt="{instruction}"), **data))
    return build_examples(rows, encoder, None, None, False, "data.train", ["weight"])


def column_of(examples: Sequence[Example]) -> list[float]:
    batch = collate(
        examples, same_tokens=False, rows="response", pad_id_student=0, pad_id_teacher=None, columns=["weight"]
    )
    assert batch.student is not None and batch.columns["weight"].shape == batch.student.labels.shape
    return batch.columns["weight"].tolist()


def test_a_number_of_a_row_stands_on_each_of_its_tokens(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = examples_of(bytes_tokenizer, 0.5)
    assert example.student is not None
    assert column_of([example]) == [0.5] * len(example.student.response_ids)
    other = replace(example, columns={"weight": [2.0] * len(example.student.response_ids)})
    assert column_of([example, other]) == [0.5] * len(example.student.response_ids) + [2.0] * len(
        example.student.response_ids
    )


def test_a_number_for_each_token_may_leave_out_the_end_which_then_weighs_as_the_last(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    (example,) = examples_of(bytes_tokenizer, 1.0)
    assert example.student is not None
    count = len(example.student.response_ids)
    each = tuple(float(i) for i in range(count))
    assert column_of(examples_of(bytes_tokenizer, each)) == list(each)
    assert column_of(examples_of(bytes_tokenizer, each[:-1])) == [*each[:-1], each[-2]]


def test_numbers_of_tokens_that_are_cut_off_are_left_out(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    (whole,) = examples_of(bytes_tokenizer, 1.0)
    assert whole.student is not None
    each = tuple(float(i) for i in range(len(whole.student.response_ids)))
    cut = whole.student.prompt_length + 2
    assert column_of(examples_of(bytes_tokenizer, each, max_length=cut)) == [0.0, 1.0]


@pytest.mark.parametrize("numbers", [(), (1.0,), (1.0,) * 40])
def test_another_number_of_numbers_is_one_line(
    numbers: tuple[float, ...], bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    (example,) = examples_of(bytes_tokenizer, 1.0)
    assert example.student is not None
    tokens = len(example.student.response_ids) - 1
    line = (
        rf"^data\.train: field 'weight' of row 'a' has {len(numbers)} numbers, and the response has {tokens} tokens "
        r"and an end; give one for each, or a number for the row$"
    )
    with pytest.raises(DataError, match=line):
        examples_of(bytes_tokenizer, numbers)


def test_rows_are_asked_only_for_the_columns_that_are_wanted_here(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Row("a", "One", "", ("Mont Blanc",), {"weight": (1.0,) * 40})]
    encoder = Encoder(bytes_tokenizer, Data(train=Source(lab="train")))
    (example,) = build_examples(rows, encoder, None, None, False, "data.train")
    assert example.columns == {}
    (example,) = build_examples(rows, None, encoder, None, False, "data.train", ["weight"])
    assert example.columns == {}


def test_a_column_follows_its_tokens_where_a_text_has_no_prompt() -> None:
    lone = replace(example(encoded([], [3, 4, 5]), encoded([], [12, 13])), columns={"weight": [1.0, 2.0, 3.0]})
    assert column_of([lone]) == [2.0, 3.0]
