"""Small fleets of updates for the tests of the methods, and naive dense references of what each method computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.algebra import changed, decompose, take, to_pair
from edge_runtime.lora.factors import only
from edge_runtime.wire import codec
from server import aggregators
from server.aggregators.beside import BESIDE, published
from server.aggregators.method import Aggregator, Shapes, State, Update

Dense = dict[str, NDArray[np.float64]]

SHAPES: Shapes = {"model.layers.0.q_proj": (14, 18), "model.layers.1.q_proj": (10, 12)}
LAYER = "model.layers.0.q_proj"


def learnt_state(rank: int, seed: int = 0, shapes: Shapes = SHAPES, decay: float = 0.25) -> State:
    """A global adapter that has learnt something: singular values fall as exp(-decay i)."""
    draw = np.random.default_rng([seed, rank])
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        u, _ = np.linalg.qr(draw.standard_normal((d_out, d_out)))
        v, _ = np.linalg.qr(draw.standard_normal((d_in, d_in)))
        held = min(rank, d_out, d_in)
        s = np.exp(-decay * np.arange(held))
        whole = Pair(v[:, :held].T.astype(np.float32), (u[:, :held] * s).astype(np.float32))
        layers[name] = to_pair(decompose([(1.0, whole)]), 0, held)
    return State(Adapter(layers), Adapter({}), 3)


def slot_for(shapes: Shapes, rank: int, held: int | None = None) -> Slot:
    """A device that trains `rank` directions of every layer and holds `held`, or just those."""
    return Slot(
        {
            name: LayerSlot(
                d_out, d_in, held=min(rank if held is None else held, d_out, d_in), trained=min(rank, d_out, d_in)
            )
            for name, (d_out, d_in) in shapes.items()
        }
    )


def updates_from(
    state: State,
    method: Aggregator,
    ranks: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    size: float = 0.1,
    seed: int = 0,
    downlink: str | None = None,
) -> list[Update]:
    """What devices of these trained ranks return, if the global adapter reached them through the codec `downlink`.

    With `size` 0, nobody learns anything. Devices train all where the method wants equal ranks, and whichever factors
    it asks for in the round after this state.
    """
    asks = method.asks(state.version + 1)
    ranks = [rank_for(method, state, rank) for rank in ranks]
    draw = np.random.default_rng([seed, *ranks])
    sent = codec.decode(codec.encode(state.adapter, downlink)) if downlink else state.adapter
    found = []
    for index, rank in enumerate(ranks):
        slot = slot_for(sent.shapes, rank)
        received = Adapter(
            {
                name: take(pair, range(min(slot.layers[name].trained, pair.rank)))
                for name, pair in method.fit(sent, slot).items()
            }
        )
        trained = Adapter(
            {
                name: changed(pair, by)
                for (name, pair), by in zip(
                    received.items(),
                    only(Adapter({n: noise(draw, size, pair) for n, pair in received.items()}), asks.sent).values(),
                    strict=True,
                )
            }
        )
        found.append(Update(f"device-{index}", weights[index] if weights else 1.0 + index, received, trained))
    return found


def noise(draw: np.random.Generator, size: float, pair: Pair) -> Pair:
    """What a device may have learnt: normal numbers of that size in both factors."""
    a, b = (size * draw.standard_normal(factor.shape) for factor in (pair.a, pair.b))
    return Pair(a.astype(np.float32), b.astype(np.float32))


def rank_for(method: Aggregator, state: State, rank: int) -> int:
    """The rank of a device that would like to train that many directions."""
    return max(state.adapter.ranks.values()) if method.equal_ranks else rank


def dense(adapter: Adapter, shapes: Shapes = SHAPES) -> Dense:
    """The product of every layer in float64; zero for a layer that the adapter does not have."""
    return {
        name: adapter[name].b.astype(np.float64) @ adapter[name].a.astype(np.float64)
        if name in adapter
        else np.zeros(shape)
        for name, shape in shapes.items()
    }


def model(state: State) -> Adapter:
    """All that a state adds to the base."""
    return published(state)


def mean(updates: Sequence[Update], name: str, of: Callable[[Update], NDArray[np.float64]]) -> NDArray[np.float64]:
    """The weighted mean over the devices that trained a layer."""
    there = [update for update in updates if name in update.trained]
    total = sum(update.weight for update in there)
    return np.asarray(sum(update.weight / total * of(update) for update in there))


def naive_svd(_state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The weighted mean of absolute products."""
    return mean(updates, name, lambda update: dense(update.trained)[name])


def naive_increment(state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The global product and its tail, moved by the weighted mean of what devices changed."""
    moved = mean(updates, name, lambda update: dense(update.trained)[name] - dense(update.received)[name])
    return np.asarray(dense(state.adapter)[name] + dense(state.tail)[name] + moved)


def naive_zero_pad(state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The product of the padded means; directions that nobody trained are those of before."""
    old = state.adapter[name]
    widest = max(update.trained[name].rank for update in updates if name in update.trained)
    a = np.zeros(old.a.shape)
    b = np.zeros(old.b.shape)
    a[widest:], b[:, widest:] = old.a[widest:], old.b[:, widest:]

    def padded(update: Update, factor: str) -> NDArray[np.float64]:
        pair = update.trained[name]
        whole = np.zeros((widest, pair.a.shape[1]) if factor == "a" else (pair.b.shape[0], widest))
        if factor == "a":
            whole[: pair.rank] = pair.a
        else:
            whole[:, : pair.rank] = pair.b
        return whole

    a[:widest] = mean(updates, name, lambda update: padded(update, "a"))
    b[:, :widest] = mean(updates, name, lambda update: padded(update, "b"))
    return np.asarray(b @ a)


def naive_mean_of_factors(_state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The product of the means of the factors, at one rank."""
    a = mean(updates, name, lambda update: update.trained[name].a.astype(np.float64))
    b = mean(updates, name, lambda update: update.trained[name].b.astype(np.float64))
    return np.asarray(b @ a)


def owned(updates: Sequence[Update], name: str, rank: int) -> NDArray[np.float64]:
    """(devices, rank): of each direction, the shares of those who have it; they sum to 1, or to 0 where nobody has."""
    there = np.asarray([[u.weight * (i < u.trained[name].rank) for i in range(rank)] for u in updates], float)
    return np.asarray(there / np.maximum(there.sum(axis=0), 1e-30))


def naive_rbla(state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The product of the means of each direction over those who have it."""
    old = state.adapter[name]
    a, b = old.a.astype(float), old.b.astype(float)
    shares = owned(updates, name, old.rank)
    for i in np.flatnonzero(shares.any(axis=0)):
        a[i] = sum(p * u.trained[name].a[i] for p, u in zip(shares[:, i], updates, strict=True) if p)
        b[:, i] = sum(p * u.trained[name].b[:, i] for p, u in zip(shares[:, i], updates, strict=True) if p)
    return np.asarray(b @ a)


def naive_raflora(state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The sum over the paper's partitions, cut at the ranks of the devices; the rest of the global product stays."""
    old, found = state.adapter[name], np.zeros(state.adapter[name].shape)
    edges = [0, *sorted({update.trained[name].rank for update in updates})]
    for low, high in itertools.pairwise(edges):
        having = [update for update in updates if update.trained[name].rank >= high]
        total = sum(update.weight for update in having)
        for update in having:
            pair = update.trained[name]
            found += update.weight / total * pair.b[:, low:high].astype(float) @ pair.a[low:high].astype(float)
    return np.asarray(found + old.b[:, edges[-1] :].astype(float) @ old.a[edges[-1] :].astype(float))


def naive_hetlora(state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The padded mean with the norms of the products as weights."""
    norms = [float(np.linalg.norm(dense(update.trained)[name])) for update in updates]
    return naive_zero_pad(state, [replace(u, weight=n) for u, n in zip(updates, norms, strict=True)], name)


def naive_lora_fair(_state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The corrected mean with its ridge written as least squares on the dense residual."""
    a = mean(updates, name, lambda update: update.trained[name].a.astype(float))
    b = mean(updates, name, lambda update: update.trained[name].b.astype(float))
    lacking = mean(updates, name, lambda update: dense(update.trained)[name]) - b @ a
    weight = np.sqrt(0.01 * np.mean(np.sum(a * a, axis=1)))
    left = np.concatenate([a.T, weight * np.eye(len(a))])
    right = np.concatenate([lacking.T, np.zeros((len(a), len(lacking)))])
    return np.asarray((b + np.linalg.lstsq(left, right, rcond=None)[0].T) @ a)


def naive_glora(state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The mean of products between the projectors onto the leading eigenvectors of the mean projectors."""
    rank = state.adapter[name].rank
    sides = []
    for of in (
        mean(updates, name, lambda update: projector(dense(update.trained)[name])),
        mean(updates, name, lambda update: projector(dense(update.trained)[name].T)),
    ):
        values, vectors = np.linalg.eigh(of)
        # What one device adds to a direction that others nearly have may be tiny; it is in the subspace all the same.
        leading = vectors[:, ::-1][:, :rank][:, values[::-1][:rank] > np.finfo(np.float32).eps ** 2]
        sides.append(leading @ leading.T)
    return np.asarray(sides[0] @ mean(updates, name, lambda update: dense(update.trained)[name]) @ sides[1])


def projector(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Onto the columns of a matrix, but for rounding of float32."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    kept = u[:, s > s[0] * 2.0**-23 * max(x.shape)]
    return np.asarray(kept @ kept.T)


def frozen(state: State, name: str) -> NDArray[np.float64]:
    """The product of the frozen adapter beside the base."""
    return dense(state.carried.get(BESIDE, Adapter({})), state.adapter.shapes)[name]


def naive_florist(state: State, updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """The global product, moved by the fewest directions of the mean change that hold 99 % of its energy."""
    change = mean(updates, name, lambda update: dense(update.trained)[name] - dense(update.received)[name])
    u, s, vt = np.linalg.svd(change)
    kept = next((p for p in range(len(s) + 1) if np.sum(s[:p] ** 2) >= 0.99 * np.sum(s**2)), 0)
    return np.asarray(frozen(state, name) + dense(state.adapter)[name] + (u[:, :kept] * s[:kept]) @ vt[:kept])


NAIVE: Mapping[str, Callable[[State, Sequence[Update], str], NDArray[np.float64]]] = {
    "fed_sb": naive_increment,
    "fedex_lora": lambda state, updates, name: frozen(state, name) + naive_svd(state, updates, name),
    "fedit": naive_mean_of_factors,
    "fedsa_lora": naive_mean_of_factors,
    "ffa_lora": naive_svd,
    "flora": lambda state, updates, name: frozen(state, name) + naive_increment(state, updates, name),
    "florist": naive_florist,
    "glora": naive_glora,
    "hetlora": naive_hetlora,
    "increment": naive_increment,
    "lora_fair": naive_lora_fair,
    "pf2lora": naive_mean_of_factors,
    "raflora": naive_raflora,
    "rbla": naive_rbla,
    "rolora": naive_svd,
    "svd": naive_svd,
    "zero_pad": naive_zero_pad,
}
"""What each method computes, written as its formula on dense matrices, before any truncation."""


JUDGED = sorted(
    name for name in aggregators.METHODS if not aggregators.build(name).private and aggregators.build(name).weighs
)
"""Methods whose updates have products and count by their weights, so that a rule can judge them."""
RULED = sorted(name for name in JUDGED if not aggregators.build(name).apart)
"""Methods that any rule may stand before: none of their factors must stay as it is."""
STEPPED = sorted(
    name for name in aggregators.METHODS if not aggregators.build(name).apart and not aggregators.build(name).beside
)
"""Methods whose whole model is two factors that travel together, so that a server optimiser may make others of them."""
UNEQUAL = sorted(name for name in aggregators.METHODS if not aggregators.build(name).equal_ranks)
"""Methods that merge devices of unequal rank."""


def idle(method: Aggregator, state: State, ranks: Sequence[int], rounds: int = 1, downlink: str | None = None) -> State:
    """The state after rounds in which every device returns exactly what it received."""
    equal = [1.0] * len(ranks)
    for _ in range(rounds):
        updates = updates_from(state, method, ranks, weights=equal, size=0.0, downlink=downlink)
        state = method.combine(state, updates).state
    return state


def energy_kept(after: Adapter, before: Adapter) -> float:
    """Share of the squared norm of all products that is left."""
    return sum(float(np.sum(w**2)) for w in dense(after, after.shapes).values()) / sum(
        float(np.sum(w**2)) for w in dense(before, before.shapes).values()
    )


MIXED_RANKS = (4, 4, 8, 8, 16, 16, 32, 64)
"""The fleet of ranks on which the published SVD methods were measured to lose most of their energy."""


def wide_state() -> State:
    """One layer of rank 64 with a mild spectrum, for MIXED_RANKS."""
    return learnt_state(64, shapes={LAYER: (96, 80)}, decay=0.02)
