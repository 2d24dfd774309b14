"""A device that pauses is waited for, up to a bound; then it holds up no round."""

from __future__ import annotations

from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.wire.messages import group
from server.events import Heard, Note, PresenceChanged, Stored, Tick
from tests.runtime.said import hello, offer, report
from tests.server.life import TIMEOUT, Life, policy

PAUSE = 3 * TIMEOUT
"""As `policy` says."""


def waiting() -> Life:
    """The round has all updates but that of 'b'."""
    life = Life(policy())
    for name in ("a", "b"):
        life.happen(Heard(hello(name)))
    life.happen(Stored(offer("a")))
    return life


def pausing(life: Life, seconds: float, every: float = 5.0) -> list[str]:
    """Let 'b' say for so long that it pauses; what the server noted."""
    notes = []
    end = life.now + seconds
    while life.now < end and life.phase == "train":
        for event in (Heard(report("b", "paused", detail="too hot")), Tick()):
            notes += [action.text for action in life.happen(event) if isinstance(action, Note)]
        life.now += every
    return notes


def test_a_device_that_pauses_is_not_given_up_before_the_bound() -> None:
    life = waiting()
    assert pausing(life, PAUSE) == ["'b' pauses: too hot"]
    life.happen(Heard(report("b", "training", step=1, steps=3)))
    life.happen(Stored(offer("b")))
    assert (life.phase, sorted(life.state.stored)) == ("merging", ["a", "b"])


def test_a_device_that_pauses_for_longer_holds_up_nobody() -> None:
    life = waiting()
    notes = pausing(life, PAUSE + 2 * TIMEOUT)
    assert (life.phase, sorted(life.state.stored)) == ("merging", ["a"])
    assert any("going on without b" in note for note in notes)
    assert "b" in life.state.members


def test_every_pause_has_its_own_bound() -> None:
    life = waiting()
    for _ in range(3):
        pausing(life, PAUSE)
        assert life.phase == "train"
        life.happen(Heard(report("b", "training", step=1, steps=3)))
    assert life.state.paused == {}


def test_a_device_that_was_away_pauses_anew() -> None:
    life = waiting()
    pausing(life, PAUSE)
    life.happen(PresenceChanged("b", online=False))
    life.happen(PresenceChanged("b", online=True))
    assert pausing(life, PAUSE) == ["'b' pauses: too hot"]
    assert life.phase == "train"


def test_a_server_that_restarts_counts_a_pause_by_its_own_clock() -> None:
    life = waiting()
    pausing(life, 5.0)
    life.now = -1e6
    life.restart()
    assert life.state.paused == {"b": -1e6}
    assert pausing(life, PAUSE) == []
    assert life.phase == "train"


def test_a_device_may_say_hello_again_with_another_slot_in_the_middle_of_a_round() -> None:
    life = waiting()
    smaller = Slot({name: LayerSlot(12, 16, 1, 1) for name in [f"model.layers.{at}.self_attn.q_proj" for at in (0, 1)]})
    life.happen(Heard(hello("b", groups=group(smaller))))
    assert (life.phase, life.asked) == ("train", "ab")
    assert life.state.members["b"].hello.groups == group(smaller)
    life.happen(Heard(offer("b")))
    life.happen(Stored(offer("b")))
    assert life.phase == "merging"
