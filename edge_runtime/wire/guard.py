"""The seam between a participant and its signatures: seals what it says, opens what it hears.

`OPEN` lets everything through, for loopback and for `--insecure`. `DeviceGuard` is a device's; the server's is
`server.guard`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from edge_runtime.errors import AuthenticityError
from edge_runtime.wire import signing, topics
from edge_runtime.wire.keys import SigningKey
from edge_runtime.wire.ledger import Ledger
from edge_runtime.wire.messages import Message
from edge_runtime.wire.signing import Sealed


class Guard(Protocol):
    """What stands between a participant and its topics of control messages."""

    def seal(self, topic: str, message: bytes) -> bytes:
        """The payload to publish for a message."""

    def open(self, topic: str, payload: bytes) -> bytes | None:
        """The message in a payload, or None for one that is older than what was taken before.

        Raises:
            AuthenticityError: its alleged sender did not sign it, or may say nothing here.
        """

    def settle(self) -> Sequence[tuple[str, Message]]:
        """What was opened has been dealt with, or refused: remember it. Returns what to tell to which device."""


class OpenGuard:
    """Signs nothing, believes everything."""

    def seal(self, topic: str, message: bytes) -> bytes:  # noqa: ARG002  the seam's
        """The message."""
        return message

    def open(self, topic: str, payload: bytes) -> bytes | None:  # noqa: ARG002  the seam's
        """The payload."""
        return payload

    def settle(self) -> Sequence[tuple[str, Message]]:
        """Nothing to remember, nothing to tell."""
        return ()


OPEN: Guard = OpenGuard()


class DeviceGuard:
    """Signs for one device, and listens to the owner of the server's key alone.

    Args:
        fleet: the device's fleet.
        key: the device's.
        server: the server's public keys, 32 bytes each; two while it changes them.
        ledger: opened, the device's own.
    """

    def __init__(self, fleet: str, key: SigningKey, server: Sequence[bytes], ledger: Ledger) -> None:
        self._fleet, self._key, self._ledger = fleet, key, ledger
        self._server = {signing.key_id(public): public for public in server}
        self._opened: tuple[str, str, int] | None = None
        self.dropped: Counter[str] = Counter()

    @property
    def key(self) -> SigningKey:
        """The device's key."""
        return self._key

    def seal(self, topic: str, message: bytes) -> bytes:
        """The message, signed for this topic."""
        return signing.seal(topic, message, self._key, self._ledger.draw())

    def open(self, topic: str, payload: bytes) -> bytes | None:
        """A message of the server; the same one again is taken, for the retained Directive comes with every start."""
        parsed = topics.parse(self._fleet, topic)
        kind = parsed.kind if parsed else ""
        self._opened = None
        try:
            sealed = self._recognised(topic, payload)
        except AuthenticityError:
            self.dropped["forged"] += 1
            raise
        if sealed.counter < self._ledger.highest(sealed.by, kind):
            self.dropped["old"] += 1
            return None
        self._opened = sealed.by, kind, sealed.counter
        return sealed.message

    def settle(self) -> Sequence[tuple[str, Message]]:
        """Remember the counter of what was opened last."""
        if self._opened is not None:
            self._ledger.take(*self._opened)
            self._opened = None
        return ()

    def _recognised(self, topic: str, payload: bytes) -> Sealed:
        sealed = signing.take_apart(topic, payload)
        public = self._server.get(sealed.by)
        if public is None:
            raise AuthenticityError(
                f"a message on {topic} must be signed by the server's key {' or '.join(sorted(self._server))}; "
                f"found key {sealed.by}; drop it, or copy the server's new public key here"
            )
        signing.verify(topic, sealed, public)
        return sealed
