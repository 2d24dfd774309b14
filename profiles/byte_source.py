"""A file of which only pieces are wanted, whether it lies on this machine or behind HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import BaseModelError


@dataclass(frozen=True, eq=False)
class ByteSource:
    """A file, to be read in pieces.

    Attributes:
        name: how messages call it.
        size: of the whole file, in bytes; None where a server does not say.
        read: (offset, count) → the bytes there; fewer where the file ends before.
    """

    name: str
    size: int | None
    read: Callable[[int, int], bytes]


def local_file(path: Path) -> ByteSource:
    """A file on this machine; it is opened anew for each piece, so that nothing has to be closed.

    Raises:
        BaseModelError: it is not there or may not be read.
    """

    def read(offset: int, count: int) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(count)
        except OSError as error:
            raise BaseModelError(f"expected to read {path}; found: {error.strerror}; check the file") from error

    try:
        size = path.stat().st_size
    except OSError as error:
        raise BaseModelError(f"expected to read {path}; found: {error.strerror}; check the file") from error
    return ByteSource(str(path), size, read)


def exactly(source: ByteSource, offset: int, count: int) -> bytes:
    """`count` bytes from `offset` on.

    Raises:
        BaseModelError: the file ends before.
    """
    content = source.read(offset, count)
    if len(content) < count:
        raise truncated(source, offset + count)
    return content


def truncated(source: ByteSource, expected: int) -> BaseModelError:
    """The error for a file that ends before it should."""
    found = "it ends before" if source.size is None else f"{source.size}"
    return BaseModelError(f"expected {source.name} to have {expected} bytes or more; found {found}; fetch it again")


def whole(source: ByteSource, limit: int) -> bytes:
    """All of a small file.

    Raises:
        BaseModelError: it has more than `limit` bytes.
    """
    content = source.read(0, limit + 1)
    if len(content) > limit:
        raise BaseModelError(f"expected {source.name} to have at most {limit} bytes; found more; check the file")
    return content


@dataclass(frozen=True, eq=False)
class Files:
    """The files of one model, on this machine or behind HTTP.

    Attributes:
        name: how messages call the place.
        open: (name, bytes that will be read first) → the file, or None if there is none of that name.
        names: lists them.
    """

    name: str
    open: Callable[[str, int], ByteSource | None]
    names: Callable[[], list[str]]


def local_files(folder: Path) -> Files:
    """The files of a folder on this machine."""

    def open_(name: str, first: int) -> ByteSource | None:  # noqa: ARG001  a local file is not fetched ahead
        return local_file(folder / name) if (folder / name).is_file() else None

    def names() -> list[str]:
        try:
            return sorted(path.name for path in folder.iterdir())
        except OSError as error:
            raise BaseModelError(f"expected to list {folder}; found: {error.strerror}; check the folder") from error

    return Files(str(folder), open_, names)
