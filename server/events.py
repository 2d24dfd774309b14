"""What happens to the rounds, and what they want done: values."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.wire.messages import Hello, Message, Offer, Rejected, Report

# ── events ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Heard:
    """A device said something."""

    message: Hello | Offer | Report


@dataclass(frozen=True)
class PresenceChanged:
    """A device came online, or its last will was published."""

    client: str
    online: bool
    instance: str = ""
    session: int = 0


@dataclass(frozen=True)
class Stored:
    """An update is complete, checked and durable, if this state is."""

    offer: Offer


@dataclass(frozen=True)
class Refused:
    """An update arrived in full and cannot be used."""

    offer: Offer
    reply: Rejected


@dataclass(frozen=True)
class Moved:
    """A chunk is stored; `whole` is its offer, if that was the last one missing."""

    whole: Offer | None = None


@dataclass(frozen=True)
class MergeDone:
    """The merge of the open round is durable as this version."""

    version: int


@dataclass(frozen=True)
class MergeRefused:
    """The updates of the open round cannot be merged; it closes with the version that it began with."""


@dataclass(frozen=True)
class Asked:
    """The fleet above a gateway asks it for this round; `version`, which is durable here, is that fleet's."""

    round: int
    version: int
    last: bool


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = Heard | PresenceChanged | Stored | Refused | Moved | MergeDone | MergeRefused | Asked | Tick

# ── actions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Reply:
    """Say this to one device."""

    client: str
    message: Message


@dataclass(frozen=True)
class Stage:
    """Take this offer: ask for the chunks that are missing, or check and store it if none is."""

    offer: Offer


@dataclass(frozen=True)
class Merge:
    """Merge the stored updates of the open round."""

    round: int


@dataclass(frozen=True)
class Announce:
    """Publish the Directive of the current state, and the bands it refers to.

    Attributes:
        again: the broker may have lost what it had, so also the bands of older versions that devices may be fetching.
    """

    again: bool = False


@dataclass(frozen=True)
class Note:
    """Something a person watching the server wants to know."""

    text: str


Action = Reply | Stage | Merge | Announce | Note
