"""Who has which examples: a fleet's data by device and class, as counts.

    natural     the devices of a group in turn take one class each, the groups of the data as they are
    dirichlet   each device's shares of the classes are drawn from Dirichlet(alpha)
    shards      the examples, sorted by class, are cut into equal shards; each device has so many of them
    quantity    every device has all classes in equal shares, but numbers of examples that differ lognormally

Source: Dirichlet as in Hsu, Qi, Brown: "Measuring the effects of non-identical data distribution for federated visual
classification", arXiv 1909.06335; shards as in McMahan et al., AISTATS 2017. Differs from them: a device keeps its
number of examples, whatever classes it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from simulation.draws import named
from simulation.settings import Partition

Counts = NDArray[np.int64]
"""(devices, classes): examples."""
Shares = NDArray[np.float64]


def counts(settings: Partition, sizes: Sequence[int], classes: int, seed: int) -> Counts:
    """Examples of each device and class; every device has at least one.

    Args:
        settings: how.
        sizes: examples of each device.
        classes: of the data.
        seed: of the simulation.
    """
    whole = np.asarray(sizes, np.int64)
    if settings.kind == "quantity":
        draw = named(seed, "quantity")
        factors = np.exp(settings.sigma * draw.standard_normal(len(whole)) - settings.sigma**2 / 2)
        whole = np.maximum(1, np.rint(whole * factors)).astype(np.int64)
    return apportioned(KINDS[settings.kind](settings, len(whole), classes, seed), whole)


def counted(numbers: Sequence[int], classes: Sequence[int]) -> list[int]:
    """How many of these examples are of each class.

    Args:
        numbers: of the examples.
        classes: the class of each example that there is, from 0 on.
    """
    whole = np.asarray(classes, np.int64)
    found: list[int] = np.bincount(whole[list(numbers)], minlength=int(whole.max()) + 1).tolist()
    return found


def _natural(_settings: Partition, devices: int, classes: int, _seed: int) -> Shares:
    return np.asarray(np.eye(classes)[np.arange(devices) % classes], np.float64)


def _dirichlet(settings: Partition, devices: int, classes: int, seed: int) -> Shares:
    drawn = named(seed, "dirichlet").standard_gamma(settings.alpha, (devices, classes))
    # At a small alpha all of a row may be zero in this type: then one class has everything.
    empty = drawn.sum(axis=1) <= 0
    drawn[empty, named(seed, "dirichlet", "empty").integers(classes, size=int(empty.sum()))] = 1.0
    return np.asarray(drawn / drawn.sum(axis=1, keepdims=True), np.float64)


def _shards(settings: Partition, devices: int, classes: int, seed: int) -> Shares:
    total = devices * settings.shards
    order = named(seed, "shards").permutation(total).reshape(devices, settings.shards)
    # A shard of sorted examples covers part of a class, or parts of several.
    edges = np.linspace(0.0, classes, total + 1)
    cover = np.zeros((total, classes))
    for index in range(classes):
        cover[:, index] = np.clip(np.minimum(edges[1:], index + 1) - np.maximum(edges[:-1], index), 0, None)
    found = cover[order].sum(axis=1)
    return np.asarray(found / found.sum(axis=1, keepdims=True), np.float64)


def _even(_settings: Partition, devices: int, classes: int, _seed: int) -> Shares:
    return np.full((devices, classes), 1.0 / classes)


KINDS: Mapping[str, Callable[[Partition, int, int, int], Shares]] = {
    "natural": _natural, "dirichlet": _dirichlet, "shards": _shards, "quantity": _even,
}  # fmt: skip


def apportioned(shares: Shares, sizes: Counts) -> Counts:
    """Whole numbers in these proportions that sum to these sizes: by largest remainders.

    Args:
        shares: (devices, classes), rows that sum to one.
        sizes: (devices,).
    """
    exact = shares * sizes[:, None]
    found = np.floor(exact).astype(np.int64)
    missing = sizes - found.sum(axis=1)
    order = np.argsort(-(exact - found), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(shares.shape[1])[None, :], axis=1)
    return np.asarray(found + (ranks < missing[:, None]), np.int64)


def dealt(counts: Counts, members: Sequence[Sequence[int]], seed: int) -> list[tuple[int, ...]]:
    """Numbers of examples for each device, in these proportions, from what there is of each class.

    Each example goes to one device where there are enough of its class. Where more are asked for than there are, they
    are dealt in proportion.

    Args:
        counts: (devices, classes) that are wanted.
        members: class → numbers of its examples.
        seed: of the simulation.
    """
    found: list[list[int]] = [[] for _ in range(len(counts))]
    for index, numbers in enumerate(members):
        wanted = counts[:, index]
        total = int(wanted.sum())
        if not total or not len(numbers):
            continue
        order = named(seed, "dealt", index).permutation(np.asarray(numbers, np.int64))
        if total > len(order):
            wanted = apportioned(wanted[None, :] / total, np.asarray([len(order)], np.int64))[0]
        for device, part in enumerate(np.split(order[: int(wanted.sum())], np.cumsum(wanted)[:-1])):
            found[device].extend(map(int, part))
    return [tuple(numbers) for numbers in found]
