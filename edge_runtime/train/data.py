"""Local examples: from a JSONL file or the standard library's docstrings to token ids, and in which order.

Four shapes of a row are understood (`FORMATS`); the loss is taken on what the assistant says, or on the whole of a
plain text. Nothing here imports torch: the tokenizer is an argument, and padding belongs to the loop.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_runtime.errors import DataError
from edge_runtime.train import stdlib_docs

ROLES = ("system", "user", "assistant")
IGNORED = -100
"""The label of a token that bears no loss, as torch's cross-entropy expects it."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    chat_template: Any
    eos_token: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """The text that the base model was trained to see for these messages."""
        ...


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


@dataclass(frozen=True)
class Tokenised:
    """One example as the model sees it.

    Attributes:
        input_ids: (t,) token ids.
        labels: (t,) the same ids where a token bears loss, else `IGNORED`; aligned with `input_ids`, not shifted.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learned(self) -> int:
        """Tokens that bear loss; the first token of a sequence never does, for nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class TokenisedSet:
    """All examples of one side of the split.

    Attributes:
        examples: those with something to learn.
        dropped: number of examples of which truncation left nothing to learn.
    """

    examples: tuple[Tokenised, ...]
    dropped: int


# --- reading ----------------------------------------


def load_examples(spec: str, *, limit: int | None = None) -> list[Example]:
    """The examples that `--data` names.

    Args:
        spec: the path of a JSONL file, or `stdlib-docs:GROUP`.
        limit: keep a sample of that many at most, chosen by content, in the order of the source.

    Raises:
        DataError: no such file or group, no rows, or a row that fits no format (names file and line).
    """
    name, colon, argument = spec.partition(":")
    examples = SOURCES[name](argument) if colon and name in SOURCES else _read_jsonl(spec)
    if limit is None or len(examples) <= limit:
        return examples
    chosen = sorted(range(len(examples)), key=lambda index: examples[index].digest("limit"))[:limit]
    return [examples[index] for index in sorted(chosen)]


def _from_stdlib(group: str) -> list[Example]:
    return [
        Example((Message("user", pair.prompt), Message("assistant", pair.completion)))
        for pair in stdlib_docs.doc_pairs(group)
    ]


SOURCES: dict[str, Callable[[str], list[Example]]] = {"stdlib-docs": _from_stdlib}
"""What may stand before the colon of `--data`; everything else is a file."""


class RowError(ValueError):
    """What is wrong with one row; becomes a DataError once file and line are known."""


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"expected '{key}' to be a text that is not empty, found {_short(value)}")
    return value


def _from_messages(row: Mapping[str, Any]) -> Example:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"expected 'messages' to be a list that is not empty, found {_short(turns)}")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise RowError(f"expected each message to have a 'role' among {', '.join(ROLES)} and a text as 'content', "
                           f"found {_short(turn)}")  # fmt: skip
    messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    if messages[-1].role != "assistant" or not messages[-1].content.strip():
        raise RowError(f"expected the last message to be an answer of the assistant, found {_short(turns[-1])}")
    return Example(messages)


def _from_completion(row: Mapping[str, Any]) -> Example:
    return Example((Message("user", _text(row, "prompt")), Message("assistant", _text(row, "completion"))))


def _from_instruction(row: Mapping[str, Any]) -> Example:
    # Alpaca's rows carry an empty 'input' where the instruction says all.
    context = _text(row, "input") if row.get("input") else ""
    prompt = "\n\n".join(part for part in (_text(row, "instruction"), context) if part)
    return Example((Message("user", prompt), Message("assistant", _text(row, "output"))))


def _from_text(row: Mapping[str, Any]) -> Example:
    return Example(text=_text(row, "text"))


# The keys that decide, and what is read from the row; the first line whose keys are all there wins.
FORMATS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Example]], ...] = (
    (("messages",), _from_messages),
    (("prompt", "completion"), _from_completion),
    (("instruction", "output"), _from_instruction),
    (("text",), _from_text),
)


def _read_jsonl(spec: str) -> list[Example]:
    path = Path(spec)
    if not spec or not path.is_file():
        known = ", ".join(f"{name}:NAME" for name in SOURCES)
        found = "nothing" if not spec else f"'{spec}', which is {'a folder' if path.is_dir() else 'no file'}"
        raise DataError(
            f"expected data in a JSONL file or as {known}; found {found}; give an existing file with --data"
        )
    examples = [_example(path, number, line) for number, line in _lines(path)]
    if not examples:
        raise DataError(f"{path}: expected one JSON object per line, found no rows; the file is empty")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            bare = line.removeprefix(b"\xef\xbb\xbf").strip()
            if bare:
                yield number, bare


def _example(path: Path, number: int, line: bytes) -> Example:
    try:
        return _from_row(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: expected UTF-8, found {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: expected one JSON object per line, found: {error}") from error
    except RowError as error:
        raise DataError(f"{path}:{number}: {error}") from error


def _from_row(row: object) -> Example:
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {_short(row)}")
    for keys, build in FORMATS:
        if all(key in row for key in keys):
            return build(row)
    shapes = "; ".join("+".join(keys) for keys, _ in FORMATS)
    raise RowError(f"expected the keys of one format ({shapes}), found {', '.join(sorted(row)) or 'no keys'}")


def _short(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


# --- splitting ----------------------------------------


def split(examples: Sequence[Example], *, fraction: float = 0.15, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: the same fraction is held out in whatever order the examples come.

    The split is by content, so that equal examples are always on one side; both sides come in the order of their
    digests, and any beginning of either is a fair sample of it.

    Args:
        examples: at least two that differ.
        fraction: share of the differing examples that is held out, 0 < fraction < 1; at least one is on each side.
        seed: another seed, another split.

    Raises:
        DataError: fewer than two examples that differ.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction is above 0 and below 1; found {fraction}")
    by_digest: dict[str, list[Example]] = {}
    for example in examples:
        by_digest.setdefault(example.digest(str(seed)), []).append(example)
    if len(by_digest) < 2:
        raise DataError(f"expected at least 2 examples that differ, one to train on and one to hold out; "
                        f"found {len(by_digest)}; add examples")  # fmt: skip
    order = sorted(by_digest)
    held = min(max(round(len(order) * fraction), 1), len(order) - 1)
    held_out, train = ([same for key in keys for same in by_digest[key]] for keys in (order[:held], order[held:]))
    return train, held_out


# --- tokens ----------------------------------------


def tokenise(example: Example, tokenizer: Tokenizer, max_length: int) -> Tokenised:
    """One example as token ids and labels.

    Each piece (prompt, answer, …) is tokenised alone, as it is when the model generates: the ids of a prompt do not
    depend on the answer. An answer ends with the end-of-sequence token, which is learned; what a chat template writes
    behind it is not. Too long a sequence loses the beginning of its prompt first, down to half of `max_length`, then
    the end of its answer.

    Args:
        example: what to tokenise.
        tokenizer: of the base; its chat template is used if it has one.
        max_length: tokens, at most.

    Raises:
        DataError: the chat template writes a conversation differently once the answer is known.
    """
    pieces = list(_pieces(example, tokenizer))
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        tokens = list(tokenizer.encode(text, add_special_tokens=False)) if text else []
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    prompt = next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))
    start = min(max(len(ids) - max_length, 0), max(prompt - max_length // 2, 0))
    window = slice(start, start + max_length)
    return Tokenised(tuple(ids[window]), tuple(labels[window]))


def tokenise_all(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> TokenisedSet:
    """`tokenise` of each example, without those of which nothing to learn is left; says how many those are."""
    everything = [tokenise(example, tokenizer, max_length) for example in examples]
    kept = tuple(tokenised for tokenised in everything if tokenised.learned)
    return TokenisedSet(kept, len(everything) - len(kept))


def _pieces(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Text pieces in order, each with whether it is learned."""
    eos = tokenizer.eos_token or ""
    if example.text:
        yield example.text + eos, True
    elif tokenizer.chat_template:
        yield from _chat_pieces(example.messages, tokenizer, eos)
    else:
        yield from _plain_pieces(example.messages, eos)


def _plain_pieces(messages: Sequence[Message], eos: str) -> Iterator[tuple[str, bool]]:
    """The contents one after the other, with a line break where neither side brings whitespace; eos ends an answer."""
    last = "\n"
    for message in messages:
        glue = "" if last[-1:].isspace() or message.content[:1].isspace() else "\n"
        learned = message.role == "assistant"
        if learned:
            yield glue, False
            yield message.content + eos, True
        else:
            yield glue + message.content, False
        last = message.content or last


def _chat_pieces(messages: Sequence[Message], tokenizer: Tokenizer, eos: str) -> Iterator[tuple[str, bool]]:
    """What the chat template writes, cut where each answer begins and ends."""
    turns = [{"role": message.role, "content": message.content} for message in messages]

    def render(count: int, *, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=prompt))

    done = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1, prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                f"expected a chat template that only appends; found one that rewrites earlier turns, at turn "
                f"{index + 1} of {_short(messages[0].content)}; give rows with one prompt and one completion instead"
            )
        cut = after.rfind(eos, len(before)) if eos else -1
        end = cut + len(eos) if cut >= 0 else len(after)
        yield before[len(done) :], False
        yield after[len(before) : end], True
        done = after[:end]


# --- order ----------------------------------------


def batch_at(step: int, *, count: int, micro_batch: int, seed: int) -> tuple[int, ...]:
    """The indices of the examples of one micro-batch; a pure function, so a resumed round goes on where it stopped.

    Epochs follow each other without a gap, each a permutation of its own: every example is seen once before any is seen
    again.

    Args:
        step: number of the micro-batch, from 0.
        count: number of examples.
        micro_batch: examples of a micro-batch.
        seed: another seed, another order.
    """
    if count < 1 or micro_batch < 1 or step < 0:
        raise ValueError(f"expected examples and a micro-batch; found {count=}, {micro_batch=}, {step=}")
    positions = range(step * micro_batch, (step + 1) * micro_batch)
    return tuple(_permutation(count, seed, position // count)[position % count] for position in positions)


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    # By digests, not by `random.shuffle`, whose order Python does not promise to keep from version to version.
    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(count), key=key))
