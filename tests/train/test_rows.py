"""Rows of every shape become examples, and a bad one is named by where it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import DataError
from edge_runtime.train import rows
from edge_runtime.train.rows import Example, Message, from_rows, read_jsonl


def pair(prompt: str, completion: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", completion)))


def written(tmp_path: Path, *lines: bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


ROWS: list[tuple[dict[str, Any], Example]] = [
    ({"question": "6 x 7?", "answer": "6 * 7 = 42\n#### 42"}, pair("6 x 7?", "6 * 7 = 42\n#### 42")),
    ({"sentence": "a fine film", "label": "positive", "idx": 3}, pair("a fine film", "positive")),
    ({"sentence": "a fine film", "label": 1}, pair("a fine film", "1")),
    ({"text": "a dull film", "label": "negative", "source": "imdb"}, pair("a dull film", "negative")),
    ({"text": "a dull film", "source": "imdb"}, Example(text="a dull film")),
    ({"prompt": "p", "completion": "c", "text": "p c", "label": 1}, pair("p", "c")),
]


@pytest.mark.parametrize(("row", "expected"), ROWS)
def test_questions_labels_and_texts_are_told_apart(tmp_path: Path, row: dict[str, Any], expected: Example) -> None:
    assert read_jsonl(written(tmp_path, json.dumps(row).encode())) == [expected]
    assert from_rows([row]) == [expected]


BAD_ROWS: list[tuple[bytes, str]] = [
    (b'{"prompt": "x", "completion": ""}', "'completion' to be a text that is not empty, found \"\""),
    (b'{"question": "x", "answer": null}', "'answer' to be a text that is not empty, found null"),
    (b'{"text": "x", "label": true}', "'label' to be a name or a whole number, found true"),
    (b'{"text": "x", "label": 0.5}', "'label' to be a name or a whole number, found 0.5"),
    (b'{"text": "x", "label": ""}', "'label' to be a name or a whole number"),
    (b'{"text": "", "label": 1}', "'text' to be a text that is not empty"),
    (b'{"text": "x", "text": "y"}', "each key once, found 'text' 2 times"),
    (b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', "found 'role' 2 times"),
    (b'{"text": "\xe4"}', "expected UTF-8, found invalid continuation byte at byte 10"),
    (b'\xff\xfe{\x00"\x00', "expected UTF-8, found invalid start byte at byte 0"),
    (rb'{"text": "\ud83d"}', "'text' to be valid Unicode, found half of a surrogate pair at character 0"),
    (rb'{"messages": [{"role": "assistant", "content": "a\ud83d"}]}', "half of a surrogate pair at character 1"),
    (b'{"text": ' + b"[" * 100_000, "lists within lists"),
    (b'{"label": ' + b"7" * 10_000 + b"}", "one JSON object per line, found: Exceeds the limit"),
    (b'{"text": "x"', "one JSON object per line, found: Expecting"),
    (b'{"text": "x"} {"text": "y"}', "one JSON object per line, found: Extra data"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
def test_a_bad_row_is_named_by_file_and_line_in_one_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = written(tmp_path, b'{"text": "good"}', b"", line, b'{"text": "good"}')

    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{re.escape(message)}") as raised:
        read_jsonl(path)

    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"\ud83d": 1},
        {f"key {number}": 1 for number in range(10_000)},
        {"messages": [{"role": "\ud83d", "content": "x"}]},
        {"text": ["x" * 10_000]},
    ],
    ids=["key of half a pair", "many keys", "role of half a pair", "long value"],
)
def test_what_is_wrong_can_be_printed(tmp_path: Path, row: dict[str, Any]) -> None:
    path = written(tmp_path, json.dumps(row).encode())

    with pytest.raises(DataError, match=r"rows\.jsonl:1: expected") as raised:
        read_jsonl(path)

    assert len(str(raised.value).encode()) < 600 + len(str(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}: expected a file that can be read, found: Is a directory"):
        read_jsonl(tmp_path)


def test_a_line_of_absurd_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    long = b'{"text": "' + b"x" * rows.LONGEST_LINE + b'"}'

    with pytest.raises(DataError, match=rf"rows\.jsonl:2: expected a line of at most {rows.LONGEST_LINE} bytes"):
        read_jsonl(written(tmp_path, b'{"text": "good"}', long))


def test_a_line_of_the_greatest_length_is_read(tmp_path: Path) -> None:
    frame = len(b'{"text": ""}\n')
    line = b'{"text": "' + b"x" * (rows.LONGEST_LINE - frame) + b'"}'

    assert len(read_jsonl(written(tmp_path, line, b'{"text": "next"}'))) == 2


def test_rows_in_memory_are_named_by_their_number() -> None:
    with pytest.raises(DataError, match=r"reviews, row 2: expected the keys of one format .*text\+label.*found stars"):
        from_rows([{"text": "x"}, {"stars": 3}], name="reviews")
    with pytest.raises(DataError, match="reviews: expected at least one row, found none"):
        from_rows([], name="reviews")
    with pytest.raises(DataError, match="row 1: expected 'text' to be a text that is not empty, found \"b'bytes'\""):
        from_rows([{"text": b"bytes"}])
