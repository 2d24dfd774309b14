"""What an example is, and how a row of a JSONL file becomes one.

Seven shapes of a row are understood (`FORMATS`): conversations, four of a question with its answer, a text with its
label, and plain text. Whatever is wrong with a row is said with its file and line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import DataError

ROLES = ("system", "user", "assistant")

LONGEST_LINE = 4 * 2**20
"""Bytes of one row, at most: about a million tokens, far beyond any sequence, and bearable on a small device."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """Either a conversation, whose assistant turns are learned, or a plain text, which is learned whole.

    Attributes:
        messages: the turns, the last one the assistant's; empty for a plain text.
        text: the plain text; empty for a conversation.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""

    def __post_init__(self) -> None:
        if bool(self.messages) == bool(self.text):
            raise ValueError("an example is either a conversation or a text, and not empty")

    def digest(self, salt: str = "") -> str:
        """SHA-256 (hex) of salt and content: orders examples by nothing but what they say."""
        content = [[message.role, message.content] for message in self.messages] or self.text
        return hashlib.sha256(json.dumps([salt, content]).encode()).hexdigest()


class RowError(ValueError):
    """What is wrong with one row; becomes a DataError once it is known where the row stands."""


# --- one row ----------------------------------------


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"expected '{key}' to be a text that is not empty, found {short(value)}")
    return _encodable(value, key)


def _encodable(value: str, key: str) -> str:
    # JSON may escape one half of a surrogate pair; no tokenizer takes such a text.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"expected '{key}' to be valid Unicode, found half of a surrogate pair at character {error.start}"
        ) from error
    return value


def _asked_and_answered(prompt: str, answer: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", answer)))


def _from_messages(row: Mapping[str, Any]) -> Example:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"expected 'messages' to be a list that is not empty, found {short(turns)}")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise RowError(f"expected each message to have a 'role' among {', '.join(ROLES)} and a text as 'content', "
                           f"found {short(turn)}")  # fmt: skip
    messages = tuple(Message(turn["role"], _encodable(turn["content"], "content")) for turn in turns)
    if messages[-1].role != "assistant" or not messages[-1].content.strip():
        raise RowError(f"expected the last message to be an answer of the assistant, found {short(turns[-1])}")
    return Example(messages)


def _from_pair(prompt: str, answer: str) -> Callable[[Mapping[str, Any]], Example]:
    return lambda row: _asked_and_answered(_text(row, prompt), _text(row, answer))


def _from_instruction(row: Mapping[str, Any]) -> Example:
    # Alpaca's rows carry an empty 'input' where the instruction says all.
    context = _text(row, "input") if row.get("input") else ""
    prompt = "\n\n".join(part for part in (_text(row, "instruction"), context) if part)
    return _asked_and_answered(prompt, _text(row, "output"))


def _from_labelled(key: str) -> Callable[[Mapping[str, Any]], Example]:
    def build(row: Mapping[str, Any]) -> Example:
        label = row["label"]
        # A class may be a number; what is true or false in Python is a number too, and none here.
        if isinstance(label, int) and not isinstance(label, bool):
            return _asked_and_answered(_text(row, key), str(label))
        if not isinstance(label, str) or not label.strip():
            raise RowError(f"expected 'label' to be a name or a whole number, found {short(label)}")
        return _asked_and_answered(_text(row, key), _text(row, "label"))

    return build


def _from_text(row: Mapping[str, Any]) -> Example:
    return Example(text=_text(row, "text"))


# The keys that decide, and what is read from the row; the first line whose keys are all there wins. So a text with a
# label is a task of naming the label, and a text without one is learned whole; to learn labelled texts whole, leave the
# label out.
FORMATS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Example]], ...] = (
    (("messages",), _from_messages),
    (("prompt", "completion"), _from_pair("prompt", "completion")),
    (("instruction", "output"), _from_instruction),
    (("question", "answer"), _from_pair("question", "answer")),
    (("text", "label"), _from_labelled("text")),
    (("sentence", "label"), _from_labelled("sentence")),
    (("text",), _from_text),
)


def _from_row(row: object) -> Example:
    if not isinstance(row, Mapping):
        raise RowError(f"expected a JSON object, found {short(row)}")
    for keys, build in FORMATS:
        if all(key in row for key in keys):
            return build(row)
    shapes = "; ".join("+".join(keys) for keys, _ in FORMATS)
    found = _printable(", ".join(sorted(str(key) for key in row)), 200)
    raise RowError(f"expected the keys of one format ({shapes}), found {found or 'no keys'}")


def from_rows(rows: Iterable[Mapping[str, Any]], *, name: str = "rows") -> list[Example]:
    """Examples of rows that are already in memory, whatever library read them.

    Args:
        rows: mappings with the keys of one of `FORMATS`, each.
        name: what an error calls them.

    Raises:
        DataError: a row that fits no format (names its number, from 1), or no rows.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        try:
            examples.append(_from_row(row))
        except RowError as error:
            raise DataError(f"{name}, row {number}: {error}") from error
    if not examples:
        raise DataError(f"{name}: expected at least one row, found none; give this device data")
    return examples


def short(value: object) -> str:
    """A value as JSON, for an error message: its beginning, if it is long."""
    return _printable(json.dumps(value, ensure_ascii=False, default=repr), 80)


def _printable(text: str, longest: int) -> str:
    shown = text if len(text) <= longest else f"{text[: longest - 3]}..."
    # Half of a surrogate pair would make a second error of the printing of the first.
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


# --- a file of rows ----------------------------------------


def read_jsonl(path: Path) -> list[Example]:
    """The examples of a JSONL file, one for each line that is not blank.

    Raises:
        DataError: a file that cannot be read, or no rows; or a line that is not UTF-8, not JSON, too long, or fits no
            format (names file and line).
    """
    try:
        examples = [_example(path, number, line) for number, line in _lines(path)]
    except OSError as error:
        raise DataError(
            f"{path}: expected a file that can be read, found: {error.strerror}; check its rights"
        ) from error
    if not examples:
        raise DataError(f"{path}: expected one JSON object per line, found no rows; the file is empty")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{path}:{number}: expected a line of at most {LONGEST_LINE} bytes, found a longer one; put one "
                    "JSON object on each line, and split a text as long as that"
                )
            bare = line.removeprefix(b"\xef\xbb\xbf").strip()
            if bare:
                yield number, bare


def _example(path: Path, number: int, line: bytes) -> Example:
    try:
        return _from_row(json.loads(line.decode("utf-8"), object_pairs_hook=_each_key_once))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: expected UTF-8, found {error.reason} at byte {error.start}") from error
    except RowError as error:
        raise DataError(f"{path}:{number}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{path}:{number}: expected one JSON object per line, found lists within lists") from error
    except ValueError as error:  # what json cannot read, numbers of thousands of digits among it
        raise DataError(f"{path}:{number}: expected one JSON object per line, found: {error}") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of equal keys without a word: half of what such a row says would be lost.
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"expected each key once, found '{short(twice)[1:-1]}' {keys.count(twice)} times")
    return row
