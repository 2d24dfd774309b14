"""Blobs made by hand: sound, relabelled, repacked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
import zstandard

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.wire.codec import FORMAT, encode


def one(pair: Pair) -> Adapter:
    return Adapter({"model.layers.0.q_proj": pair})


def tensors(adapter: Adapter, name: str) -> dict[str, Any]:
    """The packed tensors of a blob, as any reader of safetensors sees them."""
    return dict(safetensors.numpy.load(zstandard.ZstdDecompressor().decompress(encode(adapter, name))))


def packed(header: object, body: bytes = b"") -> bytes:
    """A blob with any header at all; its zstd frame is sound."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return zstandard.compress(len(text).to_bytes(8, "little") + text + body)


def repacked(change: Callable[[bytes], bytes], blob: bytes) -> bytes:
    """The blob with its decompressed content changed."""
    return zstandard.compress(change(zstandard.decompress(blob)))


def relabelled(metadata: Mapping[str, str], parts: Mapping[str, Any]) -> bytes:
    """A well-formed safetensors blob of any tensors and tags."""
    return zstandard.compress(safetensors.numpy.save(dict(parts), metadata=dict(metadata)))


def tags(adapter: Adapter, name: str) -> dict[str, str]:
    """The metadata of an adapter's blob under a codec: format and layout."""
    raw = zstandard.decompress(encode(adapter, name))
    return dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"])


def laid_out(layout: object) -> dict[str, str]:
    """The metadata of a blob of any layout."""
    return {"edge": f"{FORMAT}:{json.dumps(layout)}"}


def same(one: Adapter, two: Adapter) -> bool:
    """Equal names, shapes and values."""
    return one.ranks == two.ranks and all(
        np.array_equal(one[name].a, two[name].a) and np.array_equal(one[name].b, two[name].b) for name in one
    )
