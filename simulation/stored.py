"""Large blobs of simulated devices: among the outcomes on this machine's disk, and read where they are needed.

What a device's updates owe is as large as its adapter, twice, in float32: in memory, what 64 devices owe would take as
much as the base that they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

LARGE = 1 << 16
"""Bytes from which on a blob is worth the way to the disk and back."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A blob that is on disk.

    Attributes:
        read: gives its bytes.
    """

    read: Callable[[], bytes]


Blob = bytes | Stored


@overload
def whole(blob: Blob) -> bytes: ...
@overload
def whole(blob: Blob | None) -> bytes | None: ...
def whole(blob: Blob | None) -> bytes | None:
    """Its bytes, wherever they are."""
    return blob.read() if isinstance(blob, Stored) else blob
