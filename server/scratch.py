"""Room on the disk for what a merge needs and memory may not hold: adapters that are read back a layer at a time.

The file has no name, so it ends with the process however that ends, and there is nothing to clear at the next start.
Small fleets never use it: adapters stay in memory as long as they fit into the room that is given for that.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from pathlib import Path
from typing import final

import numpy as np

from edge_runtime.errors import DiskFullError
from edge_runtime.lora.adapter import Adapter, Deferred, Matrix, Pair

MEMORY_BYTES = 128 << 20
"""Adapters that are kept in memory, all together, before any is written."""
FULL = (errno.ENOSPC, errno.EDQUOT)


@final
class Scratch:
    """Adapters of one merge, or of one version. What was put lives as long as somebody has it.

    Args:
        folder: on the disk that has room.
        memory: bytes of adapters that are kept in memory.
    """

    def __init__(self, folder: Path, memory: int = MEMORY_BYTES) -> None:
        self._folder, self._memory = folder, memory
        self._file: int | None = None
        self._end = 0

    @property
    def written(self) -> int:
        """Bytes on the disk."""
        return self._end

    def put(self, adapter: Adapter) -> Adapter:
        """Keep an adapter; the one that comes back has the same bits, and makes its layers when they are asked for.

        Raises:
            DiskFullError: no room.
        """
        size = 4 * adapter.parameters
        if size <= self._memory:
            self._memory -= size
            return adapter
        try:
            places = {name: self._write(adapter[name]) for name in adapter}
        except OSError as error:
            if error.errno in FULL:
                raise DiskFullError(
                    f"no room for a merge on the disk of {self._folder} ({error}); make room there"
                ) from error
            raise
        sizes = adapter.sizes
        return Adapter(Deferred(sizes, lambda name: self._read(places[name], sizes[name])))

    def _opened(self) -> int:
        if self._file is None:
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - closed with the last adapter
            weakref.finalize(self, file.close)
            self._file = file.fileno()
        return self._file

    def _write(self, pair: Pair) -> int:
        """Append a pair; where it begins."""
        file, begin = self._opened(), self._end
        for factor in (pair.a, pair.b):
            rest = _bytes(np.ascontiguousarray(factor))
            while rest:
                done = os.pwrite(file, rest, self._end)
                self._end, rest = self._end + done, rest[done:]
        return begin

    def _read(self, place: int, size: tuple[int, int, int]) -> Pair:
        d_out, d_in, rank = size
        a = self._filled(np.empty((rank, d_in), np.float32), place)
        return Pair(a, self._filled(np.empty((d_out, rank), np.float32), place + a.nbytes))

    def _filled(self, factor: Matrix, place: int) -> Matrix:
        file, rest = self._opened(), _bytes(factor)
        while rest:
            done = os.preadv(file, [rest], place)
            if not done:
                raise OSError(errno.EIO, "a merge's scratch file ends early", str(self._folder))
            place, rest = place + done, rest[done:]
        return factor


def _bytes(factor: Matrix) -> memoryview:
    return memoryview(factor.reshape(-1).view(np.uint8).data)
