"""Who a device says it is: name and instance, presence, last will, and how it introduces itself.

A broker lets one client id in once, so two devices with one name throw each other out, for ever. The server sees both
come back in turn (`server.fleet.rival`) and sends the later one away. The name of an instance sorts by the age of its
state folder and then by that of the process: where somebody copied a whole folder, the process that began first goes
on. A clock that jumped decides at most which of two goes on, never that both do.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from edge_runtime.state import DeviceState
from edge_runtime.trainer import Introduction
from edge_runtime.wire import blobs, topics
from edge_runtime.wire.guard import OPEN, Guard
from edge_runtime.wire.messages import Hello, Presence, dump, group
from edge_runtime.wire.transport import Will


@dataclass(frozen=True)
class Identity:
    """Who this device is.

    Attributes:
        fleet: the fleet's name.
        client: this device's client id.
        chunk_bytes: size of the chunks of its uploads.
        instance: tells it from other devices of that name (`instance_of`); empty for a device that does not say.
        guard: signs what it says, and tells whom to believe.
        round_bytes: what a round may move up and down; None for as much as there is.
    """

    fleet: str
    client: str
    chunk_bytes: int = blobs.CHUNK_BYTES
    instance: str = ""
    guard: Guard = OPEN
    round_bytes: int | None = None


def instance_of(state: DeviceState) -> str:
    """A name that no other process has."""
    return f"{state.instance}.{time.time_ns():020d}-{secrets.token_hex(4)}"


def online(who: Identity, session: int) -> tuple[str, bytes]:
    """Topic and payload of a presence, in that connection (from 1)."""
    presence = Presence(
        client=who.client, state="online", instance=who.instance, session=session if who.instance else 0
    )
    return _status(who.fleet, who.guard, presence)


def offline(fleet: str, client: str, guard: Guard = OPEN, instance: str = "") -> tuple[str, bytes]:
    """Topic and payload of a device's absence; with an instance, of that one's alone."""
    return _status(fleet, guard, Presence(client=client, state="offline", instance=instance))


def _status(fleet: str, guard: Guard, presence: Presence) -> tuple[str, bytes]:
    topic = topics.status(fleet, presence.client)
    return topic, guard.seal(topic, dump(presence))


def will(fleet: str, client: str, guard: Guard = OPEN, instance: str = "") -> Will:
    """The last will of a device: its retained status becomes "offline"."""
    return Will(*offline(fleet, client, guard, instance))


def hello_of(client: str, intro: Introduction) -> Hello:
    """How a device with that plan introduces itself."""
    return Hello(
        client=client,
        base=intro.base,
        examples=intro.examples,
        groups=group(intro.slot),
        device=intro.device[:256],
        precision=intro.precision,
        plan=intro.plan[:1024],
        software=intro.software[:256],
    )
