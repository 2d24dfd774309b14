"""Who is here, what each device was assigned, and whom a round asks. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from edge_runtime.wire.messages import Hello, Model, Rejected, ungroup


class Member(Model):
    """A device that said hello.

    Attributes:
        hello: its last hello: base, examples, slot.
        online: what its retained presence says; a broker may be late with it.
    """

    hello: Hello
    online: bool = True


def admit(members: Mapping[str, Member], base: str | None, hello: Hello) -> Rejected | None:
    """Why a hello is refused, or None if the device may join.

    The first device fixes the base model (unless the fleet's file names it) and the shapes of the layers.
    """
    if base is not None and hello.base != base:
        return Rejected(
            code="fingerprint",
            reason=f"this fleet trains the base {base[:16]}; yours is {hello.base[:16]}; "
            "install the fleet's base model, or join another fleet",
        )
    shapes = ungroup(hello.groups).shapes
    for member in members.values():
        known = ungroup(member.hello.groups).shapes
        if known != shapes:
            odd = min(set(known.items()) ^ set(shapes.items()))[0]
            here, there = known.get(odd, "absent"), shapes.get(odd, "absent")
            return Rejected(
                code="shape",
                reason=f"layer '{odd}' is {here} in this fleet and {there} on yours; use its target modules",
            )
        break  # all members agree with the first
    return None


def choose(members: Mapping[str, Member], fraction: float, round_number: int, seed: int) -> tuple[str, ...]:
    """The online devices that a round asks: the fraction with the lowest hash of (seed, round, name).

    At least one, if anybody is online. Every server that knows the same members chooses the same devices.
    """
    ranked = ranking(members, round_number, seed)
    count = max(1, math.ceil(fraction * len(ranked))) if ranked else 0
    return tuple(sorted(ranked[:count]))


def ranking(members: Mapping[str, Member], round_number: int, seed: int) -> list[str]:
    """The online devices by their hash of (seed, round, name): first come those that the round asks first."""
    online = [name for name, member in members.items() if member.online]
    return sorted(online, key=lambda name: hashlib.sha256(f"{seed}:{round_number}:{name}".encode()).digest())
