"""Local examples: from a file or the standard library's docstrings to token ids, and in which order.

The loss is taken on what the assistant says, or on the whole of a plain text. Nothing here imports torch: the
tokenizer is an argument, and tensors belong to `batches`.
"""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_runtime.errors import DataError
from edge_runtime.train import stdlib_docs
from edge_runtime.train.rows import Example, Message, read_jsonl, short

__all__ = (
    "IGNORED",
    "SOURCES",
    "Example",
    "Message",
    "Tokenised",
    "TokenisedSet",
    "Tokenizer",
    "batch_at",
    "cut",
    "digest_of",
    "load_examples",
    "sampled",
    "split",
    "tokenise",
    "tokenise_all",
    "tokenise_whole",
)

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
        after_first = self.labels[1:]
        return len(after_first) - after_first.count(IGNORED)


@dataclass(frozen=True)
class TokenisedSet:
    """All examples of one side of the split.

    Attributes:
        examples: those with something to learn, in their order.
        dropped: examples left out because nothing to learn is in them, or was left by the cut.
        cut: of `examples`, those that were longer than the limit and lost their beginning or end.
        refused: examples left out because they were longer than the limit.
    """

    examples: Sequence[Tokenised]
    dropped: int
    cut: int = 0
    refused: int = 0


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
    examples = SOURCES[name](argument) if colon and name in SOURCES else _from_file(spec)
    return [examples[index] for index in sampled(examples, limit)]


def sampled(examples: Sequence[Example], limit: int | None) -> list[int]:
    """The indices of a sample of that many examples at most, chosen by content, in their order."""
    if limit is None or len(examples) <= limit:
        return list(range(len(examples)))
    return sorted(sorted(range(len(examples)), key=lambda index: examples[index].digest("limit"))[:limit])


def _from_stdlib(group: str) -> list[Example]:
    return [
        Example((Message("user", pair.prompt), Message("assistant", pair.completion)))
        for pair in stdlib_docs.doc_pairs(group)
    ]


SOURCES: dict[str, Callable[[str], list[Example]]] = {"stdlib-docs": _from_stdlib}
"""What may stand before the colon of `--data`; everything else is a file."""


def _from_file(spec: str) -> list[Example]:
    path = Path(spec)
    if not spec or not path.is_file():
        known = ", ".join(f"{name}:NAME" for name in SOURCES)
        found = "nothing" if not spec else f"'{spec}', which is {'a folder' if path.is_dir() else 'no file'}"
        raise DataError(
            f"expected data in a JSONL file or as {known}; found {found}; give an existing file with --data"
        )
    return read_jsonl(path)


# --- splitting ----------------------------------------


def digest_of(examples: Sequence[Tokenised]) -> str:
    """A digest of tokens and labels, in the order of the examples."""
    total = hashlib.sha256()
    for example in examples:
        total.update(array("i", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
    return total.hexdigest()


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
    """One example as token ids and labels, no longer than `max_length` tokens: `tokenise_whole`, then `cut`.

    Args:
        example: what to tokenise.
        tokenizer: of the base; its chat template is used if it has one.
        max_length: tokens, at most.

    Raises:
        DataError: the chat template writes a conversation differently once the answer is known.
    """
    return cut(tokenise_whole(example, tokenizer), max_length)


def tokenise_whole(example: Example, tokenizer: Tokenizer) -> Tokenised:
    """One example as token ids and labels, however long.

    Each piece (prompt, answer, …) is tokenised alone, as it is when the model generates: the ids of a prompt do not
    depend on the answer. An answer ends with the end-of-sequence token, which is learned; what a chat template writes
    behind it is not.

    Raises:
        DataError: the chat template writes a conversation differently once the answer is known.
    """
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in _pieces(example, tokenizer):
        tokens = list(tokenizer.encode(text, add_special_tokens=False)) if text else []
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return Tokenised(tuple(ids), tuple(labels))


def cut(tokenised: Tokenised, max_length: int) -> Tokenised:
    """At most `max_length` tokens: the prompt loses its beginning, down to half of them, then the answer its end."""
    ids, labels = tokenised.input_ids, tokenised.labels
    prompt = next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))
    start = min(max(len(ids) - max_length, 0), max(prompt - max_length // 2, 0))
    window = slice(start, start + max_length)
    return Tokenised(ids[window], labels[window])


def tokenise_all(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> TokenisedSet:
    """`tokenise` of each example, as tuples; `token_cache.tokens_of` does the same in a seventh of the memory."""
    whole = [tokenise_whole(example, tokenizer) for example in examples]
    pairs = [(len(found.input_ids) > max_length, cut(found, max_length)) for found in whole]
    kept = [(longer, found) for longer, found in pairs if found.learned]
    return TokenisedSet(
        tuple(found for _, found in kept), dropped=len(pairs) - len(kept), cut=sum(longer for longer, _ in kept)
    )


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
                f"{index + 1} of {short(messages[0].content)}; give rows with one prompt and one completion instead"
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
