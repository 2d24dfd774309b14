"""Examples tokenised once, kept on disk, and read from there by memory mapping.

A set of tokens is a folder named by all that decides them: the examples in their order, the tokenizer, the longest
sequence and what happens to longer ones. It holds `tokens.i32` (see `flat_tokens`), `index.i64` (where each example
begins, and how many of its tokens are learned) and `header.json`, which vouches for both. It is written beside its
final place and renamed; it is read whole once, for its digest, when it is opened, and from then on by pages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_runtime.errors import DataError, unknown_name
from edge_runtime.train.data import TokenisedSet, Tokenizer, cut, tokenise_whole
from edge_runtime.train.exclusive import exclusive, remove
from edge_runtime.train.flat_tokens import FlatTokens, encode
from edge_runtime.train.rows import Example, short
from edge_runtime.train.vocabulary import fingerprint

Long = Literal["cut", "refuse"]
"""What becomes of an example that is too long: it loses its beginning or end, or it is left out."""

VERSION = 1
"""Of the files and of how a text becomes tokens: another version, another set."""

KEPT = 16
"""Sets in one cache folder, at most; the one that was not opened for the longest time goes first."""

_TOKENS, _INDEX, _HEADER = "tokens.i32", "index.i64", "header.json"
_INT32, _INT64 = "<i4", "<i8"

Count = Annotated[int, Field(ge=0)]
Say = Callable[[str], None]


class Header(BaseModel):
    """What `header.json` says of the other two files, beside its own digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    examples: Count
    """Kept ones."""
    tokens: Count
    largest_id: int
    """The largest token id, -1 where there is no token."""
    dropped: Count
    cut: Count
    refused: Count
    tokens_sha256: str
    index_sha256: str


class _DamagedError(ValueError):
    """Why a set on disk is not what was written."""


@dataclass(frozen=True, eq=False)
class _Wish:
    """What is to be tokenised, and how."""

    examples: Sequence[Example]
    tokenizer: Tokenizer
    max_length: int
    long: Long
    vocab_size: int | None

    def key(self) -> str:
        """SHA-256 (hex) of all that decides the tokens."""
        how = [VERSION, fingerprint(self.tokenizer), self.max_length, self.long, len(self.examples)]
        total = hashlib.sha256(json.dumps(how).encode())
        for example in self.examples:
            total.update(bytes.fromhex(example.digest()))
        return total.hexdigest()


@dataclass(eq=False)
class _Tally:
    """What is counted while examples stream by; offsets and learned counts as eight bytes each."""

    offsets: array[int]
    learned: array[int]
    dropped: int = 0
    cut: int = 0
    refused: int = 0
    largest_id: int = -1


def tokens_of(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    cache: Path | None,
    say: Say,
    long: Long = "cut",
    vocab_size: int | None = None,
) -> TokenisedSet:
    """The examples as tokens, from the cache where they were tokenised before.

    One example at a time is tokenised and written through: neither the tokens of a large data set nor their lists ever
    stand in memory together. A cache that cannot be written, or is damaged, costs a sentence and time, no more.

    Args:
        examples: in the order that the result keeps.
        tokenizer: of the base; with a cache, one that shows its vocabulary.
        max_length: tokens of a sequence, at most.
        cache: the folder of all sets; None keeps the tokens in memory, four bytes each.
        say: told a sentence for people.
        long: what becomes of examples longer than `max_length`.
        vocab_size: rows of the base's input embedding; None where nobody knows it.

    Returns:
        `examples` is a `FlatTokens`; nothing of it is read before it is asked for.

    Raises:
        DataError: an example has a token beyond `vocab_size` (names both), the chat template rewrites earlier turns,
            or with a cache, the tokenizer does not show its vocabulary.
    """
    if long not in get_args(Long):
        raise ValueError(unknown_name("policy for long examples", long, get_args(Long)))
    if max_length < 1:
        raise ValueError(f"a sequence has at least 1 token; found {max_length=}")
    wish = _Wish(examples, tokenizer, max_length, long, vocab_size)
    if cache is None:
        return _in_memory(wish)
    try:
        return _kept(wish, cache, say)
    except OSError as error:
        say(f"tokens cannot be kept in {cache} ({error}); they stay in memory, and are made again the next time")
        return _in_memory(wish)


def in_words(found: TokenisedSet, max_length: int) -> str:
    """One sentence on what was cut and left out, or '' where nothing was."""
    longer = f"longer than {max_length} tokens"
    parts = (
        (found.cut, f"{longer} and lost their beginning or end"),
        (found.refused, f"{longer} and left out"),
        (found.dropped, f"left out because nothing to learn is in their first {max_length} tokens"),
    )
    said = [f"{count} {what}" for count, what in parts if count]
    total = len(found.examples) + found.dropped + found.refused
    return f"of {total} examples, {'; '.join(said)}" if said else ""


# --- making ----------------------------------------


def _tokenise(wish: _Wish, write: Callable[[bytes], Any]) -> _Tally:
    """Tokenise one example after the other and hand its stored form on."""
    tally = _Tally(array("q", [0]), array("q"))
    for number, example in enumerate(wish.examples):
        whole = tokenise_whole(example, wish.tokenizer)
        too_long = len(whole.input_ids) > wish.max_length
        if too_long and wish.long == "refuse":
            tally.refused += 1
            continue
        kept = cut(whole, wish.max_length)
        learned = kept.learned
        if not learned:
            tally.dropped += 1
            continue
        largest = max(kept.input_ids)
        if wish.vocab_size is not None and largest >= wish.vocab_size:
            raise _beyond(wish, number, largest)
        write(encode(kept).astype(_INT32, copy=False).tobytes())
        tally.cut += too_long
        tally.largest_id = max(tally.largest_id, largest)
        tally.offsets.append(tally.offsets[-1] + len(kept.input_ids))
        tally.learned.append(learned)
    return tally


def _beyond(wish: _Wish, number: int, largest: int) -> DataError:
    example = wish.examples[number]
    beginning = short(example.text or example.messages[0].content)
    return DataError(
        f"example {number + 1} ({beginning}): expected token ids below {wish.vocab_size}, the base's embedding rows; "
        f"found {largest}; remove the example, or use the tokenizer that the base was published with"
    )


def _in_memory(wish: _Wish) -> TokenisedSet:
    stored = bytearray()
    tally = _tokenise(wish, stored.extend)
    flat = FlatTokens(
        np.frombuffer(stored, dtype=_INT32),
        np.frombuffer(tally.offsets, dtype=np.int64),
        np.frombuffer(tally.learned, dtype=np.int64) if tally.learned else np.zeros(0, dtype=np.int64),
    )
    return TokenisedSet(flat, dropped=tally.dropped, cut=tally.cut, refused=tally.refused)


def _kept(wish: _Wish, cache: Path, say: Say) -> TokenisedSet:
    key = wish.key()
    folder = cache / key
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)  # tokens are as private as the examples they were made of
    with exclusive(cache / "lock", f"another process is at work in {cache}; waiting for it", say):
        if folder.exists():
            try:
                return _opened(folder, wish)
            except _DamagedError as damage:
                say(f"the tokens kept in {folder} cannot be used and are made anew: {damage}")
        _make(folder, key, wish)
        _prune(cache, folder)
        try:
            return _opened(folder, wish)
        except _DamagedError as damage:
            raise OSError(f"what was written cannot be read again: {damage}") from damage


def _make(folder: Path, key: str, wish: _Wish) -> None:
    """Write a set beside its place, then put it there in one step; the lock must be held."""
    partial = folder.with_name(f"{folder.name}.part")
    remove(partial)
    partial.mkdir(mode=0o700)
    try:
        with (partial / _TOKENS).open("wb") as file:
            tally = _tokenise(wish, file.write)
            _flush(file)
        with (partial / _INDEX).open("wb") as file:
            for values in (tally.offsets, tally.learned):
                file.write(np.array(values, dtype=_INT64).tobytes())
            _flush(file)
        header = Header(
            key=key,
            examples=len(tally.learned),
            tokens=tally.offsets[-1],
            largest_id=tally.largest_id,
            dropped=tally.dropped,
            cut=tally.cut,
            refused=tally.refused,
            tokens_sha256=_digest(partial / _TOKENS),
            index_sha256=_digest(partial / _INDEX),
        )
        with (partial / _HEADER).open("wb") as file:
            body = header.model_dump_json()
            file.write(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n".encode())
            _flush(file)
        _flush_folder(partial)
        remove(folder)
        partial.replace(folder)
        _flush_folder(folder.parent)
    finally:
        remove(partial)


def _prune(cache: Path, newest: Path) -> None:
    """Remove the sets that were not opened for the longest time; a process that has one open keeps it until its end."""
    sets = [path for path in cache.iterdir() if re.fullmatch(r"[0-9a-f]{64}", path.name) and path != newest]
    sets.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in sets[KEPT - 1 :]:
        remove(path)


# --- opening ----------------------------------------


def _opened(folder: Path, wish: _Wish) -> TokenisedSet:
    """A set on disk, after everything in it has been found as it was written.

    Raises:
        _DamagedError: says what is not.
    """
    header = _header(folder / _HEADER)
    if header.key != folder.name:
        raise _DamagedError(f"expected the tokens {folder.name[:16]}…, found {header.key[:16]}…")
    index_size = 8 * (2 * header.examples + 1)
    _check(folder / _TOKENS, 4 * header.tokens, header.tokens_sha256)
    _check(folder / _INDEX, index_size, header.index_sha256)
    if wish.vocab_size is not None and header.largest_id >= wish.vocab_size:
        # The same tokens, asked for by a smaller base: making them anew names the example.
        raise _DamagedError(f"expected token ids below {wish.vocab_size}, found {header.largest_id}")
    index = np.fromfile(folder / _INDEX, dtype=_INT64)
    os.utime(folder)  # so that pruning knows what is in use
    # A file of no bytes cannot be mapped.
    stored = np.memmap(folder / _TOKENS, dtype=_INT32, mode="r") if header.tokens else np.zeros(0, dtype=_INT32)
    # As a plain array: slices of the subclass cost ten times as much, and the map stays open all the same.
    flat = FlatTokens(np.asarray(stored), index[: header.examples + 1], index[header.examples + 1 :])
    return TokenisedSet(flat, dropped=header.dropped, cut=header.cut, refused=header.refused)


def _header(path: Path) -> Header:
    try:
        body, _, digest = path.read_bytes().strip().partition(b"\n")
    except FileNotFoundError as error:
        raise _DamagedError(f"expected {path.name}, found none") from error
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise _DamagedError(f"{path.name} has another digest than it states")
    try:
        return Header.model_validate_json(body)
    except ValidationError as error:
        raise _DamagedError(f"{path.name}: {error.errors()[0]['msg']}") from error


def _check(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise _DamagedError(f"expected {path.name}, found none")
    if path.stat().st_size != size:
        raise _DamagedError(f"expected {path.name} to have {size} bytes, found {path.stat().st_size}")
    if _digest(path) != digest:
        raise _DamagedError(f"{path.name} has another digest than when it was written")


# --- files ----------------------------------------


def _digest(path: Path) -> str:
    # Read, not mapped: pages that are mapped count as this process's memory.
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 18):
            total.update(piece)
    return total.hexdigest()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
