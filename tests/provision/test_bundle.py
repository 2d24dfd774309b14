"""Provisioning: private files are private, what exists is kept, and each folder holds all that its machine needs."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from edge_runtime import config
from edge_runtime.cli import guards
from edge_runtime.cli import run as command
from edge_runtime.errors import ConfigError
from edge_runtime.provision import rules
from edge_runtime.provision.authority import CERTIFICATE_DAYS, Authority, Subject
from edge_runtime.provision.bundle import Order, provision, revoke
from edge_runtime.wire import certificates, enrolment
from edge_runtime.wire.guard import DeviceGuard
from server.roster import RosterFile

SECRET = (".key", ".token")


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def test_every_secret_is_its_owners_alone(tmp_path: Path) -> None:
    provision(Order(tmp_path / "f", devices=("a",)))
    provision(Order(tmp_path / "f", devices=("b",), tokens=True))
    secrets = [path for path in (tmp_path / "f").rglob("*") if path.suffix in SECRET]

    assert len(secrets) == 8
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    assert (tmp_path / "f" / "authority").stat().st_mode & 0o077 == 0


def test_provisioning_again_replaces_nothing_and_a_later_device_is_added(tmp_path: Path) -> None:
    place = tmp_path / "f"
    provision(Order(place, devices=("a",), hosts=("broker.lan",), port=18883, broker_folder=Path("/etc/mosquitto/f")))
    before = files(place)
    assert b"listener 18883" in before["broker/mosquitto.conf"]
    assert b"cafile /etc/mosquitto/f/ca.crt" in before["broker/mosquitto.conf"]
    again = provision(Order(place))
    lists = {"broker/revoked.crl"}  # dated when it is written
    assert {name: content for name, content in files(place).items() if name not in lists} == {
        name: content for name, content in before.items() if name not in lists
    }
    assert again.made == []
    assert (again.broker.hosts[0], again.broker.port) == ("broker.lan", 18883)

    later = provision(Order(place, devices=("a", "b")))
    assert later.made == ["b"]
    kept = {name: content for name, content in files(place).items() if name in before}
    changed = {name for name, content in kept.items() if content != before[name]}
    assert changed <= {*lists, "broker/nats-users.conf", "broker/nats.conf", "server/roster.json"}


def test_a_key_that_stands_in_the_way_half_made_is_used_and_not_replaced(tmp_path: Path) -> None:
    """A provisioning that was killed between a key and its certificate goes on."""
    place = tmp_path / "f"
    provision(Order(place, devices=("a",)))
    key = (place / "devices" / "a" / "tls.key").read_bytes()
    (place / "devices" / "a" / "tls.crt").unlink()
    (place / "devices" / "a" / "fleet.toml").unlink()
    assert provision(Order(place)).made == ["a"]
    assert (place / "devices" / "a" / "tls.key").read_bytes() == key


def test_certificates_say_whom_they_are_for_and_openssl_verifies_them(tmp_path: Path) -> None:
    place = tmp_path / "f"
    provision(Order(place, devices=("a",), hosts=("broker.lan", "10.0.0.7")))
    broker = certificates.load(place / "broker" / "broker.crt")
    assert certificates._names(broker) == "'broker.lan', '10.0.0.7', 'localhost', '127.0.0.1'"
    device = certificates.load(place / "devices" / "a" / "tls.crt")
    assert (device.not_valid_after_utc - device.not_valid_before_utc).days == CERTIFICATE_DAYS
    for purpose, path in (("sslserver", "broker/broker.crt"), ("sslclient", "devices/a/tls.crt")):
        line = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(place / "broker" / "ca.crt")]
        found = subprocess.run([*line, str(place / path)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr
        wrong = "sslclient" if purpose == "sslserver" else "sslserver"
        line[4] = wrong
        assert subprocess.run([*line, str(place / path)], capture_output=True, check=False).returncode != 0


def test_a_certificate_that_runs_out_is_renewed_with_its_key(tmp_path: Path) -> None:
    place = tmp_path / "f"
    provision(Order(place, devices=("a",)))
    folder = place / "devices" / "a"
    key = (folder / "tls.key").read_bytes()
    Authority(place / "authority", "f").issue(
        Subject("a", "client", days=30), folder / "tls.crt", folder / "tls.key", anew=True
    )
    assert provision(Order(place)).made == ["a"]
    assert (folder / "tls.key").read_bytes() == key


def test_a_devices_folder_works_from_wherever_it_is_copied_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provision(Order(tmp_path / "f", devices=("a",), hosts=("broker.lan",)))
    (tmp_path / "f" / "devices" / "a").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    found = config.load(Path("moved/fleet.toml"))
    assert found.broker.cafile == tmp_path / "moved" / "ca.crt"
    assert (found.device.name, found.broker.host, found.broker.port) == ("a", "broker.lan", 8883)
    with guards.of_device(found) as guard:
        assert isinstance(guard, DeviceGuard)
    context = ssl.create_default_context(cafile=found.broker.cafile)
    assert found.broker.certfile is not None
    context.load_cert_chain(found.broker.certfile, found.broker.keyfile)


def test_a_token_is_issued_once_and_only_its_public_half_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "f"
    provision(Order(place, devices=("c",), tokens=True))
    token_file, folder = place / "devices" / "c" / "enrolment.token", place / "devices" / "c"
    token = token_file.read_text().strip()
    assert not (folder / "signing.key").exists()
    elsewhere = b"".join(content for name, content in files(place).items() if not name.endswith(".token"))
    assert token.encode() not in elsewhere
    assert RosterFile(place / "server" / "roster.json").read().devices["c"].standing == "expected"
    provision(Order(place))
    assert token_file.read_text().strip() == token
    with guards.of_device(config.load(folder / "fleet.toml")) as guard:
        assert isinstance(guard, DeviceGuard)
        asked = enrolment.request("fleet", "c", guard.key, token)
    assert (folder / "signing.key").stat().st_mode & 0o777 == 0o600
    entry = RosterFile(place / "server" / "roster.json").read().devices["c"]
    assert entry.token is not None
    assert enrolment.proves("fleet", asked, bytes.fromhex(entry.token))


def test_a_revoked_device_comes_back_with_new_keys_alone(tmp_path: Path) -> None:
    place = tmp_path / "f"
    provision(Order(place, devices=("a", "b")))
    roster = RosterFile(place / "server" / "roster.json")
    old = roster.read().devices["a"].key
    serial = certificates.load(place / "devices" / "a" / "tls.crt").serial_number
    outcome = revoke(place, "a", "lost")
    assert {row.name: row.standing for row in outcome.rows}["a"] == "revoked"
    assert roster.read().devices["a"].revoked == "lost"
    assert '"CN=a"' not in (place / "broker" / rules.NATS_USERS).read_text()
    assert serial in revoked_serials(place)
    with pytest.raises(ConfigError, match=r"'a' is revoked .*--renew a"):
        provision(Order(place, devices=("a",)))
    provision(Order(place, renew=("a",)))
    entry = roster.read().devices["a"]
    assert entry.standing == "active"
    assert entry.key != old
    assert revoked_serials(place) == {serial}
    assert certificates.load(place / "devices" / "a" / "tls.crt").serial_number != serial


def revoked_serials(place: Path) -> set[int]:
    line = ["openssl", "crl", "-in", str(place / "broker" / "revoked.crl"), "-noout", "-text"]
    text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    return {int(part.split()[2], 16) for part in text.splitlines() if "Serial Number:" in part}


def test_names_that_cannot_be_and_folders_of_another_fleet_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "f"
    with pytest.raises(ConfigError, match="a device is 1 to 64 letters"):
        provision(Order(place, devices=("_server",)))
    provision(Order(place, fleet="one", devices=("a",)))
    with pytest.raises(ConfigError, match="holds fleet 'one'; found --fleet two"):
        provision(Order(place, fleet="two"))
    with pytest.raises(ConfigError, match="expected one of: a"):
        revoke(place, "nobody", "")


def test_a_nats_subject_is_what_the_server_makes_of_a_topic() -> None:
    assert rules._subject("edge/f/c/pi.kitchen/blob/+/+") == "edge.f.c.pi//kitchen.blob.*.*"


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_tells_what_was_made_and_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "f")
    assert command(["provision", place, "--devices", "a,b", "--host", "broker.lan"]) == 0
    told = capsys.readouterr().out
    for words in (
        "fleet 'fleet'",
        "broker.lan",
        "a new",
        "b new",
        "edge-runtime server --config",
        "scp -rp",
        "730 days",
    ):
        assert words in told
    assert command(["provision", place, "--revoke", "a", "--why", "lost"]) == 0
    assert "refuses 'a' from now on" in capsys.readouterr().out
    assert command(["provision", place, "--revoke", "c"]) == ConfigError.exit_code
    assert command(["provision", place, "--revoke", "a", "--devices", "d"]) == ConfigError.exit_code


@pytest.mark.parametrize("verb", [["server"], ["client", "--data", "x.jsonl"]])
def test_less_than_tls_and_signatures_is_refused_off_loopback(
    verb: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command([*verb, "--broker", "broker.invalid:1883"]) == ConfigError.exit_code
    told = capsys.readouterr().err
    assert "TLS (broker.cafile, certfile, keyfile) and signatures (security.signing_key) are not configured" in told
    assert "edge-runtime provision FLEET_DIR" in told
    assert "--insecure" in told


def test_a_broker_for_everybody_must_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["broker", "--host", "10.0.0.7"]) == ConfigError.exit_code
    assert "--provisioned FLEET_DIR/broker" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    guards.check(config.load(None, [f'broker.host="{host}"']))


def test_insecure_is_a_key_and_a_flag() -> None:
    guards.check(config.load(None, ["broker.host=other", "broker.insecure=true"]))
    guards.check(guards.with_insecure(config.load(None, ["broker.host=other"]), asked=True))
    with pytest.raises(ConfigError, match=r"signatures \(security\.signing_key\) are not"):
        guards.check(config.load(None, ["broker.host=other", "broker.cafile=ca.crt"]))
