"""The life of a fleet as a state machine: (state, event, now) → (state, actions). No I/O, no clock, no randomness.

    gather ──enough devices──▶ train ──enough updates, or a quorum when progress stopped──▶ merging ──▶ train …
                                                                     after the last round ──▶ finish ──▶ over

`service` performs the actions and feeds back what happened. Every action may be performed twice: after a crash the
service starts from the stored state and calls `resume`. Progress, not elapsed time, decides who is given up. When a
phase ends: `server.advancing`; whom a round asks: `server.choosing`; what it takes: `server.offers`.
"""

from __future__ import annotations

from edge_runtime.wire.messages import Accepted, Hello, Offer, Rejected, Report, Welcome
from server import offers
from server.advancing import Step, advance, needed, next_round
from server.events import (
    Action,
    Announce,
    Asked,
    Event,
    Heard,
    Merge,
    MergeDone,
    MergeRefused,
    Moved,
    Note,
    PresenceChanged,
    Refused,
    Reply,
    Stage,
    Stored,
    Tick,
)
from server.fleet import absent, admit, crowded, greeted, rival
from server.policy import Policy
from server.state import State, put


def begin(run: str, base: str | None, now: float) -> Step:
    """A fleet that nobody has joined yet."""
    return State(run=run, base=base, progress_at=now), [Announce()]


def resume(state: State, now: float) -> Step:
    """What to do again after a restart: tell the fleet where it stands, and finish a merge that was begun."""
    # Another process counts its seconds from another origin.
    for member in [member for member in state.members.values() if member.paused is not None]:
        state = put(state, member.model_copy(update={"paused": now}))
    state = state.model_copy(update={"progress_at": now})
    actions: list[Action] = [Note(f"resuming in phase '{state.phase}', round {state.round}"), Announce(again=True)]
    return state, [*actions, Merge(state.round)] if state.phase == "merging" else actions


def step(state: State, event: Event, now: float, policy: Policy) -> Step:
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
                return advance(state, actions, now, policy)
        case Heard(Report() as report):
            if report.client not in state.members:
                return state, []
            state, actions = _report(state, report, now)
            if not _moves(state, report, now, policy):
                return advance(state, actions, now, policy)
        case PresenceChanged() as presence:
            state, actions = _presence(state, presence)
            return advance(state, actions, now, policy)
        case Stored(offer):
            state, actions = _stored(state, offer, policy)
        case Refused(offer, reply):
            state, actions = _refused(state, offer, reply)
        case MergeDone() | MergeRefused() | Asked():
            version = state.version if isinstance(event, MergeRefused) else event.version
            state = state.model_copy(update={"version": version, "phase": "train", "progress_at": now})
            return next_round(state, actions, policy, event if isinstance(event, Asked) else None)
        case Moved(whole):
            actions = [Stage(whole)] if whole else []
        case Tick():
            return advance(state, actions, now, policy)
    return advance(state.model_copy(update={"progress_at": now}), actions, now, policy)


def _hello(state: State, hello: Hello, policy: Policy) -> Step:
    refusal = admit(state.members, state.base, hello) or crowded(state.members, hello, policy.max_members)
    if refusal:
        return state, [Reply(hello.client, refusal), Note(f"refused '{hello.client}': {refusal.reason}")]
    before = state.members.get(hello.client)
    state = put(state.model_copy(update={"base": hello.base}), greeted(before, hello))
    actions: list[Action] = [Reply(hello.client, Welcome(client=hello.client, fleet=policy.fleet))]
    if before is None:
        actions.append(Note(f"'{hello.client}' joined: {hello.device}; {hello.plan}"))
    return state, actions


def _offer(state: State, offer: Offer, policy: Policy) -> Step:
    member = state.members.get(offer.client)
    # After a refused merge a device trains from the same version, and may well send the same bytes for another round.
    if member is not None and (member.delivered, member.sha256) == (offer.round, offer.blob.sha256):
        return state, [Reply(offer.client, Accepted(sha256=offer.blob.sha256, round=offer.round))]
    refusal = offers.refusal(state, offer, policy)
    if refusal is None:
        return _there(state, offer), [Stage(offer)]
    if refusal.code in {"too-large", "examples"}:
        state = _excused(state, offer)
    return state, [Reply(offer.client, refusal)]


def _there(state: State, offer: Offer) -> State:
    """The state that waits for whoever makes an offer: its presence may come later than that."""
    member = state.members[offer.client]
    return state if member.online else put(state, member.model_copy(update={"there": state.round}))


def _excused(state: State, offer: Offer) -> State:
    """The state whose open round does not wait for this device any more."""
    member = state.members.get(offer.client)
    if member is None or offer.round != state.round:
        return state
    return put(state, member.model_copy(update={"excused": state.round}))


def _refused(state: State, offer: Offer, reply: Rejected) -> Step:
    state = _excused(state, offer)
    return state, [Reply(offer.client, reply), Note(f"refused the update of '{offer.client}': {reply.reason}")]


def _moves(state: State, report: Report, now: float, policy: Policy) -> bool:
    """Whether a report is progress: every one is, but a pause is so for `pause_timeout` seconds and no longer.

    A device that cools down, or whose user is busy for a while, is not given up; one that waits for its charger all
    night holds up no round. It is a member all the same, and takes part again when it goes on.
    """
    since = state.members[report.client].paused
    return since is None or now - since <= policy.pause_timeout


def _report(state: State, report: Report, now: float) -> Step:
    member = state.members[report.client]
    if report.state == "paused":
        if member.paused is not None:
            return state, []
        paused = put(state, member.model_copy(update={"paused": now}))
        return paused, [Note(f"'{report.client}' pauses: {report.detail}")]
    over = report.state in {"done", "failed"}
    state = put(state, member.model_copy(update={"paused": None, **({"ended": report} if over else {})}))
    if not over:
        return state, []
    return state, [Note(f"'{report.client}' {report.state}" + (f": {report.detail}" if report.detail else ""))]


def _presence(state: State, heard: PresenceChanged) -> Step:
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
    if member.online == before.online:
        return put(state, member), actions
    gone = {} if heard.online else {"there": state.round}
    state = put(state, member.model_copy(update={"paused": None, **gone}))
    return state, [*actions, Note(f"'{heard.client}' is {'online' if heard.online else 'offline'}")]


def _stored(state: State, offer: Offer, policy: Policy) -> Step:
    accepted = Reply(offer.client, Accepted(sha256=offer.blob.sha256, round=offer.round))
    member = state.members[offer.client]
    if (member.delivered, member.sha256) == (offer.round, offer.blob.sha256):
        return state, [accepted]
    refusal = offers.refusal(state, offer, policy)
    if refusal is not None:
        return state, [Reply(offer.client, refusal)]
    delivered = {"delivered": offer.round, "sha256": offer.blob.sha256}
    state = put(state, member.model_copy(update=delivered))
    state = state.model_copy(update={"filled": state.filled + 1})
    age = state.version - offer.version
    late = f", trained {age} version{'s' if age > 1 else ''} ago" if age else ""
    of = f"{state.filled} of {needed(state, policy)}"
    return state, [accepted, Note(f"round {state.round}: update of '{offer.client}' stored ({of}){late}")]
