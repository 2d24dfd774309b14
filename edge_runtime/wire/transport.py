"""The one seam between this project and a network: what every transport does, and how MQTT topics match.

`edge_runtime.wire.mqtt` is the real transport, `edge_runtime.wire.memory` its twin in memory. Both promise the same
and no more than a broker can keep: what was published arrives at least once, and as long as nothing is lost, what one
client published arrives in order through one subscription (NATS serves one that ends in `#` by two, whose messages may
overtake each other). It may also arrive again. Nobody above may depend on a broker's memory: blobs are named by their
content, and offers are repeated until accepted, so a message that comes twice does no harm and a lost one is asked for
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

# MQTT 3.1.1 §1.5.3: a topic is at most 65,535 bytes of UTF-8.
LONGEST_TOPIC = 65_535


@dataclass(frozen=True, eq=False)
class Delivery:
    """One message that arrived.

    Attributes:
        topic: where it was published.
        payload: its bytes; empty when a retained message was cleared.
        retained: the broker had kept it for late subscribers; it may be old.
        ack: tells the broker that the message is safe on this side. To be called once the message is stored; until
            then the broker delivers it again after a reconnect. Calling it twice, from any thread, or after the
            connection was replaced, does no harm.
    """

    topic: str
    payload: bytes
    retained: bool
    ack: Callable[[], None]


@dataclass(frozen=True)
class Will:
    """What the broker publishes for a client whose connection ends without `close`.

    Attributes:
        topic: where it is published.
        payload: its bytes.
        retain: whether the broker keeps it for late subscribers.
    """

    topic: str
    payload: bytes
    retain: bool = True


class Transport(Protocol):
    """Publish and subscribe, at least once, across lost connections and restarted brokers.

    All of it may be called from any thread.
    """

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand a message over; it is sent again until the broker has acknowledged it.

        Blocks while too much is on its way unacknowledged. A retained message replaces the one kept for the topic, and
        an empty one clears it.

        Raises:
            BrokerError: the transport is closed, or has given up for a reason that waiting does not mend.
            TooLargeError: the payload is larger than `largest`.
            ValueError: the topic is empty or contains a wildcard.
        """

    def flush(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the broker to acknowledge all that was published; says whether it has."""

    def subscribe(self, pattern: str) -> None:
        """Ask for what matches `pattern` (`+` one level, `#` all below); repeated by itself after reconnects.

        Each SUBSCRIBE makes the broker send its matching retained messages again, so a reconnect does too: unsubscribe
        from what is complete.

        Raises:
            BrokerError: as for `publish`.
            ValueError: a wildcard stands where MQTT does not allow it.
        """

    def unsubscribe(self, pattern: str) -> None:
        """Take a subscription back; deliveries already on their way may still arrive.

        Raises:
            BrokerError: as for `publish`.
        """

    def receive(self, timeout: float) -> Delivery | None:
        """The next delivery, or None when none came within `timeout` seconds.

        Raises:
            BrokerError: as for `publish`.
        """

    def close(self) -> None:
        """Leave in order: the last will is not published. What was not yet acknowledged stays so: `flush` first."""

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached right now."""

    @property
    def largest(self) -> int:
        """Bytes of the largest payload worth publishing; falls when the broker turns out to take less."""

    @property
    def sessions(self) -> int:
        """How many times a connection has been established: a change says that the broker may have forgotten things."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of topics and payloads published, each message counted once."""

    @property
    def bytes_received(self) -> int:
        """Bytes of topics and payloads delivered, repetitions included."""


def matches(pattern: str, topic: str) -> bool:
    """Whether a subscription to `pattern` receives `topic` (both valid).

    `+` stands for exactly one level, `#` for the level above it and everything below. A pattern that begins with a
    wildcard does not match topics that begin with `$`, which belong to the broker.

    Source: MQTT 3.1.1, §4.7.
    """
    levels, names = pattern.split("/"), topic.split("/")
    if topic.startswith("$") and levels[0] in ("+", "#"):
        return False
    if levels[-1] == "#":
        levels.pop()
        if len(names) < len(levels):
            return False
        names = names[: len(levels)]
    return len(levels) == len(names) and all(level in ("+", name) for level, name in zip(levels, names, strict=True))


def check_topic(topic: str) -> None:
    """Refuse a topic that no broker would take.

    Raises:
        ValueError: it is empty, too long, or contains a wildcard or a NUL.
    """
    if not topic or len(topic.encode()) > LONGEST_TOPIC or any(sign in topic for sign in "+#\0"):
        raise ValueError(f"a topic is 1 to {LONGEST_TOPIC} bytes without '+', '#' and NUL; found {topic[:80]!r}")


def check_pattern(pattern: str) -> None:
    """Refuse a pattern that no broker would take.

    Raises:
        ValueError: it is empty or too long, or a wildcard shares its level or stands before the end.
    """
    levels = pattern.split("/")
    whole = all(level in ("+", "#") or not any(sign in level for sign in "+#\0") for level in levels)
    if not pattern or len(pattern.encode()) > LONGEST_TOPIC or not whole or "#" in levels[:-1]:
        raise ValueError(
            f"in a pattern, '+' and '#' fill a whole level and '#' stands last, as in 'a/+/c' and 'a/#'; "
            f"found {pattern[:80]!r}"
        )
