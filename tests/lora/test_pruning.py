"""HetLoRA's pruning: whose tail shrank goes on without it, and nobody else does."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import scale
from edge_runtime.lora.pruning import narrowed, pruned, stays


def pair(rank: int, seed: int = 0) -> Pair:
    draw = np.random.default_rng(seed)
    return Pair(draw.standard_normal((rank, 7)).astype(np.float32), draw.standard_normal((5, rank)).astype(np.float32))


@pytest.mark.parametrize(
    ("rank", "kept", "wanted"), [(50, 0.99, 49), (4, 0.99, 3), (4, 0.5, 2), (1, 0.1, 1), (8, 1, 8)]
)
def test_the_tail_is_what_lies_beyond_the_share(rank: int, kept: float, wanted: int) -> None:
    assert stays(rank, kept) == wanted


def test_only_a_tail_whose_product_of_norms_shrank_is_cut() -> None:
    before = Adapter({"grew": pair(4), "shrank": pair(4, 1), "head": pair(4, 2), "narrow": pair(1, 3)})
    tail = np.array([1, 1, 1, 0.9], np.float32)
    after = Adapter(
        {
            "grew": scale(before["grew"], 1.1),
            "shrank": Pair(before["shrank"].a, before["shrank"].b * tail),
            "head": Pair(before["head"].a * (2 - tail[:, None]), before["head"].b * tail[::-1]),
            "narrow": scale(before["narrow"], 0.5),
        }
    )
    assert pruned(before, after, 0.99) == {"grew": 4, "shrank": 3, "head": 4, "narrow": 1}
    assert pruned(before, before, 0.5) == before.ranks


def test_a_pruned_device_sees_zeros_beyond_its_ranks() -> None:
    received = Adapter({"q": pair(4), "v": pair(3, 1)})
    found = narrowed(received, {"q": 2})
    assert found.ranks == received.ranks
    assert np.array_equal(found["q"].product(), received["q"].b[:, :2] @ received["q"].a[:2])
    assert found["v"] is received["v"]
