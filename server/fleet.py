"""Who is here, and what each device said and did. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.wire.messages import Hello, LayerGroup, Model, Rejected, Report, ungroup


class Member(Model):
    """A device that said hello.

    Attributes:
        hello: its last hello: base, examples, slot.
        former: what its hellos before said of its layers, the latest first; see `greeted`.
        online: what its retained presence says; a broker may be late with it.
        seen: (instance, session) of its last presences, the latest last; see `rival`.
        returns: how often one instance took the name back from another since a new one came.
        there: the last round in which it was there before it went away, or made an offer.
        excused: the last round that takes nothing of it any more, though it asks it: its update was refused, or others
            were asked in its place.
        delivered: the round of its last accepted update.
        sha256: of that update.
        paused: when it first said that it pauses; None while it does not.
        ended: its last report, if that said done or failed: its fleet life is over.
    """

    hello: Hello
    former: tuple[tuple[LayerGroup, ...], ...] = ()
    online: bool = True
    seen: tuple[tuple[str, int], ...] = ()
    returns: int = 0
    there: int = -1
    excused: int = -1
    delivered: int = 0
    sha256: str = ""
    paused: float | None = None
    ended: Report | None = None

    @property
    def plans(self) -> tuple[tuple[LayerGroup, ...], ...]:
        """The plans that an update of this device may be of, the latest first."""
        return (self.hello.groups, *self.former)


FORMER = 3
"""Plans that a device had before: an update of one may be on its way, and each may follow on a restart."""


def greeted(member: Member | None, hello: Hello) -> Member:
    """The member after a hello. One that failed and is back takes part again."""
    if member is None:
        return Member(hello=hello)
    former = member.former
    if hello.groups != member.hello.groups:
        former = (member.hello.groups, *(groups for groups in former if groups != hello.groups))[:FORMER]
    ended = member.ended if member.ended and member.ended.state == "done" else None
    return member.model_copy(update={"hello": hello, "former": former, "online": True, "ended": ended})


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
        if member.hello.groups == hello.groups:
            return None
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


def crowded(members: Mapping[str, Member], hello: Hello, most: int) -> Rejected | None:
    """Why a new device must wait: the fleet has as many as it takes, and what it remembers of each costs memory."""
    if hello.client in members or len(members) < most:
        return None
    reason = f"this fleet takes {most} devices and has as many; raise [server] max_members"
    return Rejected(code="fleet-full", reason=reason)


def rival(member: Member, instance: str, session: int) -> tuple[Member, Rejected | None]:
    """The member after one of its devices came online, and what to tell if there are two of that name.

    A broker lets one client id in once: of two devices with one name each throws the other out, for ever. A process
    that ended never comes back (`instance` is new in each), so two that have each come back with a *later* session
    are both alive. The one whose instance sorts first goes on, which is the one whose folder, or process, is older;
    the refusal names the other and is for it alone.

    Args:
        member: as it was.
        instance: who came online; empty for a device that does not say.
        session: which connection of that process it is, from 1; repeated messages repeat it.
    """
    known = dict(member.seen)
    if not instance or session <= known.get(instance, 0):
        return member, None
    last = member.seen[-1][0] if member.seen else instance
    returns = 0 if instance not in known else member.returns + (last != instance)
    others = tuple(life for life in member.seen if life[0] != instance)
    member = member.model_copy(update={"seen": (*others[-3:], (instance, session)), "returns": returns})
    if returns < 2 or last == instance:
        return member, None
    return member, Rejected(
        code="duplicate",
        reason=f"another device of this fleet is called '{member.hello.client}', and it was there before this one; "
        "give this one another --name",
        instance=max(instance, last),
    )


def absent(member: Member, instance: str) -> bool:
    """Whether the absence of an instance is that of the device: a former life's, or a rival's, is not."""
    return not instance or not member.seen or instance == member.seen[-1][0]


def unbearable(hello: Hello, rank: int, most: int) -> str:
    """Why this server could not bear the global adapter that a device's layers make, or ''.

    The first device says how large the layers are, and believing it without a bound would cost all memory. The bound
    is that of an update that is decompressed: a larger adapter's updates would be refused anyway.

    Args:
        hello: what the device said.
        rank: of the global adapter.
        most: bytes that it may have.

    Raises:
        CorruptPayloadError: a slot that cannot be.
    """
    shapes = ungroup(hello.groups).shapes
    size = 4 * sum(min(rank, *shape) * sum(shape) for shape in shapes.values())
    if size <= most:
        return ""
    return (
        f"at rank {rank} your layers make an adapter of {size} bytes; this server bears {most}; "
        "raise [wire] max_upload_bytes, or choose fewer target modules or a smaller [aggregator] rank"
    )
