"""The device's shell when messages are lost, processes restart, and its own work fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_runtime.conversation import MOST_SILENCES, REPEAT_SECONDS
from edge_runtime.errors import (
    DataError,
    EdgeRuntimeError,
    ExportError,
    FingerprintMismatchError,
    PlanError,
    RejectedError,
    WireError,
)
from edge_runtime.fetching import STILL_SECONDS
from edge_runtime.identity import will
from edge_runtime.wire import topics
from edge_runtime.wire.messages import (
    Accepted,
    Hello,
    Message,
    Need,
    Offer,
    Presence,
    Rejected,
    Report,
    dump,
    load,
)
from tests.runtime.desk import FLEET, NAME, WELCOME, Desk, adapter, of, offered
from tests.runtime.said import directive
from tests.runtime.toy import SHAPES

# ── again ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def hear_nothing(desk: Desk, seconds: float) -> list[Message]:
    """What the device says while that time passes and nothing arrives."""
    said = desk.work(seconds)
    return of(Hello, said) + of(Offer, said)


def test_what_is_not_answered_is_said_again_after_a_while(desk: Desk) -> None:
    [hello] = of(Hello, desk.tell(directive("gather", 0)))
    desk.broker.restart(forget=True)  # the welcome is lost, and so is the directive
    desk.work()
    assert hear_nothing(desk, REPEAT_SECONDS + 1) == [hello]
    assert hear_nothing(desk, REPEAT_SECONDS / 2) == []
    assert hear_nothing(desk, REPEAT_SECONDS) == [hello]


def test_a_first_directive_that_the_broker_kept_and_never_delivered_is_asked_for_again(desk: Desk) -> None:
    turns = iter(range(12))

    def stop() -> bool:
        turn = next(turns, None)
        if turn == 1:  # it has subscribed, and the broker misses that somebody is there for what it keeps now
            desk.broker._exchange.retained[topics.directive(FLEET)] = dump(directive("gather", 0))
        if turn == 5:
            assert of(Hello, desk.heard()) == []
            desk.clock.now += REPEAT_SECONDS + 1
        return turn is None

    desk.client.run(stop, poll=0.0)
    assert len(of(Hello, desk.heard())) == 1


def test_an_offer_is_said_again_until_it_is_answered(desk: Desk) -> None:
    offer = offered(desk)
    for _ in range(2):
        desk.broker.restart(forget=True)
        desk.work()
        assert hear_nothing(desk, REPEAT_SECONDS + 1) == [offer]
    desk.tell(Accepted(sha256=offer.blob.sha256, round=1))
    assert hear_nothing(desk, 5 * REPEAT_SECONDS) == []


def test_after_a_lost_link_it_says_that_it_is_there_and_what_is_unanswered(desk: Desk) -> None:
    offer = offered(desk)
    turns = iter(["listen", "lose", "listen"])

    def stop() -> bool:
        turn = next(turns, "stop")
        if turn == "lose":
            desk.transport.drop()
            desk.transport.resume()
        return turn == "stop"

    desk.client.run(stop, poll=0.0)
    said = [message for message in desk.heard() if isinstance(message, Presence | Offer)]
    online, offline = (Presence(client=NAME, state=state) for state in ("online", "offline"))
    at = said.index(offer)
    assert said[at - 2 : at + 1] == [offline, online, offer], "its last will is answered"
    assert said[-1] == offline
    assert said.count(offer) == 1


def test_a_last_will_that_comes_after_the_next_connection_is_contradicted(desk: Desk) -> None:
    """A broker that replaces a connection may publish the old one's will late, and would keep it for ever."""
    offered(desk)
    turns = iter(["listen", "late", *["listen"] * 8])

    def stop() -> bool:
        turn = next(turns, "stop")
        if turn == "late":
            late = will(FLEET, NAME)
            desk.server.publish(late.topic, late.payload, retain=True)
        elif turn == "stop":
            retained.append(load(desk.broker.retained[topics.status(FLEET, NAME)]))
        return turn == "stop"

    retained: list[Message] = []
    desk.client.run(stop, poll=0.0)
    assert retained == [Presence(client=NAME, state="online")]


def test_after_a_restart_the_update_is_offered_and_sent_as_it_was(desk: Desk) -> None:
    offer = offered(desk)
    kept = desk.disk.outbox
    desk.restart()
    desk.work()
    assert of(Offer, desk.tell(WELCOME)) == [offer]
    assert desk.trainer.rounds == [1], "trained once"
    desk.tell(Need(sha256=offer.blob.sha256, ranges=((0, offer.blob.chunks),)))
    assert kept is not None
    assert b"".join(chunk for _, chunk in desk.uploads) == kept[1]


def test_a_fleet_that_began_anew_makes_it_forget_the_former_life(desk: Desk) -> None:
    offered(desk)
    said = desk.tell(desk.publish(adapter(5), run="two"), WELCOME)
    assert len(of(Hello, said)) == 1
    assert desk.disk.run == "two"
    [offer] = of(Offer, said)
    assert desk.disk.outbox is not None
    assert desk.disk.outbox[0] == offer
    assert desk.trainer.rounds == [1, 1]
    assert len(desk.trainer.specs) == 1, "the plan is as good as before"


def test_another_kind_of_adapter_is_planned_for_anew(desk: Desk) -> None:
    offer = offered(desk)
    desk.tell(Accepted(sha256=offer.blob.sha256, round=1))
    plain = directive().adapter.model_copy(update={"hold_more": False})
    asked = desk.publish(adapter(2), round_number=2, adapter=plain)
    [hello] = of(Hello, desk.tell(asked))
    assert {(part.held, part.trained) for part in hello.groups} == {(2, 2)}
    assert of(Offer, desk.tell(WELCOME))
    assert all(pair.rank == 2 for pair in desk.trainer.live.values())


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("code", "error"), [("fingerprint", FingerprintMismatchError), ("shape", RejectedError)])
def test_a_device_that_the_fleet_cannot_use_ends_with_the_reason(
    desk: Desk, code: Any, error: type[EdgeRuntimeError]
) -> None:
    desk.tell(directive("gather", 0))
    with pytest.raises(error, match="the server refused this device: because"):
        desk.tell(Rejected(code=code, reason="because"))
    assert load(desk.broker.retained[topics.status(FLEET, NAME)]) == Presence(client=NAME, state="offline")


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("work", "error"),
    [
        ("introduce", PlanError("12 MiB are missing")),
        ("receive", DataError("an example is odd")),
        ("train", WireError("a value is too large for the codec")),
        ("evaluate", DataError("an example is odd")),
    ],
)
def test_when_its_own_work_fails_the_server_is_told_and_the_device_ends(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, work: str, error: EdgeRuntimeError
) -> None:
    """Also when the failure is of a kind that bad messages have: it is not taken for one."""
    monkeypatch.setattr(desk.trainer, work, raising(error))
    with pytest.raises(type(error), match=str(error)):
        desk.tell(desk.publish(adapter(1)), WELCOME)
    said = desk.heard()
    [failed] = [report for report in of(Report, said) if report.state == "failed"]
    assert failed.detail == str(error)
    assert said[-1] == Presence(client=NAME, state="offline")


def test_an_update_that_the_codec_cannot_hold_is_a_failure_and_not_silence(desk: Desk) -> None:
    desk.trainer.targets = {name: np.full(shape, 1e7, np.float32) for name, shape in SHAPES.items()}
    once = directive().training.model_copy(update={"max_steps": 1})
    with pytest.raises(WireError, match="fp16 holds values up to 65504"):
        desk.tell(desk.publish(adapter(1), codec="fp16", training=once), WELCOME)


def test_an_export_that_fails_is_told(desk: Desk) -> None:
    desk.failure = ExportError("it does not agree with the live model")
    with pytest.raises(ExportError, match="does not agree"):
        desk.tell(desk.publish(adapter(1), "finish", 1, version=1))
    assert of(Report, desk.heard())[-1].state == "failed"


def test_nonsense_is_said_and_dropped(desk: Desk) -> None:
    offer = offered(desk)
    before = desk.disk.outbox
    for topic in (topics.down(FLEET, NAME), topics.directive(FLEET)):
        for payload in (b"{", b"\xff" * 10, b'{"type": "accepted"}', b" " * 200_000, dump(WELCOME)[:-1], b""):
            desk.server.publish(topic, payload)
    desk.server.publish(topics.down(FLEET, NAME), dump(offer))
    desk.server.publish(topics.down(FLEET, NAME), dump(WELCOME).replace(b'"v":1', b'"v":9'))
    desk.work()
    assert desk.disk.outbox == before
    assert len([note for note in desk.notes if note.startswith("dropped a message on")]) == 11
    desk.tell(Accepted(sha256=offer.blob.sha256, round=1))
    assert desk.disk.outbox is None


def without_bands(desk: Desk) -> dict[str, bytes]:
    """Tell a device to fetch what its broker has lost; the chunks that are lost."""
    desk.tell(directive("gather"), WELCOME)
    asked = desk.publish(adapter())
    kept = desk.broker._exchange.retained
    lost = {topic: kept.pop(topic) for topic in list(kept) if "/blob/" in topic}
    assert lost
    assert "training" not in {said.state for said in of(Report, desk.tell(asked))}
    return lost


def askings(desk: Desk, topic: str) -> list[float]:
    """When the device subscribes to such a topic from now on, to be looked at later."""
    found: list[float] = []
    subscribe = desk.transport.subscribe

    def noted(pattern: str) -> None:
        if topic in pattern:
            found.append(desk.clock.now)
        subscribe(pattern)

    desk.transport.subscribe = noted  # type: ignore[method-assign]
    return found


def test_bands_that_the_broker_learns_of_late_are_asked_for_again(desk: Desk) -> None:
    late = without_bands(desk)
    desk.broker._exchange.retained.update(late)  # a leaf hears from its hub, and tells nobody who subscribed before
    assert not of(Offer, desk.work(STILL_SECONDS - 1))
    assert of(Offer, desk.work(2.0))


def test_bands_that_may_be_on_their_way_are_not_asked_for_again(desk: Desk) -> None:
    """What a broker sends keeps its order: until it has acknowledged a later message, a slow link may bring them."""
    without_bands(desk)
    again, flush, acknowledged = askings(desk, "/blob/"), desk.transport.flush, True
    desk.transport.flush = lambda timeout: flush(timeout) and acknowledged  # type: ignore[method-assign]
    publish = desk.transport.publish

    def said(*message: Any, **how: Any) -> None:
        nonlocal acknowledged
        acknowledged = False
        publish(*message, **how)

    def arrives() -> None:
        nonlocal acknowledged
        acknowledged = True

    def note() -> None:
        assert not again
        again.append(0.0)

    desk.transport.publish = said  # type: ignore[method-assign]
    desk.work(arrives, STILL_SECONDS + 1, *[STILL_SECONDS] * 20, note, arrives, 0.0)
    assert len(again) > 1, "as soon as it is acknowledged, and not before"


def test_a_chunk_that_comes_begins_the_wait_for_the_others_anew(desk: Desk) -> None:
    first, second, *_ = without_bands(desk).items()
    again = askings(desk, "/blob/")
    desk.work(
        STILL_SECONDS - 1, lambda: desk.server.publish(*first),
        STILL_SECONDS - 1, lambda: desk.server.publish(*second), STILL_SECONDS - 1,
    )  # fmt: skip
    assert not again
    desk.work(STILL_SECONDS + 1)
    assert again


def test_bands_that_do_not_come_are_asked_for_ever_more_rarely(desk: Desk) -> None:
    without_bands(desk)
    again, began = askings(desk, "/blob/"), desk.clock.now
    desk.work(*[1.0] * 660)
    times = sorted({when - began for when in again})
    assert times == [10, 30, 70, 150, 310, 630]


def test_a_directive_that_the_broker_lost_on_the_way_is_asked_for(desk: Desk) -> None:
    offer = offered(desk)
    desk.tell(Accepted(sha256=offer.blob.sha256, round=1))
    asked = desk.publish(adapter(2), round_number=2, version=1)

    def lose() -> None:
        desk.broker._exchange.retained[topics.directive(FLEET)] = dump(asked)  # and nobody is told

    assert not of(Offer, desk.work(lose, REPEAT_SECONDS - 1))
    desk.broker._exchange.retained.clear()
    [update] = of(Offer, desk.work(lambda: desk.publish(adapter(2)), lose, REPEAT_SECONDS + 1))
    assert update.round == 2


def test_a_device_that_waits_for_hours_asks_for_the_directive_ever_more_rarely(desk: Desk) -> None:
    offer = offered(desk)
    desk.tell(Accepted(sha256=offer.blob.sha256, round=1))
    again, began = askings(desk, "/round"), desk.clock.now
    news = desk.publish(adapter(2), round_number=2, version=1)
    desk.work(
        *[REPEAT_SECONDS] * (3 * MOST_SILENCES + 3),
        lambda: desk.server.publish(topics.directive(FLEET), dump(news)), REPEAT_SECONDS,
    )  # fmt: skip
    silences = [round((when - began) / REPEAT_SECONDS) for when in again]
    assert silences[:-1] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 192], "when it begins, and ever more rarely"
    assert silences[-1] == 3 * MOST_SILENCES + 4, "what is new begins the count anew"
