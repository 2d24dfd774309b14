"""A hub on loopback: real HTTP, with ranges, without them, with redirects, and with refusals."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Hub:
    """What the server offers, and what it was asked.

    Attributes:
        files: path → content.
        url: where it listens.
        status: answered instead of content, where it is not 200.
        ranges: whether it honours ranges.
        redirect: path → where it is to be found instead.
        cut: bytes after which an answer breaks off; None: none does.
        asked: path, Range and Authorization of each request.
        sent: bytes of content that went out.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    status: int = 200
    ranges: bool = True
    redirect: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0

    def add(self, hub_id: str, files: dict[str, bytes]) -> None:
        """Put a model on the hub."""
        self.files |= {f"/{hub_id}/resolve/main/{name}": content for name, content in files.items()}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that lives as long as the block."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, hub)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(request: http.server.BaseHTTPRequestHandler, hub: Hub) -> None:
    """One request."""
    asked = request.headers.get("Range", "")
    hub.asked.append((request.path, asked, request.headers.get("Authorization", "")))
    if request.path in hub.redirect:
        request.send_response(302)
        request.send_header("Location", hub.redirect[request.path])
        request.end_headers()
        return
    status = hub.status if hub.status != 200 else 200 if request.path in hub.files else 404
    if status != 200:
        request.send_response(status)
        request.end_headers()
        return
    content = hub.files[request.path]
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", asked) if hub.ranges else None
    if wanted and int(wanted[1]) >= len(content):
        request.send_response(416)
        request.send_header("Content-Range", f"bytes */{len(content)}")
        request.end_headers()
        return
    first, last = (int(wanted[1]), min(int(wanted[2]), len(content) - 1)) if wanted else (0, len(content) - 1)
    request.send_response(206 if wanted else 200)
    if wanted:
        request.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
    request.send_header("Content-Length", str(last + 1 - first))
    request.end_headers()
    _send(request, hub, content[first : last + 1][: hub.cut])


def _send(request: http.server.BaseHTTPRequestHandler, hub: Hub, content: bytes) -> None:
    for start in range(0, len(content), 1 << 14):
        piece = content[start : start + (1 << 14)]
        try:
            request.wfile.write(piece)
        except (BrokenPipeError, ConnectionResetError):
            # The client has heard enough; that is what some tests are about.
            return
        hub.sent += len(piece)
