"""Codecs that keep floating-point numbers: fp32, fp16 and bf16."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.errors import WireError
from edge_runtime.lora.adapter import Matrix
from edge_runtime.wire.coding import Codec, Part, Parts, from_bf16, to_bf16

LARGEST_HALF = float(np.finfo(np.float16).max)


def _pack_fp32(x: Matrix) -> Parts:
    return {"": x.reshape(-1)}


def _pack_fp16(x: Matrix) -> Parts:
    if x.size and (peak := float(np.abs(x).max())) > LARGEST_HALF:
        raise WireError(f"fp16 holds values up to 65504; found {peak:.3g}; use the codec bf16, int8 or fp32")
    return {"": x.astype(np.float16).reshape(-1)}


def _pack_bf16(x: Matrix) -> Parts:
    return {"": to_bf16(x).reshape(-1)}


def _unpack_float(parts: Parts, rank: int, width: int) -> Matrix:
    return parts[""].astype(np.float32).reshape(rank, width)


def _unpack_bf16(parts: Parts, rank: int, width: int) -> Matrix:
    return from_bf16(parts[""]).reshape(rank, width)


def _whole(dtype: type[np.generic], rank: int, width: int) -> Mapping[str, Part]:
    return {"": Part(dtype, rank * width)}


FP32 = Codec(_pack_fp32, _unpack_float, lambda rank, width: _whole(np.float32, rank, width), 32)
FP16 = Codec(_pack_fp16, _unpack_float, lambda rank, width: _whole(np.float16, rank, width), 16)
BF16 = Codec(_pack_bf16, _unpack_bf16, lambda rank, width: _whole(np.uint16, rank, width), 16)
