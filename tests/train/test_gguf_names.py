"""Names and row orders of GGUF, both ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.train import gguf_names


@given(st.integers(0, 99), st.sampled_from(sorted(gguf_names.BLOCK)), st.sampled_from(["weight", "bias"]))
def test_names_within_blocks_come_back(index: int, part: str, kind: str) -> None:
    name = f"blk.{index}.{part}.{kind}"
    theirs = gguf_names.to_transformers(name)

    assert theirs == f"model.layers.{index}.{gguf_names.BLOCK[part]}.{kind}"
    assert gguf_names.to_gguf(theirs) == name


@pytest.mark.parametrize("part", sorted(gguf_names.TOP))
def test_names_outside_blocks_come_back(part: str) -> None:
    theirs = gguf_names.to_transformers(f"{part}.weight")

    assert theirs == f"{gguf_names.TOP[part]}.weight"
    assert gguf_names.to_gguf(theirs) == f"{part}.weight"


@pytest.mark.parametrize(
    "name", ["attn_q.weight", "blk.0.token_embd.weight", "blk.x.attn_q.weight", "blk.0.attn_q.scale", "other.weight"]
)
def test_names_that_are_not_known_have_none(name: str) -> None:
    assert gguf_names.to_transformers(name) is None
    assert gguf_names.to_gguf(name) is None
    assert gguf_names.to_gguf("model.layers.0.lm_head.weight") is None


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_the_two_row_orders_undo_each_other(heads: int, half: int, width: int) -> None:
    """And each head's rotation has its two rows side by side in pairs, half a head apart in halves."""
    rows = 2 * half * heads
    weight = np.arange(rows * max(width, 1)).reshape((rows, width) if width else (rows,))
    paired = gguf_names.pairs(weight, heads)

    np.testing.assert_array_equal(gguf_names.halves(paired, heads), weight)
    np.testing.assert_array_equal(paired[0::2][:half], weight[:half])
    np.testing.assert_array_equal(paired[1::2][:half], weight[half : 2 * half])


def test_rows_are_paired_only_where_the_architecture_pairs_them() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert gguf_names.paired_heads("llama", config) == {"q_proj": 4, "k_proj": 2}
    assert gguf_names.paired_heads("llama", {"num_attention_heads": 4}) == {"q_proj": 4, "k_proj": 4}
    assert gguf_names.paired_heads("qwen2", config) == {}
