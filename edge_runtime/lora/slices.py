"""Which of the directions that it holds a device trains: the slice policies, pure, and the same at both ends.

A device holds h directions of the global adapter and trains r of them. `top` takes the first r, those of the largest
singular values; `rotating` a window of r that moves on with each version; `personal` those in which the device's own
data have most to say; `fresh` directions in which nothing was learnt yet; `last` the last r, where those before them
stay as they are.

Directions have numbers: those of the global adapter its own, and those that `fresh` appends FRESH, FRESH + 1 … An
appended direction has zero `b`, and its row of `a` is drawn from a text that both ends know (version and layer), so it
need not travel. All devices share the draw: what they learn adds up in r directions, and not in r for each of them, of
which the server would have to drop most.

Source of `personal`: FedRoRA gives each client the directions with the largest |uᵢᵀ ∇ vᵢ|; LoRA-A2 (ACL 2025) ranks
directions by their importance on the client's data. Differs from both: the device chooses for itself, holds the others
all the same, and computes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, unknown_name
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import changed, fresh_rows, take

Scores = NDArray[np.float64]
"""(h,), none negative: how much each held direction matters to a device."""

FRESH = 1 << 16
"""The number of the first appended direction; no adapter has so many of its own."""

ROOM = 2
"""A layer has room for fresh directions where it holds this many times what it trains: the strongest stay in view."""


@dataclass(frozen=True, eq=False)
class View:
    """What a policy may look at, of one layer.

    Attributes:
        received: the h directions that the device holds, by falling singular value.
        trained: r, how many it trains; at most h.
        version: of the global adapter.
        scores: of the h directions on the device's own data; None where nobody asked for them.
    """

    received: Pair
    trained: int
    version: int
    scores: Scores | None = None


@dataclass(frozen=True, eq=False)
class Slices:
    """What a device trains in a round, all layers together.

    Attributes:
        seen: what its model holds: what was received, the last of it replaced where fresh directions were appended.
        rows: layer → which rows of `seen` are trained, ascending.
        directions: layer → the numbers of the same directions, ascending; this is what the server must know.
        before: the slice itself before training, rows in the same order.
    """

    seen: Adapter
    rows: Mapping[str, tuple[int, ...]]
    directions: Mapping[str, tuple[int, ...]]
    before: Adapter


def _top(view: View) -> tuple[int, ...]:
    return tuple(range(view.trained))


def _last(view: View) -> tuple[int, ...]:
    return tuple(range(view.received.rank - view.trained, view.received.rank))


def _rotating(view: View) -> tuple[int, ...]:
    held = view.received.rank
    start = view.version * view.trained % held if held else 0
    return tuple(sorted((start + step) % held for step in range(view.trained)))


def _personal(view: View) -> tuple[int, ...]:
    if view.scores is None or view.scores.shape != (view.received.rank,):
        found = None if view.scores is None else view.scores.shape
        raise ValueError(f"expected a score for each of {view.received.rank} held directions; found {found}")
    # Stable, so that directions of equal score, such as all of a first version, are taken from the top.
    return tuple(sorted(np.argsort(-view.scores, kind="stable")[: view.trained].tolist()))


def _fresh(view: View) -> tuple[int, ...]:
    """Those that the server refilled, and appended ones in the place of those that are missing."""
    empty = [at for at in range(view.received.rank) if not view.received.b[:, at].any()][: view.trained]
    missing = view.trained - len(empty)
    if missing and view.received.rank < ROOM * view.trained:
        return _top(view)
    return (*empty, *range(FRESH, FRESH + missing))


LAST = "last"

POLICIES: Mapping[str, Callable[[View], tuple[int, ...]]] = {
    "top": _top,
    LAST: _last,
    "rotating": _rotating,
    "fresh": _fresh,
    "personal": _personal,
}
"""Name → which directions are trained, ascending, as many as `View.trained`."""

SCORED = frozenset({"personal"})
"""Policies that must know the scores."""


def policy(name: str) -> Callable[[View], tuple[int, ...]]:
    """The policy of that name.

    Raises:
        ConfigError: no policy of that name; lists those there are.
    """
    if name not in POLICIES:
        raise ConfigError(unknown_name("slice", name, POLICIES) + "; update this device")
    return POLICIES[name]


def choose(
    name: str, received: Adapter, trained: Mapping[str, int], version: int, scores: Mapping[str, Scores] | None = None
) -> dict[str, tuple[int, ...]]:
    """Layer → numbers of the directions that a device trains by that policy.

    Args:
        name: of the policy.
        received: what the device holds.
        trained: layer → how many; layers of 0 are left out.
        version: of the global adapter.
        scores: layer → scores of its directions, for the policies of SCORED.

    Raises:
        ConfigError: no policy of that name.
        ValueError: a layer without its scores, where they are needed.
    """
    chosen = policy(name)
    return {
        layer: chosen(View(received[layer], count, version, (scores or {}).get(layer)))
        for layer, count in trained.items()
        if count
    }


def lay_out(received: Adapter, directions: Mapping[str, Sequence[int]], version: int) -> Slices:
    """What the model holds and trains when these directions of what was received are to be trained.

    Appended directions take the room of the weakest held ones, so a device never holds more than it planned for.

    Raises:
        ValueError: directions that a layer does not hold.
    """
    seen, rows = dict(received), {}
    for layer, numbers in directions.items():
        seen[layer], rows[layer] = _laid_out(layer, received[layer], numbers, version)
    before = Adapter({layer: take(seen[layer], found) for layer, found in rows.items()})
    return Slices(Adapter(seen), rows, {layer: tuple(numbers) for layer, numbers in directions.items()}, before)


def _laid_out(layer: str, received: Pair, numbers: Sequence[int], version: int) -> tuple[Pair, tuple[int, ...]]:
    own = [number for number in numbers if number < FRESH]
    if len(own) == len(numbers):
        return received, tuple(own)
    others = [at for at in range(received.rank) if at not in set(own)][: received.rank - len(numbers)]
    kept = sorted([*own, *others])
    appended = slice_of(layer, received, [number for number in numbers if number >= FRESH], version)
    held = take(received, kept)
    rows = (*(kept.index(number) for number in own), *range(len(kept), len(kept) + appended.rank))
    return Pair(np.concatenate([held.a, appended.a]), np.concatenate([held.b, appended.b], axis=1)), rows


def slice_of(layer: str, whole: Pair, directions: Sequence[int], version: int) -> Pair:
    """The slice of these directions before anybody trained it, as both ends see it.

    Args:
        layer: its name, of which fresh rows are drawn.
        whole: the global adapter's pair of that version, or as much of it as holds the directions.
        directions: numbers, ascending; appended ones are the first so many from FRESH on.
        version: of the global adapter.

    Raises:
        ValueError: directions that do not ascend, that the pair does not have, or that nobody appends.
    """
    numbers = list(directions)
    own = [number for number in numbers if number < FRESH]
    count = len(numbers) - len(own)
    if numbers != sorted(set(numbers)) or numbers[len(own) :] != list(range(FRESH, FRESH + count)):
        raise ValueError(f"directions ascend, and appended ones follow each other from {FRESH}; found {numbers[:16]}")
    known = take(whole, own)
    d_out, d_in = whole.shape
    if count > d_in:
        raise ValueError(f"a layer of {d_in} inputs has room for no {count} fresh directions")
    if not count:
        return known
    a = fresh_rows(np.zeros((0, d_in), np.float32), count, f"slice:{version}:{layer}")
    b = np.zeros((d_out, count), np.float32)
    return Pair(np.concatenate([known.a, a]), np.concatenate([known.b, b], axis=1))


def learnt(whole: Adapter, slices: Slices, change: Adapter) -> Adapter:
    """An adapter with its trained rows as they are after a change.

    Args:
        whole: of which `slices.rows` were trained: what was received, or what the model held.
        slices: what was trained.
        change: factor-wise, of the trained slice; layers that it does not have stay as they are.
    """
    found = dict(whole)
    for name, by in change.items():
        pair, rows, moved = found[name], list(slices.rows[name]), changed(slices.before[name], by)
        a, b = pair.a.copy(), pair.b.copy()
        a[rows], b[:, rows] = moved.a, moved.b
        found[name] = Pair(a, b)
    return Adapter(found)
