"""One change in the place of all updates, entry by entry in the joint basis of a layer.

    T_ij = trimmed mean over k of (Uᵀ D_k V)_ij,   the layer changes by U T Vᵀ

D_k is what the method merges of an update: its increment, or, for methods that average absolute products, the product
itself. Devices that did not train a layer have no say in it. The basis has as many directions as a merge could keep,
and more where the global rank is small; what the trimmed mean of the entries outside of it could be at most is added to
the report's `lost`. So neither the memory nor the sorting grows with the layer: 100 devices of ranks up to 64 have the
same 256 x 256 entries in a layer of 4,096 x 4,096 as in one of 16,384.

How much of a device's change lies among what was left is known for each entry. Where it is next to nothing beside what
counts of the others', the device is named as left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot

import numpy as np

from edge_runtime.lora.adapter import Adapter, Pair, joined
from edge_runtime.lora.algebra import Spectrum, signed, svd, to_pair, zero
from server.aggregators.method import Aggregator, LayerReport, Merged, State, Update
from server.aggregators.robust.basis import NOISE, Basis, Changes, basis, changes, coordinates
from server.aggregators.robust.form import instead, terms
from server.aggregators.robust.geometry import Wide
from server.aggregators.robust.rule import Coordinatewise, Trim
from server.aggregators.robust.trimming import outside, trimmed

DIRECTIONS = 256
"""Of a basis, on either side, at most; twice the global rank where that is more, as a merge keeps with its tail."""
ENTRIES_BYTES = 16 << 20
"""For the entries that are sorted at a time."""
LEFT_OUT = 0.01
"""Whoever counted for less than this share of the median device has been left out."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is known of one layer.

    Attributes:
        clients: who trained it.
        counted: (n,) squared norm of what counted of each change.
        squares: (n,) of the whole change.
        lost: what is outside of the basis, at most.
        why: the basis, for people.
    """

    clients: tuple[str, ...]
    counted: Wide
    squares: Wide
    lost: float
    why: str


def replaced(method: Aggregator, state: State, updates: Sequence[Update], name: str, rule: Coordinatewise) -> Merged:
    """The merge of one change in the place of all.

    Args:
        method: that merges it.
        state: of before.
        updates: sorted by client, of finite numbers; each of their layers trained by as many as the rule needs.
        name: of the rule.
        rule: how entries are trimmed.
    """
    layers: dict[str, _Layer] = {}
    pairs, widest = [], {}
    for layer in sorted({layer for update in updates for layer in update.trained}):
        there = [update for update in updates if layer in update.trained]
        widest[layer] = max(update.trained.rank_of(layer) for update in there)
        pair, layers[layer] = _merged(method, state, there, layer, rule)
        # All changes of a model may be too many for memory, so each goes where the merged layers go.
        pairs.append(state.keep(Adapter({layer: pair})))
    merged = method.combine(state, [instead(method, state, joined(pairs), widest, name)])
    counted = _counted(list(layers.values()))
    reports = {layer: _told(report, layers[layer]) for layer, report in merged.layers.items()}
    return replace(merged, layers=reports, counted=counted, excluded=_left_out(counted))


def _merged(
    method: Aggregator, state: State, updates: Sequence[Update], layer: str, rule: Coordinatewise
) -> tuple[Pair, _Layer]:
    """The change of one layer, and what is known of it."""
    clients = tuple(update.client for update in updates)
    found = changes(terms(method, update, layer) for update in updates)
    squares = found.squares
    if not squares.any():
        return zero(state.adapter.shape_of(layer), 1), _Layer(clients, squares, squares, 0.0, "nobody changed anything")
    trim = rule.trim(np.asarray([update.weight_of(layer) for update in updates]))
    most = max(DIRECTIONS, 2 * state.adapter.rank_of(layer))
    base = basis(found, most, seed=f"{state.version + 1}:{layer}:basis")
    middle, counted, inside = _trimmed(found, base, trim)
    lost = 0.0 if base.whole else outside(np.maximum(squares - inside, 0.0), trim)
    p, q = middle.shape
    why = f"entries in {p} x {q} directions" + (f", outside of them at most {lost:.2g}" if lost else "")
    return _pair(middle, base), _Layer(clients, counted, squares, lost, why)


def _trimmed(found: Changes, base: Basis, trim: Trim) -> tuple[Wide, Wide, Wide]:
    """(p, q) trimmed means; (n,) squared norms of what counted of each change, and of what lies in the basis."""
    left, right = coordinates(found, base)
    (p, q), n = (left.shape[0], right.shape[1]), len(found.parts)
    middle, counted, inside = np.empty((p, q)), np.zeros(n), np.zeros(n)
    step = max(1, ENTRIES_BYTES // (8 * q * n))
    for start in range(0, p, step):
        rows = slice(start, start + step)
        values = np.stack([((left[rows, k] * found.s[k]) @ right[k]).ravel() for k in found.parts], axis=1)
        means, within = trimmed(values, trim)
        middle[rows] = means.reshape(-1, q)
        counted += np.sum(within**2, axis=0)
        inside += np.sum(values**2, axis=0)
    return middle, counted, inside


def _pair(middle: Wide, base: Basis) -> Pair:
    """The pair of U T Vᵀ, without directions that are rounding."""
    u, s, vt = svd(middle)
    held = max(1, int(np.count_nonzero(s**2 > NOISE * s[0] ** 2)))
    return to_pair(signed(Spectrum(base.u @ u[:, :held], s[:held], vt[:held] @ base.v)))


def _counted(layers: Sequence[_Layer]) -> dict[str, float]:
    """Client → share of its change, all layers together, that counted: of squared norms. 1 for one without a change."""
    kept: dict[str, float] = {}
    whole: dict[str, float] = {}
    for layer in layers:
        for client, part, square in zip(layer.clients, layer.counted, layer.squares, strict=True):
            kept[client] = kept.get(client, 0.0) + float(part)
            whole[client] = whole.get(client, 0.0) + float(square)
    return {client: min(1.0, kept[client] / whole[client]) if whole[client] else 1.0 for client in sorted(whole)}


def _left_out(counted: Mapping[str, float]) -> dict[str, str]:
    """Client → why, for those who counted for nothing beside the others."""
    usual = float(np.median(list(counted.values())))
    return {
        client: f"of its change {share:.2g} counted, and of the usual one {usual:.2g}"
        for client, share in counted.items()
        if share < LEFT_OUT * usual
    }


def _told(report: LayerReport, layer: _Layer) -> LayerReport:
    """The method's report of the one change, as one of all."""
    why = "; ".join(part for part in (report.why, layer.why) if part)
    return replace(report, updates=len(layer.clients), lost=hypot(report.lost, layer.lost), why=why)
