"""How far a device's own data pull it from its fleet, from two versions and its last round: SCAFFOLD without traffic.

A device that trains alone for a while drifts towards the optimum of its own data. SCAFFOLD takes that out of every
step: it adds c - c_k to the gradient, where c is the mean gradient of the fleet and c_k that of the device. With its
option II both are known from how far somebody moved in a round: c = -Δ / (K η) and c_k = -Δ_k / (K η), less what the
correction itself moved. Δ_k is the change of the device's own product in the last round that it trained, and Δ that of
the global adapter since then, for each version. Both are here already, so nothing travels: as FedCM reads the term.

    O_k = Δ_k + c D_k'    D_k = O_k - Δ    P = κ D_k    and the round minimises    loss + c ⟨P, BA⟩

D_k' is the D_k of the last round. Without it a device would count as its own drift only what the correction left of it,
and correct half of the truth.

Gradients are those of factors, and the optimiser is Adam, which does not move by η times a gradient. So κ is measured:
it gives c_k the norm that the gradients of that round had, seen from the factors. For plain gradient descent that is
SCAFFOLD's 1 / (K η), but for the constant norm of the rows of `a`. Each device measures its own, so the corrections of
a fleet do not cancel to the last bit, and a part of the drift is left.

Differs from SCAFFOLD: c is the change of the fleet and not the mean of control variates; a device that trained nothing
yet, or another layer, is not corrected there; Δ is seen as far as the device holds the global adapter; and D is cut to
the rank that the device trains, in each layer, so that it takes as much memory as one more copy of the factors.
Sources: Karimireddy et al., ICML 2020 (arXiv 1910.06378), equation 4; Xu et al., 2021 (arXiv 2106.10874).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import cut, decompose, scale, stack, take, to_pair
from edge_runtime.train.optimizer import Array
from edge_runtime.train.resume import RoundState

SEEN, ROWS, DRIFT, SIZE = "seen", "rows", "drift", "size"
"""What stands beside a state: what the model held before the round, which rows of it were trained, D, and κ."""

ROUNDING = 1e-6
"""A change that is so small a part of the slice is that of float32."""


def record(held: Adapter, before: Mapping[str, Pair], rows: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """What the next round must know of this one, beside the parameters that it ended with.

    Args:
        held: what the model holds after the round; only the trained rows have changed.
        before: the trained slice before the round.
        rows: layer → which rows of what was held the slice is.
    """
    found: dict[str, Array] = {}
    for name, pair in before.items():
        a, b, index = held[name].a.copy(), held[name].b.copy(), list(rows[name])
        a[index], b[:, index] = pair.a, pair.b
        found |= {f"{name}.{SEEN}.a": a, f"{name}.{SEEN}.b": b, f"{name}.{ROWS}": np.array(index, np.int64)}
    return found


def drift_of(last: RoundState, versions: int, held: Adapter, scaling: float, strength: float) -> dict[str, Array]:
    """D of each layer that the last round trained and that is held now, and κ, as arrays beside the state of a round.

    Args:
        last: the end of the last round, with what stood beside it and what `record` adds.
        versions: merges since that round began, at least 1.
        held: what the model holds now, before the round.
        scaling: PEFT's lora_alpha / r: parameters have it not folded in.
        strength: c, with which the last round was corrected.
    """
    before = _drifts(last.beside)
    drifts: dict[str, Pair] = {}
    squares = whole = 0.0
    for name, now in held.items():
        moved = _moved(last, name, scaling)
        if moved is None or moved[0].shape != now.shape:
            continue
        then, start, end = moved
        own = [(1.0, end), (-1.0, start), *([(strength, before[name])] if name in before else [])]
        common = min(now.rank, then.rank)
        fleet = [(-1.0 / versions, cut(now, common)), (1.0 / versions, cut(then, common))]
        drifts[name] = to_pair(decompose([*own, *fleet]), 0, start.rank)
        squares += _gradient_square(own, start, scaling)
        whole += _gradient_square([(1.0, start)], start, scaling)
    usual = statistics.fmean(report.loss_gradient_norm for report in last.reports) if last.reports else 0.0
    size = math.sqrt(squares)
    # A device that did not move leaves the rounding of its factors, in which there is no direction.
    if not usual or size <= ROUNDING * math.sqrt(whole):
        return {}
    found: dict[str, Array] = {SIZE: np.array([usual / size], np.float32)}
    for name, pair in drifts.items():
        found |= {f"{name}.{DRIFT}.a": pair.a, f"{name}.{DRIFT}.b": pair.b}
    return found


def pushes(beside: Mapping[str, Array]) -> dict[str, Pair]:
    """Layer → P, from what stands beside a state; empty where there is none."""
    return {name: scale(pair, float(beside[SIZE][0])) for name, pair in _drifts(beside).items()}


def _drifts(beside: Mapping[str, Array]) -> dict[str, Pair]:
    end = f".{DRIFT}.a"
    names = [key.removesuffix(end) for key in beside if key.endswith(end)]
    return {name: Pair(beside[f"{name}.{DRIFT}.a"], beside[f"{name}.{DRIFT}.b"]) for name in names}


def _moved(last: RoundState, name: str, scaling: float) -> tuple[Pair, Pair, Pair] | None:
    """What the model held in the last round, and the slice before and after it; None where it trained no such layer."""
    if f"{name}.{ROWS}" not in last.beside or not {f"{name}.a", f"{name}.b"} <= last.parameters.keys():
        return None
    then = Pair(last.beside[f"{name}.{SEEN}.a"], last.beside[f"{name}.{SEEN}.b"])
    a, b = last.parameters[f"{name}.a"], last.parameters[f"{name}.b"] * np.float32(scaling)
    return then, take(then, last.beside[f"{name}.{ROWS}"].tolist()), Pair(a, b)


def _gradient_square(own: Sequence[tuple[float, Pair]], before: Pair, scaling: float) -> float:
    """‖gradient of ⟨O_k, s B A⟩‖² in the factors that the round began with: O_k Aᵀ times s, and Bᵀ O_k."""
    b, a = stack(own)
    of_b = scaling * (b @ (a @ before.a.T.astype(np.float64)))
    of_a = (before.b.T.astype(np.float64) @ b) @ a
    return float(np.sum(of_b * of_b) + np.sum(of_a * of_a))
