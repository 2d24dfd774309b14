"""Two devices of one name: exactly one goes on, and a device alone is never sent away."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import topics
from edge_runtime.wire.messages import Presence, Rejected, dump
from server.fleet import Member, rival
from tests.runtime.said import hello
from tests.server.bench import FLEET, Bench, Hand, training


@given(st.lists(st.tuples(st.sampled_from(["begin", "lose", "again"]), st.integers(0, 3)), max_size=60))
def test_a_device_alone_is_never_sent_away(moves) -> None:
    """However often it restarts and reconnects, and whatever of its presences comes again, in any number."""
    member, life, session, said = Member(hello=hello("a")), 0, 0, [("0", 1)]
    for move, back in moves:
        if move == "begin":
            life, session = life + 1, 1
        elif move == "lose":
            session += 1
        else:
            heard = said[-1 - back % len(said)]
            member, refusal = rival(member, *heard)
            assert refusal is None
            continue
        said.append((f"{life:03d}", session))
        member, refusal = rival(member, *said[-1])
        assert refusal is None


@given(st.permutations(["001", "002"]), st.integers(0, 3))
def test_of_two_that_throw_each_other_out_the_later_one_is_told_and_only_that_one(order, repeats) -> None:
    member, refused = Member(hello=hello("a")), []
    for session in range(1, 5):
        for instance in order:
            for _ in range(1 + repeats):
                member, refusal = rival(member, instance, session)
                refused += [refusal] if refusal else []
    assert refused
    assert {refusal.instance for refusal in refused} == {"002"}
    assert len(member.seen) <= 4, "what is remembered has a bound"


def test_the_server_tells_it_as_often_as_it_comes_back(bench: Bench) -> None:
    training(bench)
    hand = Hand(bench, "a")
    told = []
    for session in (1, 2, 3):
        for instance in ("1-old", "2-new"):
            presence = Presence(client="a", state="online", instance=instance, session=session)
            told += hand.say(presence, topic=topics.status(FLEET, "a"))
    assert dump(told[0])
    assert [(message.code, message.instance) for message in told if isinstance(message, Rejected)] == [
        ("duplicate", "2-new")
    ] * len(told)
    assert len(told) >= 2
    assert set(bench.service.state.members) == {"a", "b"}
