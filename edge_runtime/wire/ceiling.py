"""How large a message a broker takes, found out from how it fails. Pure.

MQTT 3.1.1 has no word for it: a broker that is sent more than it takes hangs up, the client sends the same message
again after the next CONNACK, and so on for ever. So a connection that ends several times in a row without a single
acknowledgement, while large messages wait, is taken for such a broker; what may be sent from then on is half of the
largest that waited. To be wrong about it on a bad link costs smaller chunks, which suit a bad link.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

STRIKES = 3
"""Connections that end without an acknowledgement before the size is blamed."""

LEAST = 4096
"""Bytes that every broker takes: what is no larger is never blamed."""


@dataclass(frozen=True)
class Ceiling:
    """What is known of a broker.

    Attributes:
        largest: bytes of the largest payload worth sending.
        proven: of the largest one that it has acknowledged.
        strikes: connections in a row that ended without any acknowledgement.
    """

    largest: int
    proven: int = 0
    strikes: int = 0


def acknowledged(ceiling: Ceiling, size: int) -> Ceiling:
    """A payload of that size was taken."""
    return replace(ceiling, proven=max(ceiling.proven, size), strikes=0)


def lost(ceiling: Ceiling, waiting: Collection[int]) -> Ceiling:
    """A connection ended while payloads of those sizes waited for their acknowledgement."""
    if not waiting:
        return replace(ceiling, strikes=0)
    suspect, strikes = max(waiting), ceiling.strikes + 1
    if strikes < STRIKES or suspect <= max(ceiling.proven, LEAST):
        return replace(ceiling, strikes=strikes)
    return replace(ceiling, largest=max(ceiling.proven, suspect // 2, LEAST), strikes=0)
