"""NF4: sixteen levels at the quantiles of a normal distribution, scaled block by block.

Source: the levels of Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (NeurIPS 2023), appendix E, as
bitsandbytes has them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.lora.adapter import Matrix
from edge_runtime.wire.coding import Codec, Part, Parts, bf16_above, from_bf16, inverse
from edge_runtime.wire.grids import join_digits, largest, split_digits

BLOCK = 64
"""Numbers of one direction that share a scale."""

# fmt: off
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=np.float32)
# fmt: on
_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2


def _pack(x: Matrix) -> Parts:
    rank, width = x.shape
    padded = np.zeros((rank, _blocks(width) * BLOCK), np.float32)
    padded[:, :width] = x
    blocks = padded.reshape(-1, BLOCK)
    scale = bf16_above(largest(blocks))
    blocks *= inverse(from_bf16(scale))[:, None]
    # Fifteen comparisons of whole arrays take less time than one binary search for each number.
    symbols = np.zeros(padded.shape, np.uint8)
    for middle in _MIDDLES:
        symbols += padded > middle
    return {"": join_digits(symbols[:, :width].reshape(-1), LEVELS.size), "scale": scale}


def _unpack(parts: Parts, rank: int, width: int) -> Matrix:
    values = split_digits(parts[""], LEVELS.size, LEVELS, rank * width).reshape(rank, width)
    scale = from_bf16(parts["scale"]).reshape(rank, _blocks(width))
    values *= np.repeat(scale, BLOCK, axis=1)[:, :width]
    return values


def _parts(rank: int, width: int) -> Mapping[str, Part]:
    return {"": Part(np.uint8, -(-rank * width // 2)), "scale": Part(np.uint16, rank * _blocks(width))}


def _blocks(width: int) -> int:
    """Blocks of a direction; the last one may be short."""
    return -(-width // BLOCK)


NF4 = Codec(_pack, _unpack, _parts, 4 + 16 / BLOCK)
