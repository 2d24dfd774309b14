"""One-time tokens: how a key that was made on a device becomes known to the server.

A token is 32 random bytes, as text. Both ends derive an Ed25519 key from it; whoever issues it keeps only the public
half, so the roster is no secret and whoever reads it can enrol nothing. The device proves its token by a signature of
that key over fleet, name and the public key that it made, and signs the message with the latter.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path

from edge_runtime.errors import ConfigError, RejectedError, WireError
from edge_runtime.wire import signing, topics
from edge_runtime.wire.guard import DeviceGuard
from edge_runtime.wire.keys import SigningKey, read_secret
from edge_runtime.wire.messages import Enrol, Enrolled, Rejected, dump, load
from edge_runtime.wire.transport import Transport

REPEAT_SECONDS = 10.0
LOOK_SECONDS = 0.2
DOMAIN = b"edge-runtime enrolment 1"


def new_token() -> str:
    """A token: 43 characters of 256 bits."""
    return secrets.token_urlsafe(32)


def key_of(token: str) -> SigningKey:
    """The key that a token stands for. A token is random and long, so one hash derives it."""
    return SigningKey.from_seed(hashlib.sha256(b"\0".join((DOMAIN, token.strip().encode()))).digest())


def request(fleet: str, client: str, key: SigningKey, token: str) -> Enrol:
    """What a device says to enrol its key."""
    proof = key_of(token).sign(_claim(fleet, client, key.public))
    return Enrol(client=client, key=key.public.hex(), proof=proof.hex())


def proves(fleet: str, message: Enrol, token_public: bytes) -> bool:
    """Whether whoever made a request has the token of this public half."""
    claim = _claim(fleet, message.client, bytes.fromhex(message.key))
    return signing.signed_by(token_public, bytes.fromhex(message.proof), claim)


def _claim(fleet: str, client: str, public: bytes) -> bytes:
    return b"\0".join((DOMAIN, fleet.encode(), client.encode(), public))


def read_token(path: Path) -> str:
    """The token in a file that only its owner can read.

    Raises:
        ConfigError: there is none, or others can read it.
    """
    token = read_secret(path, "an enrolment token").decode("ascii", errors="replace").strip()
    if not token:
        raise ConfigError(f"an enrolment token was expected in {path}; the file is empty; have another one issued")
    return token


def enrol(
    identity: tuple[str, str],
    token: str,
    *,
    transport: Transport,
    guard: DeviceGuard,
    say: Callable[[str], None],
    stop: Callable[[], bool],
    clock: Callable[[], float],
) -> bool:
    """Ask the server to take this device's key, until it answers; says whether it did, or `stop()` came first.

    Args:
        identity: fleet and client.
        token: what it was given.
        transport: connected.
        guard: holds the key, and knows the server's.
        say: told what happens.
        stop: asked between two looks.
        clock: seconds.

    Raises:
        RejectedError: the server refused, and said why.
    """
    fleet, client = identity
    wanted = dump(request(fleet, client, guard.key, token))
    topic = topics.up(fleet, client)
    transport.subscribe(topics.down(fleet, client))
    said: float | None = None
    while not stop():
        if said is None or clock() - said >= REPEAT_SECONDS:
            said = clock()
            transport.publish(topic, guard.seal(topic, wanted))
        delivery = transport.receive(LOOK_SECONDS)
        if delivery is None:
            continue
        delivery.ack()
        if delivery.topic != topics.down(fleet, client):
            continue
        try:
            opened = guard.open(delivery.topic, delivery.payload)
            answer = load(opened) if opened is not None else None
        except WireError as error:
            say(f"dropped a message on {delivery.topic}: {error}")
            continue
        guard.settle()
        if isinstance(answer, Enrolled) and answer.key == guard.key.public.hex():
            say(f"enrolled as '{client}' in fleet '{fleet}' with key {guard.key.id}")
            return True
        refused = isinstance(answer, Rejected) and answer.code in {"not-enrolled", "revoked"}
        if isinstance(answer, Rejected) and refused and answer.key in {"", guard.key.public.hex()}:
            raise RejectedError(f"the server refused to enrol this device: {answer.reason}")
    return False
