"""A device without I/O: it does what the agent asks when the test says so, and checks every step."""

from __future__ import annotations

import pytest

from edge_runtime import agent
from edge_runtime.agent import (
    Action,
    Adopt,
    Event,
    Fetch,
    Fetched,
    Finish,
    Finished,
    MakePlan,
    Planned,
    Received,
    Repeat,
    Say,
    SendChunks,
    Settle,
    State,
    Train,
    Trained,
)
from edge_runtime.wire.messages import Accepted, Directive, Message, Need, Offer, Rejected, Welcome
from tests.runtime.said import SPEC, hello, offer

OTHER_SPEC = SPEC.model_copy(update={"max_held": 4, "hold_more": False})
WELCOME = Welcome(client="a", fleet="fleet")


def reply_to(update: Offer, kind: str) -> Message:
    sha = update.blob.sha256
    if kind == "need":
        return Need(sha256=sha, ranges=((0, 2),))
    if kind == "accepted":
        return Accepted(sha256=sha, round=update.round)
    return Rejected(code=kind, reason="because", sha256=sha)  # type: ignore[arg-type]  # one of its codes


class Device:
    """A shell without I/O: it does what the agent asks when the test says so, and checks every step.

    `disk` is what survives a crash; `work` is the one piece of work under way, as `Client` would do it.
    """

    def __init__(self) -> None:
        self.disk: tuple[str, Offer | None, int] = ("", None, 0)
        self.boot()

    def boot(self) -> None:
        self.work: Action | None = None
        self.state = agent.start("a", *self.disk)

    def happen(self, event: Event) -> list[Action]:
        before = self.state
        if isinstance(event, Trained) and event.run == self.disk[0]:
            self.disk = (self.disk[0], event.offer, self.disk[2])
        after, actions = agent.step(before, event)
        assert agent.step(before, event) == (after, actions), "the same gives the same"
        check_step(before, event, after, actions)
        for action in actions:
            self.perform(action)
        if not after.busy and isinstance(self.work, Fetch):
            self.work = None  # given up
        self.state = after
        assert (after.run, after.outbox, after.settled) == self.disk, "what is durable is what it believes"
        assert (self.work is None) == (after.busy == ""), "it waits for work that nobody does"
        return actions

    def perform(self, action: Action) -> None:
        run, _, settled = self.disk
        match action:
            case Adopt(new):
                self.disk = (new, None, 0)
            case Settle(number, _):
                self.disk = (run, None, max(settled, number))
            case MakePlan() | Train() | Finish():
                assert self.work is None or isinstance(self.work, Fetch), "one piece of work at a time"
                self.work = action
            case Fetch():
                assert self.work is None or isinstance(self.work, Fetch)
                self.work = action
            case _:
                pass

    def complete(self, payload: bytes = b"x") -> list[Action]:
        """The work under way ends."""
        work, self.work = self.work, None
        match work:
            case MakePlan():
                return self.happen(Planned(hello("a")))
            case Fetch(asked):
                return self.happen(Fetched(asked.version))
            case Train(asked):
                update = offer("a", max(1, asked.round), payload=payload + asked.run.encode())
                return self.happen(Trained(update, asked.run))
            case Finish():
                return self.happen(Finished())
            case _:
                return []


def check_step(before: State, event: Event, after: State, actions: list[Action]) -> None:
    """What every single step keeps to."""
    kinds = [type(action) for action in actions]
    assert len(set(kinds) & {MakePlan, Fetch, Train, Finish}) <= 1
    if before.left:
        assert after.left
        assert not set(kinds) & {MakePlan, Fetch, Train, Finish}, "its life in the fleet is over"
    if before.outbox and after.outbox != before.outbox:
        check_gone(before, event, actions)
    for action in actions:
        match action:
            case Train(asked):
                newest = after.directive
                assert newest is not None
                assert asked == newest or 0 < newest.version - asked.version <= newest.max_staleness
                assert asked.asks("a")
                assert asked.round > after.settled
                assert after.outbox is None
            case SendChunks(update, _):
                assert update == after.outbox
            case Settle(number, _):
                assert before.outbox is not None
                assert number == before.outbox.round
                assert after.settled >= number
            case _:
                pass
    if isinstance(event, Repeat):
        expected = [before.hello] if before.hello and not before.welcomed else [before.outbox] if before.outbox else []
        assert [action.message for action in actions if isinstance(action, Say)] == expected


def check_gone(before: State, event: Event, actions: list[Action]) -> None:
    """An update leaves the outbox when the server accepted or refused exactly that one, or the fleet began anew."""
    assert isinstance(event, Received)
    assert before.outbox is not None
    match event.message:
        case Accepted() | Rejected():
            assert event.message.sha256 == before.outbox.blob.sha256
            assert Settle(before.outbox.round, arrived=isinstance(event.message, Accepted)) in actions
        case Directive():
            assert Adopt(event.message.run) in actions
        case _:
            pytest.fail(f"an update was dropped because of {event.message}")
