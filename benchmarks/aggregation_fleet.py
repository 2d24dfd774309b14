"""Synthetic updates for the benchmark of aggregation: what a fleet of unequal ranks shares, and what each has alone.

Singular value i of the global adapter is 1/i. Of a device of rank r, direction i of the change is

    Δb_i = 0.3 i^-½ (S_i + n_i),   Δa_i = 0.3 (T_i + m_i),

with S and T orthonormal and the same for all devices, in the first 32 directions, and n and m private Gaussian noise of
norm 1 in all of them. So half of the change is signal; the noise falls as slowly as i^-½, no two devices share any of
it, and the sum has a plateau of directions of nearly equal size where it is cut: hard for a range finder, and for a
stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edge_runtime.lora.adapter import Adapter, Deferred, Matrix, Pair, joined, remembering
from edge_runtime.lora.algebra import ROW_NORM, changed, cut
from server.aggregators.method import State, Update
from server.scratch import Scratch

SHARED, SIZE = 32, 0.3
RANKS = (4, 8, 16, 32, 64)
Layers = dict[str, tuple[int, int]]


def ranks_of(clients: int) -> list[int]:
    """Ranks of so many devices: 4, 8, 16, 32, 64, 4 and so on."""
    return [RANKS[index % len(RANKS)] for index in range(clients)]


def _orthonormal(draw: np.random.Generator, rows: int, count: int) -> Matrix:
    q, _ = np.linalg.qr(draw.standard_normal((rows, min(rows, count)), dtype=np.float32))
    return np.asarray(q, np.float32)


def global_pair(shape: tuple[int, int], rank: int, seed: int) -> Pair:
    """A global layer that has learnt something."""
    draw, (d_out, d_in) = np.random.default_rng([seed, 1]), shape
    u, v = _orthonormal(draw, d_out, rank), _orthonormal(draw, d_in, rank)
    s = 1 / np.arange(1, u.shape[1] + 1, dtype=np.float32)
    return Pair(np.ascontiguousarray(ROW_NORM * v.T), np.asarray(u * (s / np.float32(ROW_NORM)), np.float32))


def signal(shape: tuple[int, int], seed: int) -> tuple[Matrix, Matrix]:
    """What all devices of a layer share: S (d_out, 32) and T (32, d_in)."""
    draw, (d_out, d_in) = np.random.default_rng([seed, 2]), shape
    return _orthonormal(draw, d_out, SHARED), np.ascontiguousarray(_orthonormal(draw, d_in, SHARED).T)


def change(shared: tuple[Matrix, Matrix], rank: int, seed: Sequence[int]) -> Pair:
    """What one device learnt of one layer, as a change of the factors of its slice."""
    draw, (s, t) = np.random.default_rng(seed), shared
    b = draw.standard_normal((s.shape[0], rank), dtype=np.float32) / np.float32(s.shape[0] ** 0.5)
    a = draw.standard_normal((rank, t.shape[1]), dtype=np.float32) / np.float32(t.shape[1] ** 0.5)
    both = min(rank, s.shape[1])
    b[:, :both] += s[:, :both]
    a[:both] += t[:both]
    b *= SIZE * np.arange(1, rank + 1, dtype=np.float32) ** np.float32(-0.5)
    a *= SIZE
    return Pair(a, b)


def round_of(layers: Layers, clients: int, rank: int, room: Scratch) -> tuple[State, list[Update]]:
    """A state and the updates of a round, all of them in the scratch file, as `server.merging` has them."""
    state: dict[str, Adapter] = {}
    changes: list[dict[str, Adapter]] = [{} for _ in range(clients)]
    for number, (name, shape) in enumerate(layers.items()):
        shared = signal(shape, number)
        state[name] = room.put(Adapter({name: global_pair(shape, rank, number)}))
        for index, held in enumerate(ranks_of(clients)):
            changes[index][name] = room.put(Adapter({name: change(shared, held, [number, index])}))
    adapter = joined(state.values())
    return State(adapter, Adapter({}), 1, keep=room.put), list(_updates(remembering(adapter), changes))


def _updates(sent: Adapter, changes: list[dict[str, Adapter]]) -> Iterator[Update]:
    for index, parts in enumerate(changes):
        own = joined(parts.values())
        yield Update(f"{index:05}", float(1 + index % 7), *_slice(sent, own))


def _slice(sent: Adapter, own: Adapter) -> tuple[Adapter, Adapter]:
    """Received and trained, made layer by layer as `server.slices` does."""
    received = Adapter(Deferred(own.sizes, lambda name: cut(sent[name], own.rank_of(name))))
    return received, Adapter(Deferred(own.sizes, lambda name: changed(received[name], own[name])))
