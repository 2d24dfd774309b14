"""When the rounds go on: from phase to phase, from round to round, and whom they give up. Pure.

One rule closes a round, in every mode: it has the updates that it needs, or all that it can still get, or progress has
stopped and it has a quorum of what it needs. A synchronous round needs those of all whom it asks, or, with
`over_select`, of so many of them as the fraction is; a buffered one needs `buffer_size`, from whichever version.
"""

from __future__ import annotations

import math

from server.choosing import named, others, sampled
from server.events import Action, Announce, Asked, Merge, Note
from server.policy import Policy
from server.state import NOBODY, State, recounted

Step = tuple[State, list[Action]]


def advance(state: State, actions: list[Action], now: float, policy: Policy) -> Step:
    """Go on to the next phase if the current one has all that it waits for."""
    stalled = now - state.progress_at > policy.progress_timeout
    match state.phase:
        case "gather":
            if not policy.led and state.tally.online >= policy.min_available_nodes:
                return next_round(state.model_copy(update={"progress_at": now}), actions, policy)
        case "train":
            return _train(state, actions, now, policy, stalled=stalled)
        case "finish":
            if not state.tally.unfinished or stalled:
                over: list[Action] = [Announce(), Note("the fleet has finished")]
                return state.model_copy(update={"phase": "over"}), [*actions, *over]
        case "merging" | "over":
            pass
    return state, actions


def needed(state: State, policy: Policy) -> int:
    """Updates that close the open round without waiting for anybody."""
    if policy.mode == "buffered":
        return policy.buffer_size or max(1, math.ceil(state.tally.asked / 2))
    return state.needed or max(1, state.tally.asked)


def enough(state: State, policy: Policy) -> int:
    """Updates that close it once progress has stopped: the quorum of those that it needs and can get."""
    return max(1, math.ceil(policy.quorum * min(needed(state, policy), max(1, state.tally.asked))))


def _train(state: State, actions: list[Action], now: float, policy: Policy, *, stalled: bool) -> Step:
    # A synchronous round that needs all is closed by the last of them, not by their number: others may join it.
    full = policy.mode == "buffered" or state.needed > 0
    if state.filled and (not state.tally.late or (full and state.filled >= needed(state, policy))):
        return _merging(state, actions)
    if state.filled and stalled and state.filled >= enough(state, policy):
        note = Note(f"round {state.round}: going on without {named(state.late)}: no progress")
        return _merging(state, [*actions, note])
    if stalled or not (state.tally.asked or state.filled):
        return _instead(state, actions, now, policy, stalled=stalled)
    return state, actions


def _merging(state: State, actions: list[Action]) -> Step:
    return state.model_copy(update={"phase": "merging"}), [*actions, Merge(state.round)]


def _instead(state: State, actions: list[Action], now: float, policy: Policy, *, stalled: bool) -> Step:
    """Ask others in the place of those that went away; or anybody at all, if nobody was there when it began."""
    if not state.sample.below:
        sample, needs = sampled(state, state.round, policy)
        wider = recounted(state.model_copy(update={"sample": sample, "needed": needs}))
        gone, found = [], list(wider.asked)
    else:
        gone = [name for name in state.late if not state.members[name].online]
        sample, found = others(state, len(gone), policy.fraction_train)
        members = state.members
        for name in gone[: len(found)]:
            members = members.put(name, members[name].model_copy(update={"excused": state.round}))
        wider = recounted(state.model_copy(update={"sample": sample, "members": members}))
    if found:
        note = Note(f"round {state.round}: asking {named(found)} instead")
        return wider.model_copy(update={"progress_at": now}), [*actions, Announce(), note]
    if not stalled:
        return state, actions
    if not (state.tally.asked or state.filled) and state.tally.unfinished:
        # All that are here were asked, and what they sent was refused: a merge of nothing closes the round.
        note = Note(f"round {state.round}: of those that are here, none has an update that can be used")
        return _merging(state, [*actions, note])
    note = Note(
        f"round {state.round}: no progress for {policy.progress_timeout:.0f} s, {state.filled} of "
        f"{enough(state, policy)} updates needed; still waiting for {named(state.late) or 'devices'}"
    )
    # The directive is said again: the broker may have lost it, and with it the devices' next move.
    return state.model_copy(update={"progress_at": now}), [*actions, Announce(again=True), note]


def next_round(state: State, actions: list[Action], policy: Policy, asked: Asked | None = None) -> Step:
    """Open the next round, or the one that was asked for; after the last one, let the devices finish."""
    number, last = state.round + 1, state.round >= policy.num_rounds
    if asked is not None:
        number, last = asked.round, asked.last
    if last:
        number = asked.round if asked else state.round
        closed = {"phase": "finish", "round": number, "sample": NOBODY, "past": (), "needed": 0, "filled": 0}
        note = Note(f"all {number} rounds are over; devices finish")
        return recounted(state.model_copy(update=closed)), [*actions, Announce(), note]
    sample, needs = sampled(state, number, policy)
    opened = {
        "phase": "train", "round": number, "sample": sample, "needed": needs, "filled": 0,
        "past": (state.sample, *state.past)[: policy.reach],
    }  # fmt: skip
    state = recounted(state.model_copy(update=opened))
    of = "" if policy.led else f" of {policy.num_rounds}"
    return state, [*actions, Announce(), Note(f"round {number}{of}: asking {named(state.asked)}")]
