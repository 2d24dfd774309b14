"""Pieces of files behind HTTP, by the standard library alone: a header of some kB instead of weights of some GB.

Redirects are followed by hand: a token goes to the host that it was meant for and to no other. A server that ignores
ranges is cut off instead of heard out.
"""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import UnknownBaseError
from profiles.byte_source import ByteSource

TIMEOUT_S = 10.0
"""Without a byte."""
DEADLINE_S = 60.0
"""For one piece."""
REDIRECTS = 5
PIECE = 64 << 10
SKIP_LIMIT = 64 << 20
"""Bytes that are read and dropped, at most, where a server ignores ranges."""

_OK, _PARTIAL, _NOT_FOUND, _BEYOND = 200, 206, 404, 416
_DENIED = frozenset({401, 403})
_MOVED = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)")


@dataclass(frozen=True)
class Piece:
    """A part of a file.

    Attributes:
        content: the bytes; fewer than were asked for where the file ends before.
        size: of the whole file, in bytes; None where the server does not say.
    """

    content: bytes
    size: int | None


def remote_file(url: str, token: str, first: int) -> ByteSource | None:
    """A file behind a URL, of which the first bytes are fetched at once; None if there is none (404).

    Raises:
        UnknownBaseError: no connection, no permission, or no usable answer.
    """
    start = fetch(url, token, 0, first)
    if start is None:
        return None

    def read(offset: int, count: int) -> bytes:
        beginning = start.content
        if offset + count <= len(beginning) or len(beginning) < first:
            return beginning[offset : offset + count]
        piece = fetch(url, token, offset, count)
        if piece is None or piece.size != start.size:
            raise UnknownBaseError(f"expected {url} to stay the same while it is read; found it changed; try again")
        return piece.content

    return ByteSource(url, start.size, read)


def fetch(url: str, token: str, offset: int, count: int) -> Piece | None:
    """`count` bytes of a file from `offset` on; None if there is no such file (404).

    Raises:
        UnknownBaseError: as `remote_file` says.
    """
    deadline = time.monotonic() + DEADLINE_S
    try:
        with _follow(url, token, offset, count) as response:
            if response.status == _NOT_FOUND:
                return None
            return _piece(url, response, offset, count, deadline)
    except (OSError, http.client.HTTPException, ValueError) as error:
        # urllib wraps what happens while it connects, the socket does not; a redirect may name no address at all.
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = " ".join(str(cause).split())[:200] or type(error).__name__
        raise UnknownBaseError(
            f"expected an answer from {url}; found: {reason}; check the network, or give a local folder or .gguf file"
        ) from error


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS by the proxies of the environment; answers come as they are, errors and redirects too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _follow(url: str, token: str, offset: int, count: int) -> Any:
    """The answer at the end of the redirects; urllib's own handler would hand the token to every host on the way."""
    opener, here = _opener(), url
    for _ in range(REDIRECTS + 1):
        headers = {"Range": f"bytes={offset}-{offset + count - 1}", "Accept-Encoding": "identity"}
        if token and _host(here) == _host(url):
            headers["Authorization"] = f"Bearer {token}"
        headers["User-Agent"] = "edge-runtime"
        # The scheme is checked by the opener, which has handlers for HTTP and HTTPS alone.
        request = urllib.request.Request(here, headers=headers)  # noqa: S310
        response = opener.open(request, timeout=TIMEOUT_S)
        if response.status not in _MOVED:
            return response
        response.close()
        here = urllib.parse.urljoin(here, response.headers.get("Location", ""))
    raise UnknownBaseError(f"expected a file behind {url}; found more than {REDIRECTS} redirects; check HF_ENDPOINT")


def _host(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def _piece(url: str, response: Any, offset: int, count: int, deadline: float) -> Piece:
    status = response.status
    if status in _DENIED:
        raise UnknownBaseError(
            f"expected to be let in to {url}; found {status}: the model is gated or private, or does not exist; set "
            f"HF_TOKEN to a token with access to it, or check the name"
        )
    if status not in {_OK, _PARTIAL, _BEYOND}:
        raise UnknownBaseError(
            f"expected {url} to answer 200 or 206; found {status} {response.reason}; try again later"
        )
    skip, size = 0, None
    if status == _OK:
        skip, length = offset, response.headers.get("Content-Length", "")
        size = int(length) if re.fullmatch(r"\d{1,18}", length) else None
    else:
        stated = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if stated is None or (status == _PARTIAL and int(stated[1] or -1) != offset):
            found = response.headers.get("Content-Range")
            raise UnknownBaseError(f"expected {url} from byte {offset} on; found the range {found!r}; try again later")
        size = None if stated[2] == "*" else int(stated[2])
    if status == _BEYOND:
        return Piece(b"", size)
    if skip > SKIP_LIMIT:
        raise UnknownBaseError(f"expected ranges from {url}; found a server that ignores them; download the model")
    content = _read(response, skip, count, deadline)
    if size is not None and len(content) < min(count, size - offset):
        raise UnknownBaseError(f"expected {count} bytes from {url}; found that the answer breaks off; try again")
    return Piece(content, size)


def _read(response: Any, skip: int, count: int, deadline: float) -> bytes:
    content = bytearray()
    while len(content) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no more than {len(content)} of {count} bytes in {DEADLINE_S:.0f} s")
        piece = response.read1(min(PIECE, skip + count - len(content)))
        if not piece:
            break
        content += piece[skip:]
        skip -= min(skip, len(piece))
    return bytes(content)
