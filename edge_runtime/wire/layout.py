"""The layout of a blob: which layers are in it, how large they are, and which codec packed which directions.

Both factors of a layer are directions one after the other, `a` by its rows and `b` by its columns, and a run says that
the next so many are packed by one codec. An update of a slice that is not the first directions of what the device holds
says by ranges of numbers which ones they are. The layout is the only thing in a blob that says how much memory it
takes, so it is bounded here, before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

from edge_runtime.errors import CorruptPayloadError, TooLargeError
from edge_runtime.lora.factors import Factors

Runs = tuple[tuple[str, int], ...]
"""Codec and number of directions, in order."""

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of direction numbers, ascending, none of which touches the next."""

MAX_LAYERS = 65_536
MAX_SIDE = 1 << 31
NOTHING = "none"
"""The codec of directions that are not sent."""
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
        slice: the numbers of its directions (see `lora.slices`); empty where they are the first ones.
    """

    name: str
    d_out: int
    d_in: int
    a: Runs
    b: Runs
    slice: Ranges = ()

    @property
    def rank(self) -> int:
        """Directions of either factor."""
        return sum(count for _, count in self.a)

    @property
    def directions(self) -> tuple[int, ...]:
        """The numbers of its directions, as many as its rank, ascending."""
        return tuple(chain.from_iterable(range(*part) for part in self.slice or ((0, self.rank),)))


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
    """The layout as compact JSON: `[name, d_out, d_in, a, b]` for each layer, a run as codec and number.

    A layer whose directions are not the first ones has their ranges as a sixth entry.
    """
    rows = [[x.name, x.d_out, x.d_in, x.a, x.b, *([x.slice] if x.slice else [])] for x in layers]
    return json.dumps(rows, separators=(",", ":"))


def sliced(layers: tuple[Layer, ...], directions: Mapping[str, Sequence[int]]) -> tuple[Layer, ...]:
    """The layout with the numbers of the directions of each layer that is named; the others have their first ones.

    Raises:
        ValueError: numbers that do not ascend, or another count of them than the layer has directions.
    """
    return tuple(replace(x, slice=_ranges(x, directions[x.name])) if x.name in directions else x for x in layers)


def _ranges(layer: Layer, directions: Sequence[int]) -> Ranges:
    numbers = list(directions)
    if len(numbers) != layer.rank or any(b <= a for a, b in pairwise((-1, *numbers))):
        raise ValueError(
            f"layer '{layer.name}': expected {layer.rank} ascending numbers of directions; found {numbers[:16]}"
        )
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = found[-1][0], number + 1
        else:
            found.append((number, number + 1))
    return () if numbers == list(range(layer.rank)) else tuple(found)


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
        case [str(name), int(d_out), int(d_in), list(a), list(b), *rest] if name and ":" not in name and len(rest) < 2:
            layer = Layer(name, d_out, d_in, _runs(a), _runs(b), _slice(rest[0]) if rest else ())
            ranks = {sum(count for _, count in runs) for runs in (layer.a, layer.b)}
            if layer.slice:
                ranks.add(sum(stop - start for start, stop in layer.slice))
            if all(0 < side <= MAX_SIDE for side in (d_out, d_in)) and len(ranks) == 1 and max(ranks) <= MAX_SIDE:
                return layer
    raise _corrupt("[name, d_out, d_in, runs of a, as many directions in runs of b, and in ranges, if there are]", row)


def _slice(found: object) -> Ranges:
    """Ranges that ascend and do not touch: one way only to write the same directions."""
    ranges: list[tuple[int, int]] = []
    for part in found if isinstance(found, list) else ():
        match part:
            case [int(start), int(stop)] if (ranges[-1][1] if ranges else -1) < start < stop <= MAX_SIDE:
                ranges.append((start, stop))
            case _:
                raise _corrupt("ranges of directions that ascend", part)
    if not ranges or (len(ranges) == 1 and not ranges[0][0]):
        raise _corrupt("ranges of directions that are not the first ones", found)
    return tuple(ranges)


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


def only(layers: tuple[Layer, ...], factor: Factors) -> tuple[Layer, ...]:
    """The layout that packs of each layer one factor, "a" or "b", and of the other nothing; as it is for "ab"."""

    def nothing(layer: Layer) -> Runs:
        return ((NOTHING, layer.rank),) if layer.rank else ()

    match factor:
        case "a":
            return tuple(replace(layer, b=nothing(layer)) for layer in layers)
        case "b":
            return tuple(replace(layer, a=nothing(layer)) for layer in layers)
        case _:
            return layers


def uniform(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], codec: str) -> tuple[Layer, ...]:
    """The layout in which one codec packs everything; layers without a rank are left out unless it is given as 0."""
    return tuple(
        Layer(name, *shape, *(2 * ((((codec, ranks[name]),) if ranks[name] else ()),)))
        for name, shape in sorted(shapes.items())
        if name in ranks
    )
