from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdzoo.data.rows import Row, load_rows
from kdzoo.errors import DataError
from kdzoo.recipe.model import Fields, Source


def written(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ONE = {"id": "a", "instruction": "Add.", "input": "1 1", "output": "2"}


def test_jsonl_rows_come_as_they_stand(tmp_path: Path) -> None:
    path = written(tmp_path, ONE, {"instruction": "Say {input}.", "input": "", "output": ["x", "y"]})
    assert load_rows(Source(jsonl=str(path)), "data.train") == [
        Row("a", "Add.", "1 1", ("2",)),
        Row("2", "Say {input}.", "", ("x", "y")),
    ]


def test_variables_in_a_path_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, ONE)
    monkeypatch.setenv("ROWS_HERE", str(tmp_path))
    assert len(load_rows(Source(jsonl="$ROWS_HERE/rows.jsonl"), "data.train")) == 1
    assert len(load_rows(Source(jsonl="${ROWS_HERE}/rows.jsonl"), "data.train")) == 1


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = written(tmp_path, ONE, ONE)
    path.write_text(path.read_text() + "broken\n")
    assert len(load_rows(Source(jsonl=str(path), limit=2), "data.train")) == 2


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path, {"question": "Add.", "answer": "2"})
    fields = Fields(instruction="question", input="", response="answer")
    assert load_rows(Source(jsonl=str(path), fields=fields), "data.train") == [Row("1", "Add.", "", ("2",))]


def test_the_lab_is_a_source_like_any_other() -> None:
    rows = load_rows(Source(lab="train", limit=3), "data.train")
    assert len(rows) == 3
    assert all(row.id and row.instruction and row.references[0] for row in rows)


def test_a_local_data_set_of_hugging_face_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, ONE, {**ONE, "input": None}, name="train.jsonl")
    rows = load_rows(Source(dataset=str(tmp_path), limit=5), "data.train")
    assert [row.input for row in rows] == ["1 1", ""]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (Source(), "one of 'lab', 'set', 'jsonl', 'dataset'"),
        (Source(lab="trian"), "did you mean 'train'?"),
        (Source(lab="train", jsonl="x"), "'lab' and 'jsonl' are both given"),
        (Source(jsonl="$NO_SUCH_VARIABLE/x.jsonl"), "'NO_SUCH_VARIABLE', which is not set"),
        (Source(jsonl="{folder}/row.jsonl"), "no such file, did you mean 'rows.jsonl'?"),
        (Source(jsonl="{folder}/a/b/rows.jsonl"), "and no folder '{folder}/a'"),
        (Source(jsonl="{folder}"), "is a folder, not a file"),
        (Source(jsonl="{folder}/broken.jsonl"), "line 2 is not JSON"),
        (Source(jsonl="{folder}/list.jsonl"), "line 1 is not a JSON object"),
        (Source(jsonl="{folder}/empty.jsonl"), "contains no rows"),
        (Source(jsonl="{folder}/number.jsonl"), "field 'output' of row 1 in '{folder}/number.jsonl' is int"),
        (
            Source(jsonl="{folder}/none.jsonl"),
            "field 'output' of row 1 in '{folder}/none.jsonl' is an empty list",
        ),
        (Source(jsonl="{folder}/half.jsonl"), "half of a surrogate pair"),
        (
            Source(jsonl="{folder}/rows.jsonl", fields=Fields(response="outputs")),
            "field 'outputs' is not in '{folder}/rows.jsonl', did you mean 'output'?; "
            "row 1 has 'id', 'instruction', 'input', 'output'; name the column in 'fields.response'",
        ),
        (Source(dataset="{folder}", split="dev"), "(split 'dev') cannot be loaded"),
        (Source(dataset="{folder}/absent"), "no such folder"),
    ],
)
def test_a_fault_is_one_line_that_begins_with_the_address(source: Source, says: str, tmp_path: Path) -> None:
    written(tmp_path, ONE)
    (tmp_path / "broken.jsonl").write_text(json.dumps(ONE) + "\n{oh\n")
    written(tmp_path, [1], name="list.jsonl")
    written(tmp_path, name="empty.jsonl")
    written(tmp_path, {**ONE, "output": 2}, name="number.jsonl")
    written(tmp_path, {**ONE, "output": []}, name="none.jsonl")
    written(tmp_path, {**ONE, "output": "\ud83d"}, name="half.jsonl")
    places = {
        key: value.replace("{folder}", str(tmp_path))
        for key, value in source.model_dump(include={"jsonl", "dataset"}, exclude_none=True).items()
    }
    with pytest.raises(DataError) as fault:
        load_rows(source.model_copy(update=places), "data.train")
    assert str(fault.value).startswith("data.train: ")
    assert says.replace("{folder}", str(tmp_path)) in str(fault.value)
    assert "\n" not in str(fault.value)


# Columns for token weights


def test_columns_are_numbers_of_the_row_or_of_its_tokens(tmp_path: Path) -> None:
    path = written(tmp_path, {**ONE, "weight": 2, "sure": [0, 0.5]}, {**ONE, "weight": 0.5, "sure": []})
    rows = load_rows(Source(jsonl=str(path)), "data.train", ["weight", "sure"])
    assert [row.columns for row in rows] == [{"weight": 2.0, "sure": (0.0, 0.5)}, {"weight": 0.5, "sure": ()}]
    assert load_rows(Source(jsonl=str(path)), "data.train")[0].columns == {}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (-1, "-1"),
        (True, "true"),
        ("2", '"2"'),
        (None, "null"),
        ([1, -0.5], "-0.5"),
        ([[1]], r"\[1\]"),
        ({"a": 1}, r'{"a": 1}'),
    ],
)
def test_what_is_no_weight_is_one_line(value: object, told: str, tmp_path: Path) -> None:
    path = written(tmp_path, {**ONE, "weight": value})
    line = (
        rf"^data\.train: field 'weight' of row 1 in .* is {told}; a weight is a number of at least 0, or a list with "
    )
    with pytest.raises(DataError, match=line):
        load_rows(Source(jsonl=str(path)), "data.train", ["weight"])


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_a_weight_is_finite(value: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"instruction": "a", "input": "", "output": "b", "weight": {value}}}\n')
    with pytest.raises(DataError, match=r"^data\.train: "):
        load_rows(Source(jsonl=str(path)), "data.train", ["weight"])


def test_a_column_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, {**ONE, "wieght": 1})
    line = (
        r"'weight' is not in .*, did you mean 'wieght'\?; row 1 has .*; give every row a number "
        "there, or name another column where 'token_weights' reads it"
    )
    with pytest.raises(DataError, match=line):
        load_rows(Source(jsonl=str(path)), "data.train", ["weight"])
