"""What the verbs share: sizes, addresses, passwords, logs and records."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from edge_runtime.cli import shell
from edge_runtime.config import Broker, Config
from edge_runtime.errors import ConfigError
from tests.product import Launcher, until


@pytest.mark.parametrize(
    ("text", "count"),
    [("123", 123), ("1K", 1 << 10), ("900M", 900 << 20), ("1.5G", 3 << 29), ("2 GiB", 2 << 30), ("1tb", 1 << 40)],
)
def test_sizes_are_read_in_binary_units(text: str, count: int) -> None:
    assert shell.size(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "1,5G", "900 M B", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a size is a number"):
        shell.size(text)


def test_an_address_takes_the_place_of_the_files_broker() -> None:
    config = Config(broker=Broker(host="far", port=1884, username="me"))
    there, same_port = shell.with_broker(config, "near:99").broker, shell.with_broker(config, "near").broker

    assert shell.with_broker(config, None) is config
    assert (there.host, there.port, there.username) == ("near", 99, "me")
    assert (same_port.host, same_port.port) == ("near", 1884)


def test_a_password_comes_from_the_first_line_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\nnot this\n")
    broker = Broker(username="me", password_file=tmp_path / "password")

    assert shell.address_of(broker).password == "secret"  # noqa: S105 - made up
    assert "secret" not in str(shell.address_of(broker))
    with pytest.raises(ConfigError, match="password"):
        shell.address_of(Broker(password_file=tmp_path / "missing"))
    (tmp_path / "password").write_text("")
    with pytest.raises(ConfigError, match="password"):
        shell.address_of(broker)


def test_logs_can_be_read_by_people_and_by_programs() -> None:
    plain, programs = io.StringIO(), io.StringIO()
    shell.logger("pi", as_json=False, stream=plain)("round 1 → done")
    shell.logger("pi", as_json=True, stream=programs)("round 1 → done")
    found = json.loads(programs.getvalue())

    assert re.fullmatch(r"\d\d:\d\d:\d\d pi: round 1 → done\n", plain.getvalue())
    assert (found["who"], found["message"]) == ("pi", "round 1 → done")


def test_a_server_that_logs_json_writes_nothing_else(product: Launcher, closed_port: int) -> None:
    server = product.start("server", "--json", "--broker", f"127.0.0.1:{closed_port}")
    until(lambda: "trying again" in server.said, "the first failure to connect")
    lines = server.said.splitlines()
    server.kill()

    assert all(json.loads(line)["who"] == "server" for line in lines)


def test_recorded_events_are_lines_of_json_each_with_its_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    for number in (1, 2):
        shell.recorder(path)({"event": "merge", "round": number})
    events = [json.loads(line) for line in path.read_text().splitlines()]

    assert [(event["event"], event["round"]) for event in events] == [("merge", 1), ("merge", 2)]
    assert all(event["time"] for event in events)
