"""The layout of a blob: which layers are in it, how large they are, and which codec packed which directions.

Both factors of a layer are directions one after the other, `a` by its rows and `b` by its columns, and a run says that
the next so many are packed by one codec. The layout is the only thing in a blob that says how much memory it takes, so
it is bounded here, before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edge_runtime.errors import CorruptPayloadError, TooLargeError

Runs = tuple[tuple[str, int], ...]
"""Codec and number of directions, in order."""

MAX_LAYERS = 65_536
MAX_SIDE = 1 << 31
BATCH_NUMBERS = 1 << 16
"""Numbers after which a batch is packed: 256 KB, which the passes over it find in the cache. Part of the format."""


@dataclass(frozen=True)
class Layer:
    """One layer of a blob.

    Attributes:
        name: its module path.
        d_out: rows of its weight.
        d_in: columns of its weight.
        a: how the rows of `a` are packed.
        b: how the columns of `b` are packed.
    """

    name: str
    d_out: int
    d_in: int
    a: Runs
    b: Runs

    @property
    def rank(self) -> int:
        """Directions of either factor."""
        return sum(count for _, count in self.a)


@dataclass(frozen=True)
class Strip:
    """Directions that are packed together.

    Attributes:
        layer: whose.
        factor: "a" or "b".
        start: the first of them.
        count: how many.
        width: numbers of each.
        codec: by which they are packed.
    """

    layer: str
    factor: str
    start: int
    count: int
    width: int
    codec: str


@dataclass(frozen=True)
class Batch:
    """Strips of one codec and one width, packed in one call: small layers would spend their time on calls alone.

    Attributes:
        codec: of all of them.
        width: numbers of a direction.
        strips: in order; their directions follow each other.
    """

    codec: str
    width: int
    strips: tuple[Strip, ...]

    @property
    def count(self) -> int:
        """Directions in all."""
        return sum(strip.count for strip in self.strips)


def batches(layers: tuple[Layer, ...]) -> Iterator[Batch]:
    """What is packed, in the order in which it lies in a blob; the layout alone decides it, so both ends agree."""
    open_: dict[tuple[str, int], list[Strip]] = {}
    numbers: dict[tuple[str, int], int] = {}
    for strip in _strips(layers):
        key = strip.codec, strip.width
        open_.setdefault(key, []).append(strip)
        numbers[key] = numbers.get(key, 0) + strip.count * strip.width
        if numbers[key] >= BATCH_NUMBERS:
            del numbers[key]
            yield Batch(*key, tuple(open_.pop(key)))
    for key, rest in open_.items():
        yield Batch(*key, tuple(rest))


def _strips(layers: tuple[Layer, ...]) -> Iterator[Strip]:
    for layer in layers:
        for factor, runs, width in (("a", layer.a, layer.d_in), ("b", layer.b, layer.d_out)):
            start = 0
            for codec, count in runs:
                yield Strip(layer.name, factor, start, count, width, codec)
                start += count


def dump(layers: tuple[Layer, ...]) -> str:
    """The layout as compact JSON: `[name, d_out, d_in, a, b]` for each layer, a run as codec and number."""
    return json.dumps([[x.name, x.d_out, x.d_in, x.a, x.b] for x in layers], separators=(",", ":"))


def load(found: object, limit: int) -> tuple[Layer, ...]:
    """The layout in parsed JSON from outside.

    Raises:
        CorruptPayloadError: it is no layout.
        TooLargeError: what it describes takes more than `limit` bytes of float32.
    """
    if not isinstance(found, list) or len(found) > MAX_LAYERS:
        raise _corrupt(f"a list of at most {MAX_LAYERS} layers", found)
    layers = tuple(_layer(row) for row in found)
    if len({layer.name for layer in layers}) < len(layers):
        raise CorruptPayloadError("a blob has each layer once; found one twice; ask the sender again")
    size = sum(4 * layer.rank * (layer.d_in + layer.d_out) for layer in layers)
    if size > limit:
        raise TooLargeError(f"a blob may hold an adapter of {limit} bytes; this one describes {size}; raise the limit")
    return layers


def _layer(row: object) -> Layer:
    match row:
        case [str(name), int(d_out), int(d_in), list(a), list(b)] if name and ":" not in name:
            layer = Layer(name, d_out, d_in, _runs(a), _runs(b))
            ranks = {sum(count for _, count in runs) for runs in (layer.a, layer.b)}
            if all(0 < side <= MAX_SIDE for side in (d_out, d_in)) and len(ranks) == 1 and max(ranks) <= MAX_SIDE:
                return layer
    raise _corrupt("[name, d_out, d_in, runs of a, as many directions in runs of b]", row)


def _runs(found: list[object]) -> Runs:
    runs: list[tuple[str, int]] = []
    for run in found:
        match run:
            case [str(codec), int(count)] if 0 < count <= MAX_SIDE:
                runs.append((codec, count))
            case _:
                raise _corrupt("[codec, number of directions]", run)
    return tuple(runs)


def _corrupt(expected: str, found: object) -> CorruptPayloadError:
    return CorruptPayloadError(
        f"in the layout of a blob, expected {expected}; found {found!r:.80}; ask the sender again"
    )


def uniform(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], codec: str) -> tuple[Layer, ...]:
    """The layout in which one codec packs everything; layers without a rank are left out unless it is given as 0."""
    return tuple(
        Layer(name, *shape, *(2 * ((((codec, ranks[name]),) if ranks[name] else ()),)))
        for name, shape in sorted(shapes.items())
        if name in ranks
    )
