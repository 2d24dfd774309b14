"""Who may join, and whom a round asks."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire.messages import group
from server.fleet import Member, admit, choose, ranking
from tests.runtime.said import BASE, hello, slot

names = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=6)
fleets = st.dictionaries(names, st.booleans(), max_size=12).map(
    lambda online: {name: Member(hello=hello(name), online=there) for name, there in online.items()}
)
fractions = st.floats(0.01, 1.0)


@given(fleets, fractions, st.integers(0, 99), st.integers(0, 99))
def test_a_round_asks_the_fraction_of_those_online(
    members: dict[str, Member], fraction: float, number: int, seed: int
) -> None:
    asked = choose(members, fraction, number, seed)
    online = {name for name, member in members.items() if member.online}
    assert set(asked) <= online
    assert list(asked) == sorted(set(asked))
    assert len(asked) == (max(1, math.ceil(fraction * len(online))) if online else 0)


@given(fleets, fractions, st.integers(0, 99), st.integers(0, 99), st.randoms())
def test_every_server_that_knows_the_same_members_asks_the_same(members, fraction, number, seed, random) -> None:
    shuffled = list(members.items())
    random.shuffle(shuffled)
    assert choose(dict(shuffled), fraction, number, seed) == choose(members, fraction, number, seed)


@given(fleets, st.integers(0, 99), st.integers(0, 99))
def test_a_larger_fraction_asks_the_same_devices_and_more(members: dict[str, Member], number: int, seed: int) -> None:
    order = ranking(members, number, seed)
    for fraction in (0.2, 0.5, 1.0):
        asked = choose(members, fraction, number, seed)
        assert set(asked) == set(order[: len(asked)])


def test_turns_change_from_round_to_round_and_come_to_everybody() -> None:
    members = {f"device-{index}": Member(hello=hello(f"device-{index}")) for index in range(8)}
    turns = [choose(members, 0.25, number, seed=0) for number in range(200)]
    counts = Counter(name for asked in turns for name in asked)
    assert len(set(turns)) > 8
    assert set(counts) == set(members)
    assert min(counts.values()) > 20, "of 50 expected"
    assert turns != [choose(members, 0.25, number, seed=1) for number in range(200)]


def test_another_base_model_is_refused_with_both_fingerprints() -> None:
    refusal = admit({}, "c" * 64, hello("a"))
    assert refusal is not None
    assert refusal.code == "fingerprint"
    assert "c" * 16 in refusal.reason
    assert BASE[:16] in refusal.reason


def test_the_first_device_fixes_base_and_shapes_and_its_like_are_welcome() -> None:
    members = {"a": Member(hello=hello("a"))}
    assert admit({}, None, hello("a")) is None
    assert admit(members, BASE, hello("b", groups=group(slot(rank=8)))) is None
    assert admit(members, BASE, hello("a")) is None, "a device may say hello again"


def test_other_shapes_are_refused_with_the_layer_and_both_shapes() -> None:
    members = {"a": Member(hello=hello("a"))}
    refusal = admit(members, BASE, hello("b", groups=group(slot(d_in=20))))
    assert refusal is not None
    assert refusal.code == "shape"
    assert "'model.layers.0.self_attn.q_proj' is (12, 16) in this fleet and (12, 20) on yours" in refusal.reason


def test_a_layer_that_the_fleet_does_not_have_is_refused() -> None:
    members = {"a": Member(hello=hello("a"))}
    extra = group(slot())[0].model_copy(update={"module": "self_attn.v_proj"})
    refusal = admit(members, BASE, hello("b", groups=(*group(slot()), extra)))
    assert refusal is not None
    assert "'model.layers.0.self_attn.v_proj' is absent in this fleet and (12, 16) on yours" in refusal.reason
