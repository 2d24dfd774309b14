"""Blobs: immutable payloads named by their SHA-256, cut into chunks that fit every common broker."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge_runtime.errors import CorruptPayloadError, TooLargeError

CHUNK_BYTES = 120 * 1024
"""Default chunk. AWS IoT Core refuses more than 128 KB, EMQX 1 MB, Mosquitto 2.1 2 MB, each with topic and header."""

LEAST_CHUNK = 1024
"""A broker that takes no more than this is no broker for blobs."""

MAX_CHUNKS = 1 << 20
"""Chunks of a blob, at most: both ends keep a list of them, and a reference comes from outside."""


class BlobRef(BaseModel):
    """What must be known of a blob before any of its bytes arrive. Unknown fields are ignored, as in every message."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0, le=1 << 40, description="bytes in all")
    chunk_bytes: int = Field(ge=1, le=1 << 40, description="bytes in each chunk but the last")

    @model_validator(mode="after")
    def _countable(self) -> BlobRef:
        if self.chunks > MAX_CHUNKS:
            raise ValueError(f"a blob has at most {MAX_CHUNKS} chunks; found {self.chunks}; use larger chunks")
        return self

    @property
    def chunks(self) -> int:
        """How many chunks; an empty blob has one, empty."""
        return max(1, -(-self.size // self.chunk_bytes))

    def chunk_size(self, index: int) -> int:
        """Bytes that chunk `index` must have."""
        return min(self.chunk_bytes, self.size - index * self.chunk_bytes)


def digest(payload: bytes) -> str:
    """SHA-256 of a payload, hex."""
    return hashlib.sha256(payload).hexdigest()


def describe(payload: bytes, chunk_bytes: int = CHUNK_BYTES) -> BlobRef:
    """The reference by which a payload is offered."""
    return BlobRef(sha256=digest(payload), size=len(payload), chunk_bytes=chunk_bytes)


def split(payload: bytes, chunk_bytes: int = CHUNK_BYTES) -> list[bytes]:
    """The payload in chunks of `chunk_bytes`; the last may be shorter."""
    return [payload[at : at + chunk_bytes] for at in range(0, max(1, len(payload)), chunk_bytes)]


def missing(ref: BlobRef, have: Collection[int]) -> list[int]:
    """Indices of the chunks that are not there yet, in order."""
    return [index for index in range(ref.chunks) if index not in have]


def fits(ref: BlobRef, index: int, chunk: bytes) -> bool:
    """Whether a chunk can be that chunk of that blob: its index exists and its size is right."""
    return 0 <= index < ref.chunks and len(chunk) == ref.chunk_size(index)


def join(ref: BlobRef, chunks: Mapping[int, bytes]) -> bytes:
    """The payload, from all its chunks.

    Raises:
        CorruptPayloadError: a chunk is missing, or the bytes are not those that the SHA-256 names.
    """
    absent = missing(ref, chunks.keys())
    if absent:
        raise CorruptPayloadError(f"blob {ref.sha256[:12]} lacks {len(absent)} of {ref.chunks} chunks; fetch them")
    payload = b"".join(chunks[index] for index in range(ref.chunks))
    found = digest(payload)
    if found != ref.sha256:
        raise CorruptPayloadError(
            f"blob {ref.sha256[:12]} has {len(payload)} bytes of SHA-256 {found[:12]}; fetch it again"
        )
    return payload


def smaller(chunk_bytes: int, largest: int) -> int:
    """The largest half, quarter … of a chunk size that a broker takes.

    Halves, so that chunks that are stored already can be cut to the new size without a rest.

    Raises:
        TooLargeError: that would be below `LEAST_CHUNK`.
    """
    while chunk_bytes > largest:
        chunk_bytes //= 2
    if chunk_bytes < LEAST_CHUNK:
        raise TooLargeError(
            f"a broker that takes messages of {LEAST_CHUNK} bytes was expected; found one that seems to take "
            f"{largest}; raise its limit"
        )
    return chunk_bytes


def recut(chunks: Mapping[int, bytes], old: BlobRef, new: BlobRef) -> dict[int, bytes]:
    """What some chunks of a blob hold of its chunks of another size: those that lie in them as a whole.

    Args:
        chunks: chunks of `old`, by index; each of its right size.
        old: how the blob was cut.
        new: how the same blob is cut now.
    """
    if old.chunk_bytes == new.chunk_bytes:
        return dict(chunks)
    found: dict[int, bytes] = {}
    for start, stop in as_ranges(list(chunks)):
        first = start * old.chunk_bytes
        run = b"".join(chunks[index] for index in range(start, stop))
        index = -(-first // new.chunk_bytes)
        while index < new.chunks and (at := index * new.chunk_bytes - first) + new.chunk_size(index) <= len(run):
            found[index] = run[at : at + new.chunk_size(index)]
            index += 1
    return found


def as_ranges(indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Sorted indices as half-open ranges, so that a list of a thousand missing chunks is a short message."""
    ranges: list[tuple[int, int]] = []
    for index in sorted(set(indices)):
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)


def from_ranges(ranges: Sequence[tuple[int, int]], limit: int) -> list[int]:
    """The indices below `limit` that half-open ranges name, in order.

    Each comes once, however often it is named: ranges come from outside, and every index costs a chunk.
    """
    return sorted({index for start, stop in ranges for index in range(max(0, start), min(stop, limit))})
