"""A fleet's secrets on disk, one folder for each machine that they go to.

    <folder>/authority/        ca.crt  ca.key  broker.json                        stays here, offline if you can
    <folder>/broker/           ca.crt  broker.crt  broker.key  revoked.crl  acl  nats-users.conf
                               mosquitto.conf  nats.conf
    <folder>/server/           fleet.toml  ca.crt  tls.crt  tls.key  signing.key  signing.pub  roster.json
    <folder>/devices/<name>/   fleet.toml  ca.crt  tls.crt  tls.key  server.pub  signing.key or enrolment.token

What exists is kept: provisioning again adds what is missing, renews certificates that run out, and replaces no key.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from edge_runtime import config as settings
from edge_runtime.errors import ConfigError, unknown_name
from edge_runtime.provision import rules
from edge_runtime.provision.authority import Authority, Subject
from edge_runtime.wire import certificates, enrolment, topics
from edge_runtime.wire.keys import SigningKey, public_pem, read_signing_key, write_secret
from edge_runtime.wire.messages import Model
from server import roster as rosters
from server.roster import Entry, Roster, RosterFile

LOOPBACK = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Order:
    """What is to be provisioned.

    Attributes:
        folder: of the fleet.
        fleet: its name; None for the one that is there, or "fleet".
        hosts: names and addresses of the broker, the first of which clients use; () for those that are there.
        port: of the broker; None for the one that is there, or 8883.
        devices: those to add.
        tokens: whether new devices get an enrolment token instead of a signing key.
        renew: devices that get new keys; what they had is revoked.
        broker_folder: where `broker/` will lie on the broker's machine; None for what was said
            before, or where it lies now.
    """

    folder: Path
    fleet: str | None = None
    hosts: Sequence[str] = ()
    port: int | None = None
    devices: Sequence[str] = ()
    tokens: bool = False
    renew: Sequence[str] = ()
    broker_folder: Path | None = None


@dataclass(frozen=True)
class Row:
    """One identity of the fleet, for the table.

    Attributes:
        name: of the device, or "authority", "broker", "server".
        standing: what it is worth now: made, kept, renewed, active, expected, revoked.
        expires: the end of its certificate.
        folder: what to copy to its machine.
    """

    name: str
    standing: str
    expires: datetime
    folder: Path


class BrokerFacts(Model):
    """Where a fleet's broker is, remembered from one provisioning to the next.

    Attributes:
        hosts: its names and addresses, the first of which clients use.
        port: where it listens.
        folder: where `broker/` lies on its machine; None for where it was made.
    """

    hosts: tuple[str, ...] = ("localhost",)
    port: int = 8883
    folder: Path | None = None


@dataclass
class Outcome:
    """What was made.

    Attributes:
        fleet: its name.
        broker: where it is.
        rows: every identity there is.
        made: names of those with something new.
    """

    fleet: str
    broker: BrokerFacts
    rows: list[Row] = field(default_factory=list)
    made: list[str] = field(default_factory=list)


def provision(order: Order) -> Outcome:
    """Make what is missing of a fleet's secrets.

    Raises:
        ConfigError: a name that cannot be, another fleet's folder, or a device that is revoked.
    """
    place = order.folder.resolve()
    roster_path = place / "server" / "roster.json"
    fleet, broker = _identity(order, roster_path, place)
    for name in order.devices:
        topics.valid_name(name, "device")
    authority = Authority(_folder(place / "authority"), fleet)
    outcome = Outcome(fleet, broker)
    if not roster_path.exists():
        rosters.write(roster_path, Roster(fleet=fleet))
    roster = RosterFile(roster_path)
    _renew(order.renew, place, roster)
    _broker(place, authority, outcome)
    _server(place, authority, outcome)
    for name in dict.fromkeys((*roster.read().devices, *order.devices)):
        _device(place / "devices" / name, name, authority, roster, outcome, order)
    _rules(place, authority, roster.read(), broker)
    outcome.rows.insert(0, Row("authority", "kept", _end(authority.certificate_file), place / "authority"))
    return outcome


def revoke(folder: Path, name: str, why: str) -> Outcome:
    """Take a device out of its fleet: a running server refuses it at once, the broker from its next start on.

    Raises:
        ConfigError: no such fleet or device.
    """
    place = folder.resolve()
    roster = RosterFile(place / "server" / "roster.json")
    _known(roster.read(), name)

    def revoked(found: Roster) -> Roster:
        return found.having(name, found.devices[name].model_copy(update={"revoked": why}))

    roster.change(revoked)
    return provision(Order(folder))


def _known(roster: Roster, name: str) -> None:
    if name not in roster.devices:
        raise ConfigError(unknown_name(f"device of fleet '{roster.fleet}'", name, roster.devices))


def _identity(order: Order, roster_path: Path, place: Path) -> tuple[str, BrokerFacts]:
    """The fleet's name and its broker: what is asked for, or what was before."""
    facts_file = _folder(place / "authority") / "broker.json"
    fleet = order.fleet or "fleet"
    if roster_path.exists():
        found = RosterFile(roster_path).read().fleet
        if order.fleet not in {None, found}:
            raise ConfigError(f"{place} holds fleet '{found}'; found --fleet {order.fleet}; choose another folder")
        fleet = found
    topics.valid_name(fleet, "fleet")
    try:
        known = BrokerFacts.model_validate_json(facts_file.read_bytes()) if facts_file.exists() else BrokerFacts()
    except ValidationError as error:
        raise ConfigError(f"{facts_file} was expected to say where the broker is ({error}); restore it") from error
    hosts = tuple(dict.fromkeys((*(order.hosts or known.hosts), *LOOPBACK)))
    facts = BrokerFacts(hosts=hosts, port=order.port or known.port, folder=order.broker_folder or known.folder)
    facts_file.write_text(facts.model_dump_json(exclude_none=True) + "\n", encoding="utf-8")
    return fleet, facts


def _renew(names: Sequence[str], place: Path, roster: RosterFile) -> None:
    """Put away what devices had; their certificates stay known, so that they can be revoked."""
    for name in names:
        _known(roster.read(), name)
        folder = place / "devices" / name
        if folder.exists():
            stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%f")
            shutil.move(folder, _folder(place / "authority" / "retired") / f"{name}-{stamp}")
        roster.change(partial(Roster.having, name=name, entry=Entry()))


def _broker(place: Path, authority: Authority, outcome: Outcome) -> None:
    folder, hosts = _folder(place / "broker"), outcome.broker.hosts
    _certificate(folder, "broker", authority, Subject(hosts[0], "broker", hosts), outcome, "broker")
    outcome.rows.append(Row("broker", ", ".join(hosts), _end(folder / "broker.crt"), folder))


def _server(place: Path, authority: Authority, outcome: Outcome) -> None:
    folder = _folder(place / "server")
    _certificate(folder, "tls", authority, Subject(rules.SERVER, "client"), outcome, "server")
    if not (folder / "signing.key").exists():
        SigningKey.generate().write(folder / "signing.key")
    key = read_signing_key(folder / "signing.key")
    if not (folder / "signing.pub").exists():
        (folder / "signing.pub").write_text(public_pem(key.public), encoding="ascii")
    security = {"signing_key": "signing.key", "roster": "roster.json"}
    _settings(folder, outcome, security)
    outcome.rows.append(Row("server", f"key {key.id}", _end(folder / "tls.crt"), folder))


def _device(folder: Path, name: str, authority: Authority, roster: RosterFile, outcome: Outcome, order: Order) -> None:
    entry = roster.read().devices.get(name, Entry())
    if entry.revoked is not None and name in order.devices:
        raise ConfigError(f"'{name}' is revoked ({entry.revoked}); give it new keys with --renew {name}")
    if entry.revoked is None:
        entry = _equip(_folder(folder), name, authority, entry, outcome, order)
        if roster.read().devices.get(name) != entry:
            roster.change(lambda found: found.having(name, entry))
    if (folder / "tls.crt").exists():
        outcome.rows.append(Row(name, entry.standing, _end(folder / "tls.crt"), folder))


def _equip(folder: Path, name: str, authority: Authority, entry: Entry, outcome: Outcome, order: Order) -> Entry:
    """Put what is missing into a device's folder; returns its entry in the roster."""
    _certificate(folder, "tls", authority, Subject(name, "client"), outcome, name)
    shutil.copyfile(folder.parents[1] / "server" / "signing.pub", folder / "server.pub")
    security = {"signing_key": "signing.key", "server_key": "server.pub"}
    if entry.key is None and entry.token is None:
        if order.tokens:
            token = enrolment.new_token()
            write_secret(folder / "enrolment.token", token.encode() + b"\n")
            entry = Entry(token=enrolment.key_of(token).public.hex())
        else:
            if not (folder / "signing.key").exists():
                SigningKey.generate().write(folder / "signing.key")
            entry = Entry(key=read_signing_key(folder / "signing.key").public.hex())
    if entry.token is not None:
        security["token_file"] = "enrolment.token"  # noqa: S105  the name of a file
    _settings(folder, outcome, security, name)
    return entry


def _rules(place: Path, authority: Authority, roster: Roster, broker: BrokerFacts) -> None:
    """Everything that the broker must be told, written anew each time."""
    folder = place / "broker"
    there = broker.folder or folder
    active = [name for name, entry in roster.devices.items() if entry.revoked is None]
    gone = [place / "devices" / name / "tls.crt" for name, entry in roster.devices.items() if entry.revoked is not None]
    gone += sorted((place / "authority" / "retired").glob("*/tls.crt"))
    serials = [certificates.load(path).serial_number for path in gone if path.exists()]
    (folder / "revoked.crl").write_bytes(authority.revoked(serials))
    (folder / "acl").write_text(rules.acl(roster.fleet), encoding="utf-8")
    # Mosquitto warns of rules that others could read or write.
    (folder / "acl").chmod(0o600)
    users = rules.nats_users(roster.fleet, active)
    (folder / rules.NATS_USERS).write_text(users, encoding="utf-8")
    for kind, store in (("mosquitto", Path("/var/lib/mosquitto")), ("nats", Path("/var/lib/nats"))):
        text = rules.configuration(kind, there, users, store, broker.port)
        (folder / f"{kind}.conf").write_text(text, encoding="utf-8")


def _certificate(folder: Path, stem: str, authority: Authority, subject: Subject, outcome: Outcome, name: str) -> None:
    if authority.issue(subject, folder / f"{stem}.crt", folder / f"{stem}.key"):
        outcome.made.append(name)
    shutil.copyfile(authority.certificate_file, folder / "ca.crt")


def _settings(folder: Path, outcome: Outcome, security: dict[str, str], device: str | None = None) -> None:
    """A `fleet.toml` to begin with; one that is there is its owner's, and stays."""
    path = folder / "fleet.toml"
    if path.exists():
        return
    lines = [
        "# Paths in [broker] and [security] begin at this file's folder.",
        "[fleet]",
        f'name = "{outcome.fleet}"',
        "",
    ]
    lines += ["[broker]", f'host = "{outcome.broker.hosts[0]}"', f"port = {outcome.broker.port}"]
    lines += ['cafile = "ca.crt"', 'certfile = "tls.crt"', 'keyfile = "tls.key"', "", "[security]"]
    lines += [f'{key} = "{value}"' for key, value in security.items()]
    if device is not None:
        lines += ["", "[device]", f'name = "{device}"', '# data = "examples.jsonl"']
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings.load(path)


def _end(path: Path) -> datetime:
    return certificates.load(path).not_valid_after_utc


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
