"""Increments of unequal rank as vectors of one Euclidean space: inner products and distances by small matrices alone.

Each increment is brought to its singular form U S V^T first (thin QR and a core of at most twice its rank), so that the
cancellation of trained and received happens in one float64 core; inner products of two increments are then sums over
(U_k^T U_j) * (V_k^T V_j) with nothing large left to cancel. No dense matrix is formed.

Different devices train different layers. Two devices are compared on the layers that both trained, and their squared
distance is scaled up by the share of those layers in the whole: the median energy of all layers over that of the common
ones. The median is over the devices that trained a layer, so a minority does not move the yardstick. Two devices
without a common layer cannot be compared.

Cost a layer, for n increments of rank r: O(n (d_out + d_in) r^2) for the singular forms and O(n^2 (d_out + d_in) r^2)
for the inner products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.algebra import Spectrum, decompose
from server.aggregators.method import Update

Wide = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Increments:
    """What the devices of a round changed.

    Attributes:
        clients: their names, sorted.
        grams: layer name → (n, n) inner products of the increments, float64; rows of devices that did not train the
            layer are zero.
        trained: layer name → (n,) whether each device trained it.
    """

    clients: tuple[str, ...]
    grams: Mapping[str, Wide]
    trained: Mapping[str, NDArray[np.bool_]]

    @property
    def norms(self) -> Wide:
        """(n,) Frobenius norm of each increment, all layers together."""
        squares = np.sum([np.diagonal(gram) for gram in self.grams.values()], axis=0)
        return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def increments(updates: Sequence[Update]) -> Increments:
    """The increments of updates that are sorted by client."""
    layers = sorted({name for update in updates for name in update.trained})
    return Increments(
        tuple(update.client for update in updates),
        {name: _gram([_increment(update, name) for update in updates]) for name in layers},
        {name: np.asarray([name in update.trained for update in updates]) for name in layers},
    )


def _increment(update: Update, name: str) -> Spectrum | None:
    if name not in update.trained:
        return None
    return decompose([(update.discount, update.trained[name]), (-update.discount, update.received[name])])


def _gram(spectra: Sequence[Spectrum | None]) -> Wide:
    gram = np.zeros((len(spectra), len(spectra)))
    for i, x in enumerate(spectra):
        for j, y in enumerate(spectra[: i + 1]):
            if x is not None and y is not None:
                cosines = (x.u.T @ y.u) * (x.vt @ y.vt.T)
                gram[i, j] = gram[j, i] = float(x.s @ cosines @ y.s)
    return gram


def squared_distances(found: Increments) -> Wide:
    """(n, n) squared distances on common layers, scaled as the module says; infinite where there is none."""
    energies = {name: float(np.median(np.diagonal(gram)[found.trained[name]])) for name, gram in found.grams.items()}
    count = len(found.clients)
    apart, common, shared = np.zeros((count, count)), np.zeros((count, count)), np.zeros((count, count))
    for name, gram in found.grams.items():
        own, both = np.diagonal(gram), np.outer(found.trained[name], found.trained[name])
        apart += both * np.maximum(own[:, None] + own[None, :] - 2 * gram, 0.0)
        common += both * energies[name]
        shared += both
    whole = sum(energies.values())
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where no energy is known, layers count alike.
        factor = np.where(common > 0, whole / common, len(energies) / shared)
        result = np.where(shared > 0, apart * factor, np.inf)
    np.fill_diagonal(result, 0.0)
    return np.asarray(result)
