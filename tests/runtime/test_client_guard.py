"""What whoever sits at the broker can't do to a device: forge, move or repeat what the server said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import RejectedError
from edge_runtime.wire import signing, topics
from edge_runtime.wire.guard import DeviceGuard
from edge_runtime.wire.keys import SigningKey
from edge_runtime.wire.ledger import Ledger
from edge_runtime.wire.messages import Accepted, Directive, Message, Offer, Presence, Rejected, dump, load
from tests.runtime.desk import FLEET, NAME, WELCOME, Desk, adapter, of
from tests.runtime.fleets import PAIR, calm, fleet_in
from tests.runtime.said import directive
from tests.server.secrets import Secrets

DOWN, ROUND = topics.down(FLEET, NAME), topics.directive(FLEET)
ATTACKER = SigningKey.from_seed(b"x" * 32)


class Signed:
    """A desk whose device believes the server's signature alone."""

    def __init__(self, folder: Path) -> None:
        self.secrets = Secrets(folder / "secrets", NAME)
        self.ledger = Ledger(folder / "ledger")
        self.guard = self.secrets.of_device(NAME, self.ledger)
        self.desk = Desk(folder / "device", self.guard)
        self.n = 100

    def sealed(self, topic: str, message: Message, key: SigningKey | None = None) -> bytes:
        self.n += 1
        return signing.seal(topic, dump(message), key or self.secrets.server, self.n)

    def inject(self, topic: str, payload: bytes) -> list[Message]:
        """Publish as whoever owns the broker can; returns what the device says."""
        self.desk.server.publish(topic, payload, retain=topic == ROUND)
        return self.desk.work()

    def offered(self, number: int) -> Offer:
        """Let the device train a round as the server says."""
        self.inject(ROUND, self.sealed(ROUND, self.desk.publish(adapter(number), round_number=number)))
        [offer] = of(Offer, self.inject(DOWN, self.sealed(DOWN, WELCOME)))
        assert isinstance(offer, Offer)
        return offer

    def restart(self) -> None:
        """The process is killed, and another one begins."""
        self.ledger._db.close()
        self.ledger = Ledger(self.ledger_path)
        self.desk.guard = self.guard = self.secrets.of_device(NAME, self.ledger)
        self.desk.restart()

    @property
    def ledger_path(self) -> Path:
        return self.desk.folder.parent / "ledger"


@pytest.fixture
def signed(tmp_path: Path) -> Iterator[Signed]:
    found = Signed(tmp_path)
    yield found
    found.desk.disk.close()


def test_a_device_obeys_what_the_server_signed(signed: Signed) -> None:
    offer = signed.offered(1)
    signed.inject(DOWN, signed.sealed(DOWN, Accepted(sha256=offer.blob.sha256, round=1)))
    assert signed.desk.disk.settled == 1
    assert not signed.guard.dropped


def test_a_directive_that_the_server_did_not_sign_is_said_and_dropped(signed: Signed) -> None:
    asked = signed.desk.publish(adapter(1))
    for payload in (
        dump(asked),
        signed.sealed(ROUND, asked, ATTACKER),
        signed.sealed(ROUND, asked, signed.secrets.devices[NAME]),
        signed.sealed(topics.directive("other"), asked),
        signed.sealed(topics.down(FLEET, "b"), asked),
    ):
        assert of(Offer, signed.inject(ROUND, payload)) == []
    assert signed.desk.trainer.specs == []
    assert signed.guard.dropped["forged"] >= 5
    assert any("must be signed by the server's key" in note for note in signed.desk.notes)


def test_what_the_server_said_to_another_device_says_nothing_to_this_one(signed: Signed) -> None:
    offer = signed.offered(1)
    elsewhere = signed.sealed(topics.down(FLEET, "b"), Accepted(sha256=offer.blob.sha256, round=1))
    signed.inject(DOWN, elsewhere)
    assert signed.desk.disk.outbox is not None


@pytest.mark.parametrize("restarted", [False, True])
def test_the_directive_of_an_old_round_has_no_effect(signed: Signed, restarted: bool) -> None:
    old = signed.sealed(ROUND, signed.desk.publish(adapter(1), round_number=1, run="first"))
    signed.inject(ROUND, old)
    signed.inject(ROUND, signed.sealed(ROUND, directive("gather", 0, run="second")))
    assert signed.desk.disk.run == "second"
    if restarted:
        signed.restart()
    signed.inject(ROUND, old)
    assert signed.desk.disk.run == "second"
    assert signed.guard.dropped["old"] >= 1


def test_a_device_that_starts_again_takes_the_directive_that_it_knows(signed: Signed) -> None:
    signed.offered(1)
    signed.restart()
    said = signed.desk.work()
    assert signed.guard.dropped == {}
    assert said != []


def test_an_old_answer_of_the_server_has_no_effect(signed: Signed) -> None:
    first = signed.offered(1)
    refusal = signed.sealed(DOWN, Rejected(code="unknown-client", reason="say hello", sha256=first.blob.sha256))
    signed.inject(DOWN, refusal)
    signed.inject(DOWN, signed.sealed(DOWN, WELCOME))
    assert [said for said in signed.inject(DOWN, refusal) if not isinstance(said, Presence)] == []
    assert signed.guard.dropped["old"] == 1


def test_a_device_that_is_revoked_leaves_and_says_why(signed: Signed) -> None:
    told = Rejected(code="revoked", reason="lost on a train")
    signed.desk.work()
    signed.desk.server.publish(DOWN, signed.sealed(DOWN, told))
    with pytest.raises(RejectedError, match="lost on a train"):
        signed.desk.work()


def test_nobody_else_can_send_a_device_away(signed: Signed) -> None:
    signed.desk.work()
    signed.inject(DOWN, signed.sealed(DOWN, Rejected(code="revoked", reason="gone"), ATTACKER))
    enrolment_of_another = Rejected(code="not-enrolled", reason="no", key=ATTACKER.public.hex())
    signed.inject(DOWN, signed.sealed(DOWN, enrolment_of_another))
    assert not signed.desk.client.left


def test_everything_that_a_device_says_is_signed_its_will_too(signed: Signed) -> None:
    signed.offered(1)
    key = signed.secrets.devices[NAME]
    signed.desk.transport.drop()
    topic = topics.status(FLEET, NAME)
    payload = signed.desk.broker.retained[topic]
    signing.verify(topic, signing.take_apart(topic, payload), key.public)
    assert b'"offline"' in payload


def test_a_server_that_changes_its_key_is_believed_under_both(tmp_path: Path) -> None:
    old, new, device = (SigningKey.from_seed(bytes([n]) * 32) for n in range(3))
    guard = DeviceGuard(FLEET, device, [old.public, new.public], Ledger(tmp_path / "l"))
    for key, counter in ((old, 1 << 50), (new, 1)):
        assert guard.open(DOWN, signing.seal(DOWN, dump(WELCOME), key, counter)) is not None
        guard.settle()


def test_a_signed_fleet_merges_what_an_open_one_does_though_its_processes_are_killed(folder: Path) -> None:
    secrets = Secrets(folder / "secrets", *PAIR)
    fleet = fleet_in(
        folder, "signed", "training.max_steps=1", "training.personal_steps=0", "wire.codec_up=fp32",
        fuses={"server": [40, 25], "a": [12, 9], "b": [20]}, guards=secrets.guards, stutter=3,
    ).run()  # fmt: skip
    assert fleet.merged().digest() == calm()[0]
    assert len(fleet.kills) == 5
    assert all(b'"sig"' in payload for topic, payload in fleet.broker.retained.items() if "/blob/" not in topic)
    assert isinstance(load(fleet.broker.retained[ROUND]), Directive)
