"""Server optimisers over any method: what a merge changed is a gradient, and the global product takes a step along it.

    D = G' - G                       what the method made of the global product, its tail included
    momentum   V+ = m V + D                                     G+ = G + lr V+
    adam       V+ = b1 V + (1 - b1) D,  R+ = b2 R + (1 - b2) r  G+ = G + lr V+ / sqrt(v)
    yogi       as adam, but             R+ = R - (1 - b2) r sign(R - r)

r and c are the means of D² over each row and each column; R and C follow them, and v = (R + t²)(C + t²)ᵀ over the
geometric mean of the two means. Such a v has rank one, so that V / sqrt(v) is V with its rows and columns scaled:
nothing is ever dense, and the step is exact in the factors.

Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (FedAvgM, FedAdam, FedYogi); the second moments by
row and column are those of Shazeer and Stern, "Adafactor", ICML 2018. Differs from the first: second moments are of
products and of rank one, and t² is added to each of their factors instead of t to the root. V is cut to twice the
global rank; what that cuts off is in the report's `lost`.

Cost for a layer of (d_out, d_in) and global rank r: two sums of O(r) columns, O((d_out + d_in) r²).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import hypot
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import refill, to_pair
from edge_runtime.lora.sums import total
from server.aggregators.method import Aggregator, LayerReport, Merged, State, Update, assembled

VELOCITY, MOMENTS = "velocity", "moments"
"""What is carried from merge to merge: V, and (R, C) as the factors of a pair of rank one."""
CAP = 2
"""Directions of V, as a multiple of the global rank."""

Wide = NDArray[np.float64]
Terms = list[tuple[float, Pair]]


class Optimizer(NamedTuple):
    """How one layer's step follows from its change.

    Attributes:
        old: factor of the velocity of before.
        new: factor of the change.
        rate: factor of the step.
        second: (R or C of before, r or c of now) → the next; None for a step along the velocity as it is.
        tau: the t of the formula.
    """

    old: float
    new: float
    rate: float
    second: Callable[[Wide, Wide], Wide] | None = None
    tau: float = 0.0


def momentum(*, server_learning_rate: float = 1.0, server_momentum: float = 0.9) -> Optimizer:
    """FedAvgM; with a momentum of 0, a server learning rate alone.

    Raises:
        ValueError: a rate that is not positive, or a momentum outside [0, 1).
    """
    return Optimizer(_share("server_momentum", server_momentum), 1.0, _positive(server_learning_rate))


def adam(
    *, server_learning_rate: float = 1e-3, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-5
) -> Optimizer:
    """FedAdam. A step moves each entry of a product by about the learning rate, which therefore is to be tuned.

    Raises:
        ValueError: a rate or tau that is not positive, or a beta outside [0, 1).
    """
    kept = _share("beta2", beta2)
    return _adaptive(server_learning_rate, beta1, tau, lambda before, now: kept * before + (1.0 - kept) * now)


def yogi(
    *, server_learning_rate: float = 1e-3, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-5
) -> Optimizer:
    """FedYogi, whose second moments fall no faster than they rise.

    Raises:
        ValueError: as `adam`.
    """
    moved = 1.0 - _share("beta2", beta2)
    return _adaptive(server_learning_rate, beta1, tau, lambda before, now: before - moved * now * np.sign(before - now))


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {"adam": adam, "momentum": momentum, "yogi": yogi}


def optimised(method: Aggregator, optimizer: Optimizer) -> Aggregator:
    """The method, whose merges are gradients for the optimiser.

    Where the method takes increments, what does not fit into the global rank is carried as a tail of the same rank.

    Args:
        method: any, behind a robust rule or not.
        optimizer: of `OPTIMIZERS`.
    """
    if (optimizer.old, optimizer.rate, optimizer.second) == (0.0, 1.0, None):
        return method

    def combine(state: State, updates: Iterable[Update]) -> Merged:
        merged = method.combine(state, updates)
        carried = {part: dict(state.carried.get(part, {})) for part in (VELOCITY, MOMENTS)}
        stepped = assembled(state, _steps(state, merged, optimizer, carried, tail=method.increments))
        kept = {part: Adapter(layers) for part, layers in carried.items() if layers}
        return replace(merged, state=replace(stepped.state, carried=kept), layers=stepped.layers)

    return method._replace(combine=combine)


def _steps(
    state: State, merged: Merged, optimizer: Optimizer, carried: dict[str, dict[str, Pair]], *, tail: bool
) -> Iterator[tuple[str, Pair, Pair | None, LayerReport]]:
    """New pair, tail and report of each layer that was merged; its memory in `carried` becomes that of after."""
    for name, report in merged.layers.items():
        before = _whole(state, name)
        velocity, dropped = _velocity(state, merged, name, optimizer, carried)
        held: Terms = [*((1.0, pair) for pair in before), (optimizer.rate, velocity)]
        rank, seed = state.adapter.rank_of(name), f"{state.version + 1}:{name}"
        keep = 2 * rank if tail else rank
        found = total(held, sum(pair.rank for _, pair in held), rank, keep, seed=f"{seed}:step")
        stop = min(found.spectrum.numerical_rank, keep)
        told = replace(
            report,
            norm=found.norm,
            truncated=found.truncated(rank),
            lost=hypot(found.truncated(max(stop, rank)), dropped, report.lost),
            bound=found.certificate(rank),
            how=found.how,
            why=found.why,
        )
        new = refill(to_pair(found.spectrum, 0, min(rank, stop)), rank, seed)
        yield name, new, to_pair(found.spectrum, rank, stop) if tail and stop > rank else None, told


def _velocity(
    state: State, merged: Merged, name: str, optimizer: Optimizer, carried: dict[str, dict[str, Pair]]
) -> tuple[Pair, float]:
    """What the step of a layer follows, and the norm of what was cut off it; `carried` becomes that of after."""
    before, after = _whole(state, name), _whole(merged.state, name)
    seed, rank = f"{state.version + 1}:{name}", state.adapter.rank_of(name)
    terms = [*((1.0, pair) for pair in after), *((-1.0, pair) for pair in before)]
    change, _ = _sum(terms, sum(pair.rank for _, pair in terms), f"{seed}:change")
    known = carried[VELOCITY].get(name)
    follows: Terms = [(optimizer.new, change), *([(optimizer.old, known)] if known else [])]
    velocity, dropped = _sum(follows, CAP * rank, f"{seed}:velocity")
    carried[VELOCITY][name] = velocity
    if optimizer.second is None:
        return velocity, dropped
    moments = _moments(change, carried[MOMENTS].get(name), optimizer.second)
    carried[MOMENTS][name] = moments
    return _scaled(velocity, moments, optimizer.tau), dropped


def _whole(state: State, name: str) -> list[Pair]:
    """A layer's product as the state knows it: what fits into the global rank, and the tail."""
    return [part[name] for part in (state.adapter, state.tail) if name in part]


def _sum(terms: Terms, keep: int, seed: str) -> tuple[Pair, float]:
    """A sum cut to so many directions, and the norm of what was cut off."""
    found = total(terms, sum(pair.rank for _, pair in terms), keep, keep, seed=seed)
    return to_pair(found.spectrum, 0, min(keep, found.spectrum.numerical_rank)), found.truncated(keep)


def _moments(change: Pair, before: Pair | None, second: Callable[[Wide, Wide], Wide]) -> Pair:
    """(R, C) of after, as b and a of a pair."""
    a, b = change.a.astype(np.float64), change.b.astype(np.float64)
    d_out, d_in = change.shape
    rows = np.einsum("ir,rs,is->i", b, a @ a.T, b) / d_in
    columns = np.einsum("rj,rs,sj->j", a, b.T @ b, a) / d_out
    known = (before.b[:, 0], before.a[0]) if before else (np.zeros(d_out), np.zeros(d_in))
    # Rounding may leave a mean of squares a hair below zero.
    after = [
        np.maximum(second(old.astype(np.float64), np.maximum(now, 0.0)), 0.0)
        for old, now in zip(known, (rows, columns), strict=True)
    ]
    return Pair(after[1][None].astype(np.float32), after[0][:, None].astype(np.float32))


def _scaled(velocity: Pair, moments: Pair, tau: float) -> Pair:
    """V / sqrt(v)."""
    rows, columns = (part.astype(np.float64) + tau**2 for part in (moments.b, moments.a))
    size = (rows.mean() * columns.mean()) ** 0.25
    return Pair(
        (velocity.a / np.sqrt(columns)).astype(np.float32), (velocity.b * size / np.sqrt(rows)).astype(np.float32)
    )


def _adaptive(rate: float, beta1: float, tau: float, second: Callable[[Wide, Wide], Wide]) -> Optimizer:
    kept = _share("beta1", beta1)
    return Optimizer(kept, 1.0 - kept, _positive(rate), second, _positive(tau, "tau"))


def _positive(value: float, name: str = "server_learning_rate") -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"aggregator.{name} must be positive; found {value}")
    return float(value)


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"aggregator.{name} must be at least 0 and below 1; found {value}")
    return float(value)
