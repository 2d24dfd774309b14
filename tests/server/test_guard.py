"""What whoever sits at the broker can't do to a server: forge, move, change or repeat what a device said."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import AuthenticityError, ConfigError, RejectedError
from edge_runtime.wire import enrolment, signing, topics
from edge_runtime.wire.keys import SigningKey
from edge_runtime.wire.ledger import Ledger
from edge_runtime.wire.messages import Accepted, Enrolled, Need, Presence, Rejected, Welcome, dump, load
from edge_runtime.wire.transport import matches
from server.guard import ServerGuard
from server.roster import Entry, RosterFile
from tests.server.bench import FLEET, Bench, Hand
from tests.server.secrets import Secrets

ATTACKER = SigningKey.from_seed(b"x" * 32)


class Wire:
    """A bench whose server believes signatures alone, and what passes through its broker."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.secrets = Secrets(folder / "secrets", *(names or ("a", "b")))
        self.guard = self.secrets.of_server()
        self.bench = Bench(folder, guard=self.guard)
        self.spy = self.bench.broker.connect("operator")
        self.spy.subscribe("edge/#")

    def hand(self, name: str, key: SigningKey | None = None) -> Hand:
        rank = {"a": 2, "b": 4}.get(name, 2)
        return Hand(self.bench, name, rank, self.secrets.of_device(name, key=key))

    def training(self) -> tuple[Hand, Hand]:
        hands = self.hand("a"), self.hand("b")
        for hand in hands:
            hand.hello()
        assert self.bench.directive.phase == "train"
        return hands

    def heard(self) -> list[tuple[str, bytes]]:
        """All that has passed."""
        found = []
        while (delivery := self.spy.receive(0.0)) is not None:
            found.append((delivery.topic, delivery.payload))
        return found

    def inject(self, topic: str, payload: bytes) -> None:
        """Publish as whoever owns the broker can."""
        self.spy.publish(topic, payload)
        self.bench.pump()


@pytest.fixture
def wire(tmp_path: Path) -> Wire:
    return Wire(tmp_path)


def test_a_signed_fleet_lives_a_round(wire: Wire) -> None:
    one, two = wire.training()
    for hand in (one, two):
        offer, payload = hand.train()
        assert hand.deliver(offer, payload) == [Accepted(sha256=offer.blob.sha256, round=1)]
    assert wire.bench.service.state.version == 1
    assert not wire.guard.dropped
    assert all(b'"sig":"' in payload for topic, payload in wire.heard() if "/blob/" not in topic)


def test_nobody_without_the_key_speaks_for_a_device(wire: Wire) -> None:
    one, _ = wire.training()
    offer, _payload = one.train()
    topic = topics.up(FLEET, "a")
    before = wire.bench.service.state
    for payload in (
        dump(offer),
        signing.seal(topic, dump(offer), ATTACKER, 1 << 52),
        signing.seal(topic, dump(offer), wire.secrets.devices["b"], 1 << 52),
    ):
        wire.inject(topic, payload)
    assert one.heard() == []
    assert wire.bench.service.state == before
    assert wire.guard.dropped["forged"] == 3
    assert sum(record["event"] == "refused" for record in wire.bench.records) == 3
    assert sum("dropped a message on edge/fleet/c/a/up" in note for note in wire.bench.notes) == 3


def test_what_a_device_said_cannot_be_moved_to_another_name_or_changed(wire: Wire) -> None:
    one, _ = wire.training()
    wire.heard()
    offer, _payload = one.train()
    one.say(offer)
    [said] = [payload for topic, payload in wire.heard() if topic == topics.up(FLEET, "a")]
    before = wire.bench.service.state
    wire.inject(topics.up(FLEET, "b"), said)
    wire.inject(topics.status(FLEET, "a"), said)
    more = said.replace(b'"examples":', b'"examples":9')
    assert more != said
    wire.inject(topics.up(FLEET, "a"), more)
    assert wire.bench.service.state == before
    assert wire.guard.dropped["forged"] == 3


def test_an_old_update_has_no_effect_in_a_later_round(wire: Wire) -> None:
    one, two = wire.training()
    for hand in (one, two):
        hand.deliver(*hand.train())
    said = topics.up(FLEET, "+"), topics.upload(FLEET, "+", "+")
    old = [(topic, payload) for topic, payload in wire.heard() if any(matches(pattern, topic) for pattern in said)]
    assert wire.bench.directive.round == 2
    hello_and_offer = [payload for topic, payload in old if topic == topics.up(FLEET, "a")]
    assert len(hello_and_offer) == 2
    one.say(one.introduction(wire.bench.directive.adapter))  # the device has said something since
    before = wire.bench.service.state
    for topic, payload in old:
        wire.inject(topic, payload)
    assert one.heard() == []
    assert wire.bench.service.state == before
    assert wire.bench.store.offer_of("a") is None
    assert wire.guard.dropped["old"] >= 2


def test_a_device_that_repeats_its_own_old_message_has_no_effect_either(wire: Wire) -> None:
    one, _ = wire.training()
    [hello] = [payload for topic, payload in wire.heard() if topic == topics.up(FLEET, "a")]
    offer, _payload = one.train()
    assert isinstance(one.say(offer)[0], Need)
    one.transport.publish(topics.up(FLEET, "a"), hello)
    assert one.heard() == []
    assert wire.guard.dropped == {"old": 1}


def test_the_same_delivery_again_is_harmless(wire: Wire) -> None:
    one, _ = wire.training()
    wire.heard()
    offer, _payload = one.train()
    one.say(offer)
    [said] = [payload for topic, payload in wire.heard() if topic == topics.up(FLEET, "a")]
    wire.inject(topics.up(FLEET, "a"), said)
    assert one.heard() == [], "an offer that is said again is answered later"
    wire.bench.wait()
    assert one.heard() == [Need(sha256=offer.blob.sha256, ranges=((0, offer.blob.chunks),))]


def test_what_was_taken_is_old_for_a_server_that_starts_again(wire: Wire) -> None:
    one, _ = wire.training()
    [hello] = [payload for topic, payload in wire.heard() if topic == topics.up(FLEET, "a")]
    one.say(one.train()[0])
    wire.guard._ledger.close()
    wire.bench.guard = wire.guard = wire.secrets.of_server()
    wire.bench.restart()
    wire.inject(topics.up(FLEET, "a"), hello)
    assert wire.guard.dropped == {"old": 1}


def test_a_crash_before_a_message_was_dealt_with_does_not_make_it_old(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, "a")
    device, topic = secrets.of_device("a"), topics.up(FLEET, "a")
    first, second = (device.seal(topic, dump(Welcome(client=name, fleet=FLEET))) for name in ("one", "two"))
    ledger = Ledger(tmp_path / "l")
    guard = secrets.of_server(ledger)
    assert guard.open(topic, first) is not None
    assert secrets.of_server(ledger).open(topic, first) is not None, "the broker delivers it again"
    guard.settle()
    assert guard.open(topic, second) is not None
    guard.settle()
    assert guard.open(topic, first) is None
    assert guard.open(topic, second) is not None


def test_a_last_will_is_believed_after_everything_that_its_life_said_and_in_no_later_life(wire: Wire) -> None:
    wire.training()
    topic = topics.status(FLEET, "a")
    wills = []
    for life in ("1", "2"):
        guard = wire.secrets.of_device("a", Ledger(wire.secrets.folder / life))
        wills.append(guard.seal(topic, dump(Presence(client="a", state="offline", instance=life))))
        for session in (1, 2):
            online = Presence(client="a", state="online", instance=life, session=session)
            wire.inject(topic, guard.seal(topic, dump(online)))
    wire.inject(topic, wills[0])
    assert wire.bench.service.state.members["a"].online
    wire.inject(topic, wills[1])
    assert not wire.bench.service.state.members["a"].online


def test_a_presence_that_was_said_before_a_later_one_is_old(wire: Wire) -> None:
    one, _ = wire.training()
    topic = topics.status(FLEET, "a")
    early, late = (one.guard.seal(topic, dump(Presence(client="a", state="online", session=n))) for n in (1, 2))
    wire.inject(topic, late)
    wire.inject(topic, early)
    assert wire.guard.dropped == {"old": 1}


# ── standing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_revoked_device_is_told_why_and_no_restart_is_needed(wire: Wire) -> None:
    one, _ = wire.training()
    entry = RosterFile(wire.secrets.path).read().devices["a"]
    wire.secrets.enter("a", entry.model_copy(update={"revoked": "lost on a train"}))
    [told] = one.hello()
    assert isinstance(told, Rejected)
    assert told.code == "revoked"
    assert "lost on a train" in told.reason
    assert wire.guard.dropped == {"refused": 1}


def test_nobody_can_have_a_revoked_name_answered_without_its_key(wire: Wire) -> None:
    one, _ = wire.training()
    wire.inject(topics.up(FLEET, "a"), signing.seal(topics.up(FLEET, "a"), b'{"v":1}', ATTACKER, 1))
    assert one.heard() == []


def test_a_stranger_is_told_that_it_is_one(wire: Wire) -> None:
    stranger = wire.hand("c", ATTACKER)
    [told] = stranger.say(stranger.introduction(wire.bench.directive.adapter))
    assert isinstance(told, Rejected)
    assert told.code == "not-enrolled"


def test_a_roster_of_another_fleet_or_open_to_others_is_refused(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, "a")
    with pytest.raises(ConfigError, match="roster is of fleet 'fleet'; this server runs 'other'"):
        ServerGuard("other", secrets.server, RosterFile(secrets.path), Ledger(tmp_path / "l"))
    secrets.path.chmod(0o666)
    with pytest.raises(ConfigError, match="run: chmod 644"):
        RosterFile(secrets.path)


def test_a_roster_that_is_spoilt_while_the_server_runs_lets_nobody_in_and_ends_nothing(wire: Wire) -> None:
    one, _ = wire.training()
    kept = wire.secrets.path.read_bytes()
    wire.secrets.path.write_bytes(b"{")
    assert one.hello() == []
    assert "nobody can be recognised" in wire.bench.notes[-1]
    wire.secrets.path.write_bytes(kept)
    assert one.hello() != []


# ── enrolment ─────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(wire: Wire, name: str, key: SigningKey, token: str) -> Hand:
    """Let a device ask for its key to be taken, with the server answering between two looks."""
    hand = wire.hand(name, key)

    def looks() -> bool:
        wire.bench.pump()
        return False

    guard = hand.guard
    assert enrolment.enrol(
        (FLEET, name), token, transport=hand.transport, guard=guard, say=wire.bench.notes.append,  # type: ignore[arg-type]  # a device's
        stop=looks, clock=iter(range(0, 10_000, 100)).__next__,
    )  # fmt: skip
    guard._ledger.close()  # type: ignore[attr-defined]
    return hand


def expecting(wire: Wire, name: str) -> str:
    token = enrolment.new_token()
    wire.secrets.enter(name, Entry(token=enrolment.key_of(token).public.hex()))
    return token


def test_a_token_enrols_one_key_once(wire: Wire) -> None:
    token, key = expecting(wire, "c"), SigningKey.generate()
    ask(wire, "c", key, token)
    entry = RosterFile(wire.secrets.path).read().devices["c"]
    assert (entry.key, entry.used, entry.standing) == (key.public.hex(), True, "active")
    assert token not in wire.secrets.path.read_text()
    ask(wire, "c", key, token)  # the answer was lost, say: the same key may ask again
    with pytest.raises(RejectedError, match="the token was used already, for another key"):
        ask(wire, "c", SigningKey.generate(), token)


def test_a_wrong_token_enrols_nothing_and_sends_nobody_else_away(wire: Wire) -> None:
    token = expecting(wire, "c")
    listener = wire.bench.broker.connect("c-listening")
    listener.subscribe(topics.down(FLEET, "c"))
    with pytest.raises(RejectedError, match="not the one that was issued for this name"):
        ask(wire, "c", ATTACKER, enrolment.new_token())
    answered = listener.receive(0.0)
    assert answered is not None
    refusal = load(answered.payload)
    assert isinstance(refusal, Rejected)
    assert refusal.key == ATTACKER.public.hex(), "whoever has another key is not meant"
    assert RosterFile(wire.secrets.path).read().devices["c"].standing == "expected"
    assert token


def test_a_proof_is_good_for_one_fleet_name_and_key() -> None:
    token, key = enrolment.new_token(), SigningKey.generate()
    public, asked = enrolment.key_of(token).public, enrolment.request(FLEET, "c", key, token)
    assert enrolment.proves(FLEET, asked, public)
    assert not enrolment.proves("other", asked, public)
    assert not enrolment.proves(FLEET, asked.model_copy(update={"client": "d"}), public)
    assert not enrolment.proves(FLEET, asked.model_copy(update={"key": ATTACKER.public.hex()}), public)


def test_a_device_that_has_not_enrolled_may_say_nothing_else(wire: Wire) -> None:
    expecting(wire, "c")
    hand = wire.hand("c", SigningKey.generate())
    assert hand.hello() == []
    assert "must enrol first" in wire.bench.notes[-1]


def test_an_enrolment_under_the_name_of_a_device_with_a_key_changes_nothing(wire: Wire) -> None:
    asked = enrolment.request(FLEET, "a", ATTACKER, enrolment.new_token())
    topic = topics.up(FLEET, "a")
    wire.inject(topic, signing.seal(topic, dump(asked), ATTACKER, 1))
    assert RosterFile(wire.secrets.path).read().devices["a"].key == wire.secrets.devices["a"].public.hex()
    assert wire.guard.dropped == {"forged": 1}


def test_an_enrolled_answer_is_no_message_of_a_device(wire: Wire) -> None:
    one, _ = wire.training()
    [refusal] = one.say(Enrolled(client="a", key="00"))
    assert isinstance(refusal, Rejected)
    assert refusal.code == "malformed"


def test_the_guard_counts_what_it_drops(tmp_path: Path) -> None:
    guard = Secrets(tmp_path, "a").of_server()
    with pytest.raises(AuthenticityError):
        guard.open(topics.up(FLEET, "a"), b"{}")
    assert guard.dropped == {"forged": 1}


def test_a_chunk_needs_no_seal_for_its_offer_names_it(wire: Wire) -> None:
    """A blob is signed through its name; other bytes under that name are refused as a whole."""
    one, _ = wire.training()
    offer, payload = one.train()
    one.say(offer)
    other = bytes(len(payload))
    [told] = one.send(offer, other)
    assert told == Need(sha256=offer.blob.sha256, ranges=((0, offer.blob.chunks),))
    assert one.send(offer, payload) == [Accepted(sha256=offer.blob.sha256, round=1)]
