"""A device that was given a token instead of a key: its first start, and every later one."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime import config
from edge_runtime.cli import guards
from edge_runtime.errors import ConfigError
from edge_runtime.provision import rules
from edge_runtime.provision.bundle import Order, provision
from edge_runtime.wire.guard import OPEN, DeviceGuard
from server.roster import RosterFile
from tests.server.bench import Bench


def test_the_first_start_makes_a_key_enrols_it_and_forgets_the_token(tmp_path: Path) -> None:
    place = tmp_path / "f"
    provision(Order(place, devices=("c",), tokens=True))
    folder, notes = place / "devices" / "c", list[str]()
    settings = config.load(folder / "fleet.toml")
    with guards.of_server(config.load(place / "server" / "fleet.toml")) as server:
        bench = Bench(tmp_path, guard=server)

        def looks() -> bool:
            bench.pump()
            return False

        with guards.of_device(settings) as guard:
            assert isinstance(guard, DeviceGuard)
            transport = bench.broker.connect("c")
            guards.enrol(settings, "c", transport, guard, notes.append, looks)
            assert notes == [f"enrolled as 'c' in fleet 'fleet' with key {guard.key.id}"]
            known = guard.key
        assert not (folder / "enrolment.token").exists()
        assert RosterFile(place / "server" / "roster.json").read().devices["c"].key == known.public.hex()

        with guards.of_device(settings) as again:
            assert isinstance(again, DeviceGuard)
            assert again.key == known
            guards.enrol(settings, "c", transport, again, notes.append, lambda: pytest.fail("it asked again"))


def test_a_device_that_is_stopped_before_the_answer_keeps_its_token(tmp_path: Path) -> None:
    provision(Order(tmp_path, devices=("c",), tokens=True))
    folder = tmp_path / "devices" / "c"
    settings = config.load(folder / "fleet.toml")
    with guards.of_device(settings) as guard:
        guards.enrol(settings, "c", Bench(tmp_path / "bench").broker.connect("c"), guard, print, lambda: True)
    assert (folder / "enrolment.token").exists()
    assert (folder / "signing.key").exists()


def test_without_keys_nothing_is_signed_on_loopback(tmp_path: Path) -> None:
    with guards.of_device(config.load()) as device, guards.of_server(config.load()) as server:
        assert device is OPEN
        assert server is OPEN


@pytest.mark.parametrize(("key", "who"), [("server_key", "devices/a"), ("roster", "server")])
def test_half_of_the_keys_is_an_error_that_names_the_other_half(tmp_path: Path, key: str, who: str) -> None:
    provision(Order(tmp_path, devices=("a",)))
    found = config.load(tmp_path / who / "fleet.toml")
    less = found.model_copy(update={"security": found.security.model_copy(update={key: None})})
    opened = guards.of_server(less) if who == "server" else guards.of_device(less)
    with pytest.raises(ConfigError, match=f"security.{key} is missing"), opened:
        pass


def test_a_folder_that_was_not_provisioned_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the folder 'broker' of a provisioned fleet was expected"):
        rules.settings("nats", tmp_path)
