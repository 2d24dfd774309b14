"""Pieces of files over real HTTP."""

from __future__ import annotations

import socket
import threading

import pytest

from edge_runtime.errors import UnknownBaseError
from profiles import http_ranges
from profiles.http_ranges import Piece, fetch, remote_file
from tests.profiles.hub_server import Hub, serving

CONTENT = bytes(range(256)) * 4096


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as found:
        found.files["/file"] = CONTENT
        yield found


def refused(url: str, offset: int = 0, count: int = 10) -> str:
    with pytest.raises(UnknownBaseError) as caught:
        fetch(url, "secret", offset, count)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_piece_is_the_same_whether_or_not_the_server_knows_ranges(hub: Hub, ranges: bool) -> None:
    hub.ranges = ranges
    url = f"{hub.url}/file"

    assert fetch(url, "", 0, 8) == Piece(CONTENT[:8], len(CONTENT))
    assert fetch(url, "", 70_001, 100_000) == Piece(CONTENT[70_001:170_001], len(CONTENT))
    assert fetch(url, "", len(CONTENT) - 5, 100) == Piece(CONTENT[-5:], len(CONTENT))
    assert fetch(url, "", len(CONTENT) + 5, 100) == Piece(b"", len(CONTENT))
    assert fetch(f"{hub.url}/none", "", 0, 8) is None


def test_a_server_that_ignores_ranges_is_not_heard_out(hub: Hub) -> None:
    hub.files["/big"] = bytes(64 << 20)
    hub.ranges = False

    assert fetch(f"{hub.url}/big", "", 0, 1000) == Piece(bytes(1000), 64 << 20)
    # What had gone into the buffers of the two sockets before the connection was closed.
    assert hub.sent < 16 << 20


def test_beyond_a_limit_a_server_without_ranges_is_not_asked_to_send_what_is_dropped(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.ranges = False
    monkeypatch.setattr(http_ranges, "SKIP_LIMIT", 1000)

    assert "ignores" in refused(f"{hub.url}/file", offset=2000)


def test_the_first_bytes_are_asked_for_once(hub: Hub) -> None:
    source = remote_file(f"{hub.url}/file", "", 1000)

    assert source is not None
    assert (source.size, source.read(0, 8), source.read(10, 990)) == (len(CONTENT), CONTENT[:8], CONTENT[10:1000])
    assert len(hub.asked) == 1
    assert source.read(1000, 50) == CONTENT[1000:1050]
    assert [asked for _, asked, _ in hub.asked] == ["bytes=0-999", "bytes=1000-1049"]


def test_a_file_that_changes_while_it_is_read_is_noticed(hub: Hub) -> None:
    source = remote_file(f"{hub.url}/file", "", 8)
    assert source is not None
    hub.files["/file"] = CONTENT + b"more"

    with pytest.raises(UnknownBaseError, match="changed"):
        source.read(8, 100)


def test_the_token_goes_to_its_own_host_alone(hub: Hub) -> None:
    with serving() as elsewhere:
        elsewhere.files["/stored"] = b"weights"
        hub.redirect = {"/moved": "/renamed", "/renamed": f"{elsewhere.url}/stored"}

        assert fetch(f"{hub.url}/moved", "secret", 0, 7) == Piece(b"weights", 7)

    assert [sent for _, _, sent in hub.asked] == ["Bearer secret", "Bearer secret"]
    assert [sent for _, _, sent in elsewhere.asked] == [""]
    assert elsewhere.asked[0][1] == "bytes=0-6"


@pytest.mark.parametrize("target", ["/loop", "file:///etc/passwd", "", "http://[", "ftp://x/y"])
def test_a_redirect_to_nowhere_is_one_line(hub: Hub, target: str) -> None:
    hub.redirect = {"/loop": target}

    assert refused(f"{hub.url}/loop")


@pytest.mark.parametrize(("status", "said"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (503, "503"), (429, "try again")])
def test_a_refusal_says_what_to_do(hub: Hub, status: int, said: str) -> None:
    hub.status = status

    assert said in refused(f"{hub.url}/file")


@pytest.mark.parametrize("ranges", [True, False])
def test_an_answer_that_breaks_off_is_noticed(hub: Hub, ranges: bool) -> None:
    hub.cut, hub.ranges = 100, ranges

    assert "breaks off" in refused(f"{hub.url}/file", count=5000)


def test_no_network_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

        assert "refused" in refused(f"http://127.0.0.1:{port}/file")
    assert "found" in refused("http://no.such.host.invalid/file")


def test_a_server_that_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_ranges, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "timed out" in refused(f"http://127.0.0.1:{silent.getsockname()[1]}/file")


def test_a_server_that_drips_is_left(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_ranges, "DEADLINE_S", -1.0)

    assert "0 of 10 bytes" in refused(f"{hub.url}/file")


def test_what_is_no_http_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def speak() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        try:
            assert refused(f"http://127.0.0.1:{port}/file")
        finally:
            thread.join()
