# ruff: noqa: SLF001  a changed copy is made from the parts of the original, which is of the same kind
"""A mapping that is a value: a changed copy shares all but a little with the original, and what differs is found fast.

The state of the rounds is a value, and a fleet may have 100,000 devices: to copy a dict of them for every message, or
to compare two, would cost more than all that the message is about. Here names are spread over BUCKETS small dicts by
their CRC-32, so a change copies the list of buckets and one bucket, and buckets that both share need no comparison.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

BUCKETS = 512
"""The cost of a change is this many pointers and n/512 entries: the least at some 260,000 names, and small at any."""

V = TypeVar("V")


class Rows(Mapping[str, V], Generic[V]):
    """Name → row; never changes. The order depends on the names and on nothing else but the order of insertion."""

    __slots__ = ("_buckets", "_size")

    def __init__(self, rows: Mapping[str, V] | None = None) -> None:
        buckets: list[dict[str, V]] = [{} for _ in range(BUCKETS)]
        for name, row in (rows or {}).items():
            buckets[_bucket(name)][name] = row
        self._buckets = tuple(buckets)
        self._size = sum(map(len, buckets))

    def __getitem__(self, name: str) -> V:
        return self._buckets[_bucket(name)][name]

    def __iter__(self) -> Iterator[str]:
        for bucket in self._buckets:
            yield from bucket

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return super().__eq__(other)
        # Tuples compare their items by identity first, and so do dicts.
        return self._size == other._size and self._buckets == other._buckets

    __hash__ = None  # type: ignore[assignment]  # rows need not be hashable

    def put(self, name: str, row: V) -> Rows[V]:
        """The same rows, but for this one."""
        at = _bucket(name)
        changed = Rows.__new__(Rows)
        changed._buckets = (*self._buckets[:at], {**self._buckets[at], name: row}, *self._buckets[at + 1 :])
        changed._size = self._size + (name not in self._buckets[at])
        return changed

    def since(self, before: Rows[V]) -> dict[str, V]:
        """The rows that `before` does not have, or has otherwise. None are ever removed."""
        return {
            name: row
            for mine, theirs in zip(self._buckets, before._buckets, strict=True)
            if mine is not theirs
            for name, row in mine.items()
            if name not in theirs or (theirs[name] is not row and theirs[name] != row)
        }


def _bucket(name: str) -> int:
    return zlib.crc32(name.encode()) % BUCKETS
