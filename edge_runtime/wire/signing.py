"""Signed messages: who said it, about which topic, and in which order. Pure: keys and counters are arguments.

A sealed message is the message itself, one readable JSON object, with three more fields at its end:

    {"v":1,"type":"need", …,"by":"2c26b46b68ffc68f","n":1790212345678901,"sig":"kIuGQ…=="}

`by` is the id of the signer's key, `n` its counter, `sig` an Ed25519 signature (RFC 8032) over

    b"edge-runtime seal 1" NUL topic NUL (everything before `,"sig"`)

so a message can't be moved to another topic, and with it to another device or fleet, no byte of it can be changed, and
its place in the signer's order is fixed. The exact bytes are signed, and are read by one pattern and no JSON parser,
so there is no second form of a message that would be taken for it. Blobs are named by their SHA-256 in a signed offer
or Directive, and are signed through it.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.errors import AuthenticityError

if TYPE_CHECKING:
    from edge_runtime.wire.keys import SigningKey

DOMAIN = b"edge-runtime seal 1"
KEY_BYTES = 32

MAX_COUNTER = (1 << 53) - 1
"""The largest integer that every JSON reader takes exactly."""

SEAL = re.compile(
    rb',"by":"(?P<by>[0-9a-f]{16})","n":(?P<n>0|[1-9][0-9]{0,15}),"sig":"(?P<sig>[A-Za-z0-9+/]{86}==)"\}\Z'
)
SIG_BYTES = len(b',"sig":""}') + 88

SEAL_BYTES = len(b',"by":"","n":,"sig":""') + 16 + 16 + 88
"""What a seal adds to a message, at most."""


@dataclass(frozen=True)
class Sealed:
    """A message with its seal, taken apart; nothing is verified yet.

    Attributes:
        message: the message as it was before it was sealed.
        by: id of the key that is said to have signed it.
        counter: the signer's counter.
        body: the bytes that are signed, without topic.
        signature: 64 bytes.
    """

    message: bytes
    by: str
    counter: int
    body: bytes
    signature: bytes


def key_id(public: bytes) -> str:
    """The short name of a public key: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


def public_of(private: Ed25519PrivateKey) -> bytes:
    """The 32 bytes of the public half of a key."""
    return private.public_key().public_bytes_raw()


def seal(topic: str, message: bytes, key: SigningKey, counter: int) -> bytes:
    """A message, a JSON object, signed for one topic.

    Raises:
        ValueError: the message is no JSON object with a field, or the counter is out of range.
    """
    if not 0 <= counter <= MAX_COUNTER or message[:1] != b"{" or message[-1:] != b"}" or len(message) < len('{"":0}'):
        raise ValueError(f"a sealed message is a JSON object with a counter from 0 to 2^53 - 1; found {counter}")
    body = message[:-1] + f',"by":"{key.id}","n":{counter}'.encode()
    return body + b',"sig":"' + b64encode(key.sign(_signed(topic, body))) + b'"}'


def take_apart(topic: str, payload: bytes) -> Sealed:
    """The parts of a payload that should be sealed; for finding out whose key must verify it.

    Raises:
        AuthenticityError: it has no seal.
    """
    tail = max(0, len(payload) - SEAL_BYTES - 1)
    found = SEAL.search(payload, tail)
    if found is None or int(found["n"]) > MAX_COUNTER or payload[:1] != b"{":
        raise AuthenticityError(
            f"a signed message was expected on {topic}; found {len(payload)} bytes without a whole seal; "
            "its sender runs without keys, or is not who it says: see `edge-runtime provision`"
        )
    signature = b64decode(found["sig"])
    if b64encode(signature) != found["sig"]:  # two texts must not stand for one signature
        raise AuthenticityError(f"the signature of a message on {topic} is not written as base64 is; drop it")
    message = payload[: found.start()] + b"}"
    return Sealed(message, found["by"].decode(), int(found["n"]), payload[:-SIG_BYTES], signature)


def verify(topic: str, sealed: Sealed, public: bytes) -> None:
    """Check that the owner of this public key (32 bytes) sealed this message for this topic.

    Raises:
        AuthenticityError: another key did, or nobody.
    """
    expected = key_id(public)
    if sealed.by != expected:
        raise AuthenticityError(
            f"a message on {topic} must be signed by key {expected}; found key {sealed.by}; drop it"
        )
    if not signed_by(public, sealed.signature, _signed(topic, sealed.body)):
        raise AuthenticityError(
            f"the signature of a message on {topic} does not fit its bytes and key {expected}; "
            "somebody on the way changed, moved or forged it"
        )


def signed_by(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether a signature (64 bytes) over data is that of this public key (32 bytes)."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed(topic: str, body: bytes) -> bytes:
    # No topic contains a NUL, so the two can't be cut apart in another way.
    return b"\0".join((DOMAIN, topic.encode(), body))
