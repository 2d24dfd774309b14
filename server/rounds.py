"""The life of a fleet as a state machine: (state, event, now) → (state, actions). No I/O, no clock, no randomness.

    gather ──enough devices──▶ train ──all updates, or a quorum when progress stopped──▶ merging ──▶ train …
                                                                     after the last round ──▶ finish ──▶ over

`service` performs the actions and feeds back what happened. Every action may be performed twice: after a crash the
service starts from the stored state and calls `resume`. Progress, not elapsed time, decides who is given up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from edge_runtime.wire.messages import Accepted, Hello, Message, Model, Name, Offer, Rejected, Report, Welcome
from server import offers
from server.fleet import Member, absent, admit, choose, crowded, ranking, rival
from server.policy import Policy


class State(Model):
    """Everything the rounds remember; durable as JSON.

    Attributes:
        run: names this life of the fleet; a new store begins another.
        phase: see the drawing above.
        round: the round that is open, or was last; 0 before the first.
        version: of the global adapter that the current round trains from.
        base: fingerprint of the fleet's base; None until the first device, unless the fleet's file names one.
        members: device name → what it said.
        asked: devices whose updates this round waits for.
        stored: device name → SHA-256 of its stored update of this round.
        merged: device name → SHA-256 of its last update of a former round: whoever was away when it was accepted asks.
        ended: devices whose fleet life is over: their last report said done or failed.
        paused: device name → when it first said that it pauses; see `_moves`.
        progress_at: when something last moved.
    """

    run: Name
    phase: Literal["gather", "train", "merging", "finish", "over"] = "gather"
    round: int = 0
    version: int = 0
    base: str | None = None
    members: dict[Name, Member] = Field(default_factory=dict)
    asked: tuple[Name, ...] = ()
    stored: dict[Name, str] = Field(default_factory=dict)
    merged: dict[Name, str] = Field(default_factory=dict)
    ended: dict[Name, Report] = Field(default_factory=dict)
    paused: dict[Name, float] = Field(default_factory=dict)
    progress_at: float = 0.0


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
    """An update is complete, checked and durable."""

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
class Asked:
    """The fleet above a gateway asks it for this round; `version`, which is durable here, is that fleet's."""

    round: int
    version: int
    last: bool


@dataclass(frozen=True)
class MergeRefused:
    """The updates of the open round cannot be merged; it closes with the version that it began with."""


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
    """Publish the Directive of the current state, and the bands it refers to."""


@dataclass(frozen=True)
class Note:
    """Something a person watching the server wants to know."""

    text: str


Action = Reply | Stage | Merge | Announce | Note


def begin(run: str, base: str | None, now: float) -> tuple[State, list[Action]]:
    """A fleet that nobody has joined yet."""
    return State(run=run, base=base, progress_at=now), [Announce()]


def resume(state: State, now: float) -> tuple[State, list[Action]]:
    """What to do again after a restart: tell the fleet where it stands, and finish a merge that was begun."""
    # Another process counts its seconds from another origin.
    state = state.model_copy(update={"progress_at": now, "paused": dict.fromkeys(state.paused, now)})
    actions: list[Action] = [Note(f"resuming in phase '{state.phase}', round {state.round}"), Announce()]
    return state, [*actions, Merge(state.round)] if state.phase == "merging" else actions


def step(state: State, event: Event, now: float, policy: Policy) -> tuple[State, list[Action]]:
    """The next state and what must be done, for one event at time `now` (seconds, any origin)."""
    actions: list[Action] = []
    match event:
        case Heard(Hello() | Offer() as message):
            before = state
            state, actions = (
                _hello(state, message, policy) if isinstance(message, Hello) else _offer(state, message, policy)
            )
            if state == before:
                # Said again, or refused. A device that only repeats itself must not hold up the round for ever.
                return _advance(state, actions, now, policy)
        case Heard(Report() as report):
            if report.client not in state.members:
                return state, []
            state, actions = _report(state, report, now)
            if not _moves(state, report, now, policy):
                return _advance(state, actions, now, policy)
        case PresenceChanged() as presence:
            state, actions = _presence(state, presence, policy)
            return _advance(state, actions, now, policy)
        case Stored(offer):
            state, actions = _stored(state, offer)
        case Refused(offer, reply):
            state, actions = _refused(state, offer, reply)
        case MergeDone() | MergeRefused() | Asked():
            version = state.version if isinstance(event, MergeRefused) else event.version
            state = state.model_copy(update={"version": version, "phase": "train", "progress_at": now})
            return _next_round(state, actions, policy, event)
        case Moved(whole):
            actions = [Stage(whole)] if whole else []
        case Tick():
            return _advance(state, actions, now, policy)
    return _advance(state.model_copy(update={"progress_at": now}), actions, now, policy)


def _hello(state: State, hello: Hello, policy: Policy) -> tuple[State, list[Action]]:
    refusal = admit(state.members, state.base, hello) or crowded(state.members, hello, policy.max_members)
    if refusal:
        return state, [Reply(hello.client, refusal), Note(f"refused '{hello.client}': {refusal.reason}")]
    before = state.members.get(hello.client)
    member = before.model_copy(update={"hello": hello, "online": True}) if before else Member(hello=hello)
    members = {**state.members, hello.client: member}
    # A device that failed and is back takes part again.
    ended = {name: report for name, report in state.ended.items() if name != hello.client or report.state == "done"}
    state = state.model_copy(update={"members": members, "base": hello.base, "ended": ended})
    actions: list[Action] = [Reply(hello.client, Welcome(client=hello.client, fleet=policy.fleet))]
    if before is None:
        actions.append(Note(f"'{hello.client}' joined: {hello.device}; {hello.plan}"))
    return _asked_too(state, hello.client, policy), actions


def _asked_too(state: State, client: str, policy: Policy) -> State:
    """In a round that asks everybody, whoever comes late, or comes back, is asked as well."""
    if state.phase != "train" or policy.fraction_train != 1.0 or client in {*state.asked, *state.ended}:
        return state
    return state.model_copy(update={"asked": tuple(sorted((*state.asked, client)))})


def _not_asked(state: State, client: str) -> State:
    """The state that does not wait for this device in the open round."""
    return state.model_copy(update={"asked": tuple(name for name in state.asked if name != client)})


def _offer(state: State, offer: Offer, policy: Policy) -> tuple[State, list[Action]]:
    # After a refused merge a device trains from the same version, and may well send the same bytes for another round.
    settled = state.stored if offer.round == state.round else {**state.merged, **state.stored}
    if settled.get(offer.client) == offer.blob.sha256:
        return state, [Reply(offer.client, Accepted(sha256=offer.blob.sha256, round=offer.round))]
    if offer.client in state.members and offer.round == state.round:
        state = _asked_too(state, offer.client, policy)
    refusal = offers.refusal(state, offer, policy)
    if refusal is None:
        return state, [Stage(offer)]
    if refusal.code in {"too-large", "examples"}:
        state = _not_asked(state, offer.client)
    return state, [Reply(offer.client, refusal)]


def _refused(state: State, offer: Offer, reply: Rejected) -> tuple[State, list[Action]]:
    if offer.round == state.round:
        state = _not_asked(state, offer.client)
    return state, [Reply(offer.client, reply), Note(f"refused the update of '{offer.client}': {reply.reason}")]


def _moves(state: State, report: Report, now: float, policy: Policy) -> bool:
    """Whether a report is progress: every one is, but a pause is so for `pause_timeout` seconds and no longer.

    A device that cools down, or whose user is busy for a while, is not given up; one that waits for its charger all
    night holds up no round. It is a member all the same, and takes part again when it goes on.
    """
    return report.state != "paused" or now - state.paused[report.client] <= policy.pause_timeout


def _report(state: State, report: Report, now: float) -> tuple[State, list[Action]]:
    if report.state == "paused":
        if report.client in state.paused:
            return state, []
        return state.model_copy(update={"paused": {**state.paused, report.client: now}}), [
            Note(f"'{report.client}' pauses: {report.detail}")
        ]
    state = _going_on(state, report.client)
    if report.state not in {"done", "failed"}:
        return state, []
    if report.state == "failed":
        state = _not_asked(state, report.client)
    return state.model_copy(update={"ended": {**state.ended, report.client: report}}), [
        Note(f"'{report.client}' {report.state}" + (f": {report.detail}" if report.detail else ""))
    ]


def _going_on(state: State, client: str) -> State:
    """The state in which this device does not pause."""
    if client not in state.paused:
        return state
    return state.model_copy(update={"paused": {name: at for name, at in state.paused.items() if name != client}})


def _presence(state: State, heard: PresenceChanged, policy: Policy) -> tuple[State, list[Action]]:
    before = state.members.get(heard.client)
    if before is None:
        return state, []
    if not heard.online and not absent(before, heard.instance):
        return state, []
    actions: list[Action] = []
    member = before.model_copy(update={"online": heard.online})
    if heard.online:
        member, refusal = rival(member, heard.instance, heard.session)
        if refusal is not None:
            actions = [Reply(heard.client, refusal), Note(f"two devices are called '{heard.client}'")]
    if member == before:
        return state, actions
    state = state.model_copy(update={"members": {**state.members, heard.client: member}})
    if member.online == before.online:
        return state, actions
    state = _going_on(state, heard.client)
    if heard.online:
        state = _asked_too(state, heard.client, policy)
    return state, [*actions, Note(f"'{heard.client}' is {'online' if heard.online else 'offline'}")]


def _stored(state: State, offer: Offer) -> tuple[State, list[Action]]:
    reply = Reply(offer.client, Accepted(sha256=offer.blob.sha256, round=offer.round))
    if state.phase != "train" or offer.round != state.round or offer.client in state.stored:
        return state, [reply]
    state = state.model_copy(update={"stored": {**state.stored, offer.client: offer.blob.sha256}})
    note = Note(f"round {state.round}: update of '{offer.client}' stored ({len(state.stored)} of {len(state.asked)})")
    return state, [reply, note]


def _advance(state: State, actions: list[Action], now: float, policy: Policy) -> tuple[State, list[Action]]:
    """Go on to the next phase if the current one has all that it waits for."""
    stalled = now - state.progress_at > policy.progress_timeout
    match state.phase:
        case "gather":
            online = sum(member.online for member in state.members.values())
            if not policy.led and online >= policy.min_available_nodes:
                return _next_round(state.model_copy(update={"progress_at": now}), actions, policy)
        case "train":
            return _advance_train(state, actions, now, policy, stalled=stalled)
        case "finish":
            absent = [name for name, member in state.members.items() if name not in state.ended and member.online]
            if not absent or stalled:
                over = state.model_copy(update={"phase": "over"})
                return over, [*actions, Announce(), Note("the fleet has finished")]
        case "merging" | "over":
            pass
    return state, actions


def _advance_train(
    state: State, actions: list[Action], now: float, policy: Policy, *, stalled: bool
) -> tuple[State, list[Action]]:
    late = [name for name in state.asked if name not in state.stored]
    enough = max(1, math.ceil(policy.quorum * len(state.asked)))
    if state.stored and (not late or (stalled and len(state.stored) >= enough)):
        if late:
            actions = [*actions, Note(f"round {state.round}: going on without {', '.join(late)}: no progress")]
        return state.model_copy(update={"phase": "merging"}), [*actions, Merge(state.round)]
    gone = [name for name in late if not state.members[name].online]
    others = _others(state, len(gone) if stalled else 0, policy)
    if others:
        asked = tuple(sorted({*state.asked, *others} - set(gone[: len(others)])))
        state = state.model_copy(update={"asked": asked, "progress_at": now})
        return state, [*actions, Announce(), Note(f"round {state.round}: asking {', '.join(others)} instead")]
    if stalled:
        note = Note(
            f"round {state.round}: no progress for {policy.progress_timeout:.0f} s, {len(state.stored)} of {enough} "
            f"updates needed; still waiting for {', '.join(late) or 'devices'}"
        )
        # The directive is said again: the broker may have lost it, and with it the devices' next move.
        return state.model_copy(update={"progress_at": now}), [*actions, Announce(), note]
    return state, actions


def _others(state: State, gone: int, policy: Policy) -> list[str]:
    """Devices to ask in the place of those that went away; or at all, if nobody was there when the round began."""
    spare = {name: member for name, member in state.members.items() if name not in {*state.asked, *state.ended}}
    if not state.asked:
        return list(choose(spare, policy.fraction_train, state.round, policy.seed))
    return ranking(spare, state.round, policy.seed)[:gone]


def _next_round(
    state: State, actions: list[Action], policy: Policy, why: Event | None = None
) -> tuple[State, list[Action]]:
    """Open the next round, or the one that was asked for; after the last one, let the devices finish."""
    last = state.round >= policy.num_rounds
    number = state.round + (not last)
    if isinstance(why, Asked):
        number, last = why.round, why.last
    state = state.model_copy(update={"round": number, "merged": {**state.merged, **state.stored}})
    if last:
        state = state.model_copy(update={"phase": "finish", "asked": (), "stored": {}})
        return state, [*actions, Announce(), Note(f"all {number} rounds are over; devices finish")]
    remaining = {name: member for name, member in state.members.items() if name not in state.ended}
    asked = choose(remaining, policy.fraction_train, number, policy.seed)
    state = state.model_copy(update={"phase": "train", "asked": asked, "stored": {}})
    of = "" if policy.led else f" of {policy.num_rounds}"
    return state, [*actions, Announce(), Note(f"round {number}{of}: asking {', '.join(asked)}")]
