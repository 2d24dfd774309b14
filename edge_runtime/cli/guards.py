"""The signatures of the long-running verbs, from their configuration; and the refusal to go without."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.cli import shell
from edge_runtime.config import Config
from edge_runtime.errors import ConfigError
from edge_runtime.wire import enrolment
from edge_runtime.wire.guard import OPEN, DeviceGuard, Guard
from edge_runtime.wire.keys import SigningKey, read_public_keys, read_signing_key
from edge_runtime.wire.ledger import Ledger
from edge_runtime.wire.transport import Transport
from server.guard import ServerGuard
from server.roster import RosterFile


def with_insecure(config: Config, asked: bool) -> Config:
    """The configuration, with what the flag --insecure says."""
    broker = config.broker.model_copy(update={"insecure": config.broker.insecure or asked})
    return config.model_copy(update={"broker": broker})


def check(config: Config) -> None:
    """Refuse to talk to another machine with less than TLS and signatures, unless that is wanted.

    Raises:
        ConfigError: says what is missing, and the two ways out.
    """
    broker = config.broker
    if broker.insecure or is_loopback(broker.host):
        return
    lacking = []
    if not shell.address_of(broker).encrypted:
        lacking.append("TLS (broker.cafile, certfile, keyfile)")
    if config.security.signing_key is None:
        lacking.append("signatures (security.signing_key)")
    if lacking:
        raise ConfigError(
            f"the broker {broker.host}:{broker.port} is on another machine, and {' and '.join(lacking)} are not "
            "configured; make them with: edge-runtime provision FLEET_DIR, or go without, on a network that you "
            "trust, with --insecure"
        )


def check_listener(host: str, *, provisioned: bool, insecure: bool) -> None:
    """Refuse to serve others without certificates and rules, unless that is wanted.

    Raises:
        ConfigError: says the two ways out.
    """
    if not (provisioned or insecure or is_loopback(host)):
        raise ConfigError(
            f"a broker at {host} would let in everybody who reaches it; serve a provisioned fleet with "
            "--provisioned FLEET_DIR/broker, or everybody, on a network that you trust, with --insecure"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which nobody else can listen to."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def of_device(config: Config) -> Iterator[Guard]:
    """What signs for this device: its key, made now if it has a token and none yet.

    Raises:
        ConfigError: see `check`; or a file is missing, or others can read it.
    """
    check(config)
    wanted = config.security
    if wanted.signing_key is None:
        yield OPEN
        return
    if wanted.server_key is None:
        raise ConfigError(
            "security.server_key is missing: a device needs the server's public key to know whom to obey; "
            "it is server.pub in the folder that `edge-runtime provision` made"
        )
    server = read_public_keys(wanted.server_key)
    if wanted.token_file is not None and wanted.token_file.exists() and not wanted.signing_key.exists():
        SigningKey.generate().write(wanted.signing_key)
    key = read_signing_key(wanted.signing_key)
    ledger = Ledger(wanted.ledger or _beside(wanted.signing_key))
    try:
        yield DeviceGuard(config.fleet.name, key, server, ledger)
    finally:
        ledger.close()


def enrol(
    config: Config, name: str, transport: Transport, guard: Guard, say: Callable[[str], None], stop: Callable[[], bool]
) -> None:
    """Make this device's key known to the server if it still has its token, which is gone afterwards.

    Raises:
        RejectedError: the server refused.
    """
    token_file = config.security.token_file
    if token_file is None or not token_file.exists() or not isinstance(guard, DeviceGuard):
        return
    token = enrolment.read_token(token_file)
    identity = config.fleet.name, name
    if enrolment.enrol(identity, token, transport=transport, guard=guard, say=say, stop=stop, clock=time.monotonic):
        token_file.unlink()


@contextmanager
def of_server(config: Config) -> Iterator[Guard]:
    """What signs for the server, and knows the devices' keys.

    Raises:
        ConfigError: see `check`; or a file is missing, or others can read or write it.
    """
    check(config)
    wanted = config.security
    if wanted.signing_key is None:
        yield OPEN
        return
    if wanted.roster is None:
        raise ConfigError(
            "security.roster is missing: a server needs its devices' public keys; "
            "it is roster.json in the folder 'server' that `edge-runtime provision` made"
        )
    ledger = Ledger(wanted.ledger or _beside(wanted.signing_key))
    try:
        key = read_signing_key(wanted.signing_key)
        yield ServerGuard(config.fleet.name, key, RosterFile(wanted.roster), ledger)
    finally:
        ledger.close()


def _beside(key: Path) -> Path:
    return key.with_suffix(".ledger")
