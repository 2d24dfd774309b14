"""Laws of the device's protocol over random lives."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent import (
    Action,
    Exhausted,
    Fetch,
    Received,
    Repeat,
    Say,
    SendChunks,
)
from edge_runtime.wire.messages import Hello, Offer, Rejected
from tests.runtime.pocket import OTHER_SPEC, WELCOME, Device, reply_to
from tests.runtime.said import BASE, SPEC, directive, hello, offer

directives = st.builds(
    directive,
    phase=st.sampled_from(["gather", "train", "train", "train", "finish"]),
    round_number=st.integers(0, 3),
    run=st.sampled_from(["one", "one", "one", "two"]),
    adapter=st.sampled_from([SPEC, SPEC, OTHER_SPEC]),
    base=st.sampled_from([BASE, BASE, "c" * 64]),
    asked=st.sampled_from([None, None, "ab", "b"]),
    max_staleness=st.sampled_from([0, 0, 2]),
)
replies = st.sampled_from(["need", "accepted", "round-closed", "corrupt", "too-large", "unknown-client"])
happenings = st.lists(
    st.one_of(
        st.tuples(st.just("directive"), directives),
        st.tuples(st.just("reply"), replies),
        st.tuples(st.just("foreign reply"), replies),
        st.tuples(
            st.sampled_from(
                ["welcome", "complete", "complete", "complete", "exhausted", "repeat", "crash", "nonsense"]
            ),
            st.none(),
        ),
        st.tuples(st.just("refused"), st.sampled_from(["fingerprint", "shape"])),
    ),
    min_size=10,
    max_size=50,
)


def happen(device: Device, kind: str, detail: Any) -> None:
    match kind:
        case "directive":
            device.happen(Received(detail))
        case "reply" if device.state.outbox:
            device.happen(Received(reply_to(device.state.outbox, detail)))
        case "foreign reply":
            device.happen(Received(reply_to(offer("a", 1, payload=b"of another life"), detail)))
        case "refused" if device.state.hello:
            device.happen(Received(Rejected(code=detail, reason="because")))
        case "welcome" if device.state.hello:
            device.happen(Received(WELCOME))
        case "complete":
            device.complete()
        case "exhausted" if device.work and not isinstance(device.work, Fetch):
            device.work = None
            device.happen(Exhausted())
        case "repeat":
            device.happen(Repeat())
        case "crash":
            device.boot()
        case "nonsense":
            device.happen(Received(hello("b")))


@settings(max_examples=150, deadline=None)
@given(happenings)
def test_no_sequence_of_events_breaks_a_law(sequence: list[tuple[str, Any]]) -> None:
    device = Device()
    for kind, detail in sequence:
        happen(device, kind, detail)


@settings(max_examples=100, deadline=None)
@given(happenings, st.sampled_from(["train", "finish"]))
def test_whatever_happened_a_device_that_is_answered_gets_its_work_done(
    sequence: list[tuple[str, Any]], phase: str
) -> None:
    device = Device()
    for kind, detail in sequence:
        happen(device, kind, detail)
    if device.state.busy == "finishing":
        device.complete()
    if device.state.left:
        device.boot()
    last = directive(phase, 9, run=device.state.run or "one")
    device.happen(Received(last))
    for _ in range(12):
        device.complete()
        answer_all(device, device.happen(Repeat()))
    if phase == "finish":
        assert device.state.left
    else:
        assert (device.state.settled, device.state.outbox, device.state.busy) == (9, None, "")


def answer_all(device: Device, actions: list[Action]) -> None:
    for action in actions:
        match action:
            case Say(Hello()):
                answer_all(device, device.happen(Received(WELCOME)))
            case Say(Offer() as update):
                answer_all(device, device.happen(Received(reply_to(update, "need"))))
            case SendChunks(update, _):
                device.happen(Received(reply_to(update, "accepted")))
            case _:
                pass
