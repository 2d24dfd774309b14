"""Against real brokers with the provisioned rules: what a device with valid credentials, or without, can't do."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread

import pytest

from edge_runtime.client import Client, Identity, will
from edge_runtime.errors import BrokerError, EdgeRuntimeError, RejectedError
from edge_runtime.provision.authority import Authority, Subject
from edge_runtime.provision.bundle import Order, provision, revoke
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Delivered
from edge_runtime.wire import signing, topics
from edge_runtime.wire.guard import DeviceGuard
from edge_runtime.wire.keys import read_public_keys, read_signing_key
from edge_runtime.wire.ledger import Ledger
from edge_runtime.wire.messages import Accepted, dump
from edge_runtime.wire.transport import Delivery, Transport, matches
from server.guard import ServerGuard
from server.roster import RosterFile
from server.service import Service
from server.state import State
from server.store import Store
from tests.provision.conftest import FLEET, Secured, taken
from tests.runtime.toy import ToyTrainer, targets
from tests.runtime.turns import fleet_config

pytestmark = pytest.mark.broker

SHA = "0" * 64
GOAL = targets()


class Recording:
    """A transport that remembers what was published through it: what an eavesdropper at the broker has."""

    def __init__(self, transport: Transport) -> None:
        self._transport, self.said = transport, list[tuple[str, bytes]]()

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self.said.append((topic, payload))
        self._transport.publish(topic, payload, retain=retain)


class Running:
    """A server and two devices over one secured broker, each in its thread, with its keys."""

    def __init__(self, secured: Secured, folder: Path) -> None:
        self.secured, self.folder = secured, folder
        self.notes: list[str] = []
        self.said: list[tuple[str, bytes]] = []
        self.errors: dict[str, BaseException] = {}
        self.end: State | None = None
        self.stopped = False
        self.dropped: dict[str, int] = {}

    def serve(self) -> None:
        secrets = self.secured.place / "server"
        ledger, store = Ledger(secrets / "signing.ledger"), Store(self.folder / "store")
        roster = RosterFile(secrets / "roster.json")
        guard = ServerGuard(FLEET, read_signing_key(secrets / "signing.key"), roster, ledger)
        transport = self.secured.connect("server")
        service = Service(
            fleet_config("rounds.num_rounds=1", "fleet.name=fleet"), transport, store,
            say=self.notes.append, record=lambda _: None, guard=guard,
        )  # fmt: skip
        self.end = service.run(lambda: self.stopped, poll=0.05)
        self.dropped = dict(guard.dropped)
        store.close()
        ledger.close()

    def take_part(self, name: str) -> None:
        secrets = self.secured.place / "devices" / name
        ledger, disk = Ledger(secrets / "signing.ledger"), DeviceState(self.folder / name)
        key, server = read_signing_key(secrets / "signing.key"), read_public_keys(secrets / "server.pub")
        guard = DeviceGuard(FLEET, key, server, ledger)
        transport = Recording(self.secured.connect(name, will(FLEET, name, guard)))
        client = Client(
            Identity(FLEET, name, chunk_bytes=400, guard=guard), transport=transport,  # type: ignore[arg-type]  # it passes all on
            state=disk, trainer=ToyTrainer(GOAL, rank=2), deliver=lambda: Delivered(name, 0.0), say=self.notes.append,
        )  # fmt: skip
        try:
            client.run(lambda: self.stopped, poll=0.05)
        finally:
            self.said += transport.said
            disk.close()
            ledger.close()

    def run(self, *names: str, patience: float = 60.0) -> None:
        """All of them to their end, or as far as they come in so many seconds."""
        work = {"server": self.serve, **{name: partial(self.take_part, name) for name in names}}
        threads = [Thread(target=self._noting, args=(who, call)) for who, call in work.items()]
        for thread in threads:
            thread.start()
        until = time.monotonic() + patience
        # The devices first: without one that was refused, the fleet never ends.
        for thread in reversed(threads):
            thread.join(0.0 if self.errors else max(0.0, until - time.monotonic()))
        self.stopped = True
        for thread in threads:
            thread.join(20)

    def _noting(self, who: str, work: Callable[[], None]) -> None:
        try:
            work()
        except EdgeRuntimeError as error:
            self.errors[who] = error
            self.stopped = self.stopped or who == "server"


def test_a_fleet_lives_over_mutual_tls_with_signatures_and_what_it_said_cannot_be_said_again(
    secured: Secured, tmp_path: Path
) -> None:
    running = Running(secured, tmp_path)
    # On a busy machine a message that is said again may take two turns of half a minute.
    running.run("a", "b", patience=200.0)
    assert running.errors == {}
    assert running.end is not None
    assert (running.end.phase, running.end.version) == ("over", 1), running.notes
    assert running.dropped == {}

    # Whoever has listened says it all again, with the server's own credentials: as the broker's operator could.
    ledger = Ledger(secured.place / "server" / "signing.ledger")
    key, roster = read_signing_key(secured.place / "server" / "signing.key"), secured.place / "server" / "roster.json"
    guard = ServerGuard(FLEET, key, RosterFile(roster), ledger)
    control = [(topic, payload) for topic, payload in running.said if matches(topics.up(FLEET, "+"), topic)]
    assert {topic for topic, _ in control} == {topics.up(FLEET, "a"), topics.up(FLEET, "b")}
    # A broker may bring a device's farewell before its last reports, which the server then never took.
    offers = {topic: at for at, (topic, payload) in enumerate(control) if b'"type":"offer"' in payload}
    older = [(topic, payload) for at, (topic, payload) in enumerate(control) if at < offers[topic]]
    assert len(older) > 10
    assert [guard.open(topic, payload) for topic, payload in older] == [None] * len(older)
    assert guard.dropped == {"old": len(older)}
    ledger.close()


def test_a_device_reads_and_writes_its_own_topics_alone(secured: Secured) -> None:
    server, one, other = (secured.connect(who) for who in ("server", "a", "b"))
    for pattern in (topics.up(FLEET, "+"), topics.status(FLEET, "+"), topics.upload(FLEET, "+", "+")):
        server.subscribe(pattern)
    for pattern in (topics.down(FLEET, "a"), topics.directive(FLEET), topics.broadcast(FLEET, SHA)):
        one.subscribe(pattern)
    forbidden = ["#", "+/+/#", topics.down(FLEET, "a"), topics.up(FLEET, "+"), "$MQTT/#", "$SYS/#", "edge/other/round"]
    for pattern in (*forbidden, topics.directive(FLEET)):
        other.subscribe(pattern)

    server.publish(topics.directive(FLEET), b"the directive", retain=True)
    server.publish(topics.down(FLEET, "a"), b"for a alone")
    assert server.flush(10)
    assert [(found.topic, found.payload) for found in taken(other)] == [(topics.directive(FLEET), b"the directive")]
    assert {found.payload for found in taken(one)} == {b"the directive", b"for a alone"}

    evil: list[tuple[str, bool]] = [
        (topics.up(FLEET, "a"), False), (topics.status(FLEET, "a"), True), (topics.upload(FLEET, "a", SHA, 0), False),
        (topics.directive(FLEET), True), (topics.broadcast(FLEET, SHA, 0), True), (topics.down(FLEET, "a"), False),
        (topics.directive("other"), True), (topics.up("other", "b"), False), ("$MQTT/msgs/x", False),
    ]  # fmt: skip
    for topic, retain in evil:
        other.publish(topic, b"evil", retain=retain)
    other.publish(topics.up(FLEET, "b"), b"its own")
    other.publish(topics.upload(FLEET, "b", SHA, 0), b"its own chunk")
    assert other.flush(10)
    assert {found.payload for found in taken(server)} == {b"its own", b"its own chunk"}
    assert taken(one) == []
    one.close()
    again = secured.connect("a")
    again.subscribe(topics.directive(FLEET))
    assert {found.payload for found in taken(again)} == {b"the directive"}, "nothing evil is retained"


def test_no_device_receives_by_the_client_id_of_another(secured: Secured) -> None:
    one = secured.connect("a")
    one.subscribe(topics.down(FLEET, "a"))
    thief = secured.connect("b", client_id=f"edge-{FLEET}-a")
    thief.subscribe(topics.down(FLEET, "a"))
    server = secured.connect("server")
    server.publish(topics.down(FLEET, "a"), b"for a alone")
    assert server.flush(10)
    assert taken(thief, 2.0) == []


def test_without_a_certificate_nobody_comes_in(secured: Secured) -> None:
    told = secured.refused("a", tls_cert=None, tls_key=None)
    assert "certificate" in told
    assert "certfile" in told


def test_an_expired_certificate_is_named_with_its_dates_before_anything_is_sent(secured: Secured) -> None:
    authority, folder = Authority(secured.place / "authority", FLEET), secured.place / "devices" / "a"
    authority.issue(Subject("a", "client", days=-1), folder / "tls.crt", folder / "tls.key", anew=True)
    told = secured.refused("a")
    assert f"this client's certificate {folder / 'tls.crt'} has expired: the certificate of 'a'" in told
    assert "valid 20" in told


def test_another_authority_is_trusted_by_neither_end(secured: Secured, tmp_path: Path) -> None:
    provision(Order(tmp_path / "elsewhere", fleet="elsewhere", devices=("a",)))
    other = tmp_path / "elsewhere" / "devices" / "a"
    told = secured.refused("a", tls_cert=other / "tls.crt", tls_key=other / "tls.key")
    assert "refused us" in told
    assert "the certificate of 'a', signed by 'authority of elsewhere'" in told
    told = secured.refused("a", tls_ca=other / "ca.crt")
    assert "the certificate of 'localhost', signed by 'authority of fleet'" in told
    assert "did not sign" in told


def test_a_broker_under_another_name_is_told_from_the_right_one(secured: Secured) -> None:
    secured.broker.stop()
    authority, folder = Authority(secured.place / "authority", FLEET), secured.place / "broker"
    authority.issue(Subject("broker.lan", "broker", ["broker.lan"]), folder / "broker.crt", folder / "broker.key")
    secured.broker.start()
    told = secured.refused("a")
    assert "which is for 'broker.lan' and not for 'localhost'" in told


@pytest.mark.parametrize(("days", "said"), [(-1, "which has expired")])
def test_an_expired_certificate_of_the_broker_ends_in_one_line(secured: Secured, days: int, said: str) -> None:
    secured.broker.stop()
    authority, folder = Authority(secured.place / "authority", FLEET), secured.place / "broker"
    subject = Subject("localhost", "broker", ["localhost"], days)
    authority.issue(subject, folder / "broker.crt", folder / "broker.key", anew=True)
    secured.broker.start()
    told = secured.refused("a")
    assert said in told
    assert "this machine's clock says" in told
    assert "the certificate of 'localhost', signed by 'authority of fleet', valid" in told
    assert len([event for event in secured.events if "trying again" in event]) == 0


def test_a_revoked_device_is_refused_by_the_server_at_once_and_by_the_broker_after_its_restart(
    secured: Secured, tmp_path: Path
) -> None:
    revoke(secured.place, "a", "lost on a train")
    running = Running(secured, tmp_path)
    running.run("a")
    assert isinstance(running.errors["a"], RejectedError | BrokerError)
    if secured.broker.kind == "mosquitto":
        assert "lost on a train" in str(running.errors["a"])
    secured.restart()
    assert "refused us" in secured.refused("a")


def test_a_replayed_update_is_let_through_by_no_broker_under_another_name(secured: Secured) -> None:
    """The rules stop it on the way, and the seal would stop it at the server."""
    folder = secured.place / "devices"
    key = read_signing_key(folder / "a" / "signing.key")
    old = signing.seal(topics.up(FLEET, "a"), dump(Accepted(sha256=SHA, round=1)), key, 5)
    server, other = secured.connect("server"), secured.connect("b")
    server.subscribe(topics.up(FLEET, "+"))
    other.publish(topics.up(FLEET, "a"), old)
    other.publish(topics.up(FLEET, "b"), old)
    assert other.flush(10)
    [found] = taken(server)
    assert isinstance(found, Delivery)
    ledger = Ledger(secured.place / "server" / "signing.ledger")
    roster = RosterFile(secured.place / "server" / "roster.json")
    guard = ServerGuard(FLEET, read_signing_key(secured.place / "server" / "signing.key"), roster, ledger)
    with pytest.raises(EdgeRuntimeError, match="must be signed by key"):
        guard.open(found.topic, found.payload)
    ledger.close()
