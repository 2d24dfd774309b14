"""Dense tensors as layers: a pair whose product is the tensor, so that whatever moves pairs moves tensors too.

A tensor of n rows and width w (n virtual tokens, n hidden units of a bottleneck, n parts of a mask, or the one row of
a vector of biases) is the layer `path#tensor` of shape (n, w), with `a` the rows that are held and `b` the columns of
the identity that say which rows they are:

    b @ a = the tensor, with zeros in the rows that are not held

So a cut to r directions is the first r rows, a band is a range of rows, a slice is a choice of rows, and norms and
inner products of products are those of tensors. Training changes `a` alone. What must not happen is a factorisation
of the product, which would mix the rows: whoever merges or turns layers asks `is_dense` first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Matrix, Pair

MARK = "#"
"""Between a module's path and the name of its tensor; no module path has one."""


def dense_name(path: str, tensor: str) -> str:
    """The layer's name of a tensor of the module at that path."""
    return f"{path}{MARK}{tensor}"


def is_dense(name: str) -> bool:
    """Whether a layer is a dense tensor and no low-rank pair."""
    return MARK in name


def path_of(name: str) -> str:
    """The module's path, of a layer of either kind."""
    return name.partition(MARK)[0]


def tensor_of(name: str) -> str:
    """The tensor's name; empty for a low-rank pair."""
    return name.partition(MARK)[2]


def as_pair(values: Matrix, rows: Sequence[int] | NDArray[np.intp], count: int) -> Pair:
    """The pair that holds those rows of a tensor.

    Args:
        values: (r, w), the rows.
        rows: (r,), their numbers, each below `count`.
        count: n, rows of the whole tensor.
    """
    b = np.zeros((count, len(rows)), np.float32)
    b[np.asarray(rows, np.intp), np.arange(len(rows))] = 1.0
    return Pair(values, b)


def first_rows(pair: Pair) -> Pair:
    """The pair with an exact identity, whatever a codec made of it; its rows are the first ones of the tensor."""
    return as_pair(pair.a, range(pair.rank), pair.shape[0])


def rows_of(pair: Pair) -> NDArray[np.intp] | None:
    """(r,), the numbers of the rows that a pair holds; None where its `b` is no choice of rows, such as of a sum."""
    rows = pair.b.argmax(axis=0) if pair.rank else np.zeros(0, np.intp)
    chosen = len(set(rows.tolist())) == pair.rank and np.array_equal(pair.b, as_pair(pair.a, rows, pair.shape[0]).b)
    return rows if chosen else None


def followed(new: Pair, old: Pair) -> NDArray[np.float64]:
    """(r, q): 1 where a row of the new pair is that row of the old one, so that what is remembered of it can follow."""
    return (new.b.T @ old.b).astype(np.float64)
