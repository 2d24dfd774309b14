"""Two devices of one name: exactly one goes on, and a device alone is never sent away."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import topics
from edge_runtime.wire.ledger import Ledger
from edge_runtime.wire.messages import Message, Presence, Rejected, Welcome, dump
from server.fleet import Member, rival
from tests.runtime.said import hello
from tests.server.bench import FLEET, Bench, Hand, training
from tests.server.secrets import Secrets
from tests.strategies import laws


@laws
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


@laws
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


class Rivals:
    """Two machines with one name and one key, each with counters of its own, that throw each other out."""

    def __init__(self, folder: Path) -> None:
        secrets = Secrets(folder / "secrets", "a")
        self.now = secrets.now
        self.bench = Bench(folder, guard=secrets.of_server())
        self.hands: dict[str, Hand] = {}
        for instance in ("1-old", "2-new"):
            self.now += 1_000_000
            ledger = Ledger(folder / f"{instance}.ledger", lambda: self.now)
            hand = self.hands[instance] = Hand(self.bench, "a", guard=secrets.of_device("a", ledger))
            hand.transport = self.bench.broker.connect(instance)  # the broker in memory lets each client id in once
            hand.transport.subscribe(topics.down(FLEET, "a"))
            hand.hello()

    def online(self, instance: str, session: int) -> list[Message]:
        """Connect; returns what the server answers."""
        self.now += 1_000_000
        presence = Presence(client="a", state="online", instance=instance, session=session)
        return self.hands.get(instance, self.hands["2-new"]).say(presence, topic=topics.status(FLEET, "a"))


def test_of_two_with_one_key_the_later_one_is_told_and_the_older_one_is_heard_again(tmp_path: Path) -> None:
    rivals = Rivals(tmp_path)
    told = [m for session in (1, 2, 3) for instance in rivals.hands for m in rivals.online(instance, session)]
    assert {(message.code, message.instance) for message in told if isinstance(message, Rejected)} == {
        ("duplicate", "2-new")
    }
    rivals.online("1-old", 4)
    assert any(isinstance(message, Welcome) for message in rivals.hands["1-old"].hello())


def test_presences_that_were_said_once_send_nobody_away_when_a_broker_says_them_again(tmp_path: Path) -> None:
    rivals = Rivals(tmp_path)
    spy = rivals.bench.broker.connect("operator")
    spy.subscribe(topics.status(FLEET, "a"))
    for session in (1, 2, 3):
        rivals.online("1-old", session)
    recorded = []
    while (delivery := spy.receive(0.0)) is not None:
        recorded.append(delivery.payload)
    for life in range(5):  # so many others that the first one's sessions are forgotten
        rivals.online(f"{life + 2}-new", 1)
        rivals.online(f"{life + 2}-new", 2)
        for payload in recorded:
            spy.publish(topics.status(FLEET, "a"), payload)
    assert [message for message in rivals.hands["2-new"].heard() if isinstance(message, Rejected)] == []


def test_the_last_will_of_a_rival_or_of_a_former_life_makes_nobody_absent(bench: Bench) -> None:
    training(bench)
    hand, status = Hand(bench, "a"), topics.status(FLEET, "a")
    for instance in ("1-old", "2-new"):
        hand.say(Presence(client="a", state="online", instance=instance, session=1), topic=status)
    hand.say(Presence(client="a", state="offline", instance="1-old"), topic=status)
    assert bench.service.state.members["a"].online
    hand.say(Presence(client="a", state="offline", instance="2-new"), topic=status)
    assert not bench.service.state.members["a"].online
