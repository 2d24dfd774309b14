"""The server over the broker in memory: what devices hear, what is merged, and what is durable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.config import Config
from edge_runtime.errors import AggregationError, ConfigError, UnknownCodecError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import changed
from edge_runtime.lora.factors import only
from edge_runtime.lora.slices import slice_of
from edge_runtime.wire import codec, topics
from edge_runtime.wire.memory import MemoryBroker
from edge_runtime.wire.messages import (
    Directive,
    Need,
    Report,
    Welcome,
    load,
)
from server import aggregators, standing
from server.aggregators.method import Update, load_state, save_state
from server.service import Service
from server.store import Store
from tests.runtime.toy import SHAPES, ToyTrainer
from tests.runtime.turns import Fuse, Killed, fleet_config
from tests.server.bench import FLEET, GOAL, Bench, Hand, accepted, training

# ── the directive ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_fleet_gathers_and_says_what_kind_of_adapter_it_wants(bench: Bench) -> None:
    found = bench.directive
    assert (found.phase, found.round, found.version, found.bands) == ("gather", 0, 0, ())
    assert found.adapter.model_dump() == {
        **bench.config.adapter.model_dump(),
        "max_held": 16,
        "hold_more": True,
        "equal_ranks": False,
        "beside": 0,
        "own": 0,
        "core": 0,
        "bits_up": 8.0,
        "bits_down": 8.0,
    }
    assert found.run == bench.service.state.run


def test_a_method_that_needs_all_that_a_device_holds_lets_it_hold_no_more(make: Callable[..., Bench]) -> None:
    found = make("aggregator.method=svd").directive.adapter
    assert (found.max_held, found.hold_more) == (8, False)


def test_devices_that_say_hello_are_welcome_and_enough_of_them_open_the_round(bench: Bench) -> None:
    first, second = Hand(bench, "a"), Hand(bench, "b")
    assert first.hello() == [Welcome(client="a", fleet=FLEET)]
    assert first.hello() == [Welcome(client="a", fleet=FLEET)], "said again"
    assert bench.directive.phase == "gather"
    assert second.hello() == [Welcome(client="b", fleet=FLEET)]
    found = bench.directive
    assert (found.phase, found.round, found.version, found.sample) == ("train", 1, 0, None)
    assert found.training.max_steps == bench.config.training.max_steps
    assert [(band.start, band.stop) for band in found.bands] == [(0, 4), (4, 8), (8, 12)]
    assert bench.broadcast().shapes == dict(SHAPES)
    assert all(not pair.product().any() for pair in bench.broadcast().values())


def test_a_round_of_a_few_names_them(make: Callable[..., Bench]) -> None:
    bench = make("rounds.fraction_train=0.5", "rounds.min_available_nodes=4")
    training(bench, dict.fromkeys("abcd", 2))
    assert [name for name in "abcd" if bench.directive.asks(name)] == list(bench.service.state.asked)
    assert len(bench.service.state.asked) == 2


def test_the_last_directive_asks_for_personal_steps_from_the_last_version(make: Callable[..., Bench]) -> None:
    near = ("training.proximal=0.1", "training.correction=0.2")
    bench = make("rounds.num_rounds=1", "training.personal_steps=7", *near)
    for hand in training(bench):
        assert (bench.directive.training.proximal, bench.directive.training.correction) == (0.1, 0.2)
        hand.deliver(*hand.train())
    found = bench.directive
    assert (found.phase, found.version, found.training.max_steps, found.sample) == ("finish", 1, 7, None)
    assert (found.training.proximal, found.training.correction) == (0, 0), "a personal adapter may leave the fleet's"
    for name in "ab":
        Hand(bench, name).say(Report(client=name, state="done", round=1))
    assert bench.service.state.phase == "over"
    assert bench.directive.phase == "finish", "whoever comes late may still finish"


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("aggregator.method=fedavg", ConfigError, "svd, zero_pad"),
        ("aggregator.momentum=0.9", ConfigError, "momentum"),
        ("wire.codec_up=int9", UnknownCodecError, "fp16, fp32, int1"),
        ("wire.codec_down=auto", UnknownCodecError, "fp16, fp32, int1"),
    ],
)
def test_names_that_do_not_exist_are_refused_at_once(
    tmp_path: Path, override: str, error: type[Exception], message: str
) -> None:
    store = Store(tmp_path)
    with pytest.raises(error, match=message):
        Service(fleet_config(override), MemoryBroker().connect("server"), store, say=print, record=print)
    store.close()


# ── uploads and merges ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_upload_is_asked_for_chunk_by_chunk_and_accepted_once_it_is_whole(bench: Bench) -> None:
    first, _ = training(bench)
    offer, payload = first.train()
    assert offer.blob.chunks > 3
    assert first.say(offer) == [Need(sha256=offer.blob.sha256, ranges=((0, offer.blob.chunks),))]
    assert first.send(offer, payload, [0, 2]) == []
    assert first.say(offer) == [], "what is still on its way need not be asked for"
    bench.wait()
    assert first.heard() == [Need(sha256=offer.blob.sha256, ranges=((1, 2), (3, offer.blob.chunks)))]
    assert first.send(offer, payload, [2, 0, 0]) == [], "twice is once"
    assert first.send(offer, payload) == [accepted(offer)]
    assert first.say(offer) == [accepted(offer)], "said again"
    assert first.send(offer, payload) == [], "chunks of an accepted update mean nothing any more"


@pytest.mark.parametrize("method", sorted(aggregators.METHODS))
@pytest.mark.parametrize("downlink", ["int8", "fp32"])
def test_the_merge_is_the_methods_with_what_devices_really_received(
    make: Callable[..., Bench], method: str, downlink: str
) -> None:
    """Over two rounds, so that the second begins with a product that a lossy downlink changes."""
    bench = make(f"aggregator.method={method}", f"wire.codec_down={downlink}", "wire.codec_up=fp32")
    hands = training(bench)
    for number in (1, 2):
        before = bench.store.version(number - 1)
        assert before is not None
        sent, updates = bench.broadcast(), []
        for hand in hands:
            offer, payload = hand.train()
            change, numbers = codec.decode_slice(payload)
            change = only(change, aggregators.build(method).asks(number).sent)
            received = Adapter({name: slice_of(name, sent[name], numbers[name], number - 1) for name in change})
            trained = Adapter({name: changed(received[name], pair) for name, pair in change.items()})
            updates.append(Update(hand.name, float(offer.examples), received, trained))
            assert hand.deliver(offer, payload)[-1:] == [accepted(offer)]
        after = bench.store.version(number)
        assert after is not None
        wanted = aggregators.build(method).combine(load_state(before.state), updates)
        assert after.state == save_state(wanted.state)
        assert [r["truncation"] for r in bench.records if r["event"] == "merge"][-1] == wanted.truncation
    assert bench.directive.phase == "finish"


def test_an_update_stays_valid_when_its_device_says_hello_with_another_plan(bench: Bench) -> None:
    """It restarted with less memory after its update was stored; the merge must not trip over its new slot."""
    first, second = training(bench)
    offer, payload = first.train()
    first.deliver(offer, payload)
    first.trainer = ToyTrainer(GOAL, rank=1)
    first.hello()
    second.deliver(*second.train())
    assert (bench.service.state.round, bench.service.state.version) == (2, 1)


def test_an_update_of_a_former_plan_is_not_lost(bench: Bench) -> None:
    """It trained, was killed, and planned anew before its outbox was heard."""
    first, second = training(bench)
    offer, payload = first.train()
    first.trainer = ToyTrainer(GOAL, rank=1)
    first.hello()
    assert first.deliver(offer, payload) == [accepted(offer)]
    second.deliver(*second.train())
    merge = next(record for record in bench.records if record["event"] == "merge")
    assert {layer["updates"] for layer in merge["layers"].values()} == {2}


def test_only_versions_that_somebody_may_still_read_stay_on_the_broker(make: Callable[..., Bench]) -> None:
    bench = make("rounds.num_rounds=5")
    hands = training(bench)
    known: list[set[str]] = []
    for _ in range(4):
        known.append({band.blob.sha256 for band in bench.directive.bands})
        for hand in hands:
            hand.deliver(*hand.train())
    retained = {topic.split("/")[3] for topic in bench.broker.retained if "/blob/" in topic}
    assert retained == {band.blob.sha256 for band in bench.directive.bands} | known[-1]
    assert bench.broker.retained[topics.directive(FLEET)]


def test_what_is_recorded_can_be_written_as_json(bench: Bench) -> None:
    for hand in training(bench):
        hand.deliver(*hand.train())
    kinds = [json.loads(json.dumps(record))["event"] for record in bench.records]
    assert kinds == ["update", "update", "merge"]
    merge = bench.records[-1]
    assert (merge["round"], merge["version"], len(merge["band_bytes"])) == (1, 1, 3)
    assert set(merge["layers"]) == set(SHAPES)


# ── lives of the server ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_restarted_server_goes_on_where_it_was(bench: Bench) -> None:
    first, second = training(bench)
    done, payload = first.train()
    first.deliver(done, payload)
    half, rest = second.train()
    second.say(half)
    second.send(half, rest, [0, 1])
    before, directive = bench.service.state, bench.directive
    bench.restart()
    assert bench.service.state == before.model_copy(update={"progress_at": bench.clock.now})
    assert bench.directive == directive
    assert first.say(done) == [accepted(done)]
    assert second.say(half) == []
    bench.wait()
    assert second.heard() == [Need(sha256=half.blob.sha256, ranges=((2, half.blob.chunks),))]
    assert second.send(half, rest, list(range(2, half.blob.chunks))) == [accepted(half)]
    assert bench.service.state.version == 1


def test_a_new_store_begins_a_new_life_of_the_fleet(tmp_path: Path) -> None:
    broker = MemoryBroker()
    runs = []
    for name in ("first", "second"):
        bench = Bench(tmp_path / name, broker=broker)
        runs.append(bench.directive.run)
        bench.store.close()
    assert runs[0] != runs[1]


def test_a_message_is_acknowledged_only_when_what_it_says_is_durable(bench: Bench) -> None:
    """The server dies before it stores a chunk; the broker delivers that chunk again, and the device says nothing."""
    first, _ = training(bench)
    offer, payload = first.train()
    first.say(offer)
    bench.store.close()
    bench.begin(Fuse(before="add_chunk"))
    with pytest.raises(Killed):
        first.send(offer, payload)
    bench.restart()
    assert first.heard() == [accepted(offer)]


def crash_before(bench: Bench, operation: str) -> None:
    """Let the last device deliver, and kill the server before an operation of the merge."""
    hands = [hand for hand in training(bench, dict.fromkeys("abcd", 2)) if hand.name in bench.service.state.asked]
    for hand in hands[:-1]:
        hand.deliver(*hand.train())
    offer, payload = hands[-1].train()
    hands[-1].say(offer)
    bench.store.close()
    bench.begin(Fuse(before=operation))
    with pytest.raises(Killed):
        hands[-1].send(offer, payload)
    bench.store.close()


def test_a_merge_that_was_begun_is_done_after_the_restart_and_only_once(make: Callable[..., Bench]) -> None:
    bench = make("rounds.fraction_train=0.5", "rounds.min_available_nodes=4")
    crash_before(bench, "save_version")
    heard: list[Directive] = []
    watcher = bench.broker.connect("watcher")
    watcher.subscribe(topics.directive(FLEET))
    before = bench.directive
    bench.begin()
    assert (bench.service.state.round, bench.service.state.version) == (2, 1)
    while (delivery := watcher.receive(0.0)) is not None:
        found = load(delivery.payload)
        assert isinstance(found, Directive)
        heard.append(found)
    assert [found.sample for found in heard[:2]] == [before.sample] * 2, "it asks nobody new meanwhile"
    merged = bench.store.version(1)
    bench.service.run(lambda: True, poll=0.0)
    assert bench.store.version(1) == merged
    assert bench.store.version(2) is None
    assert (bench.service.state.round, bench.service.state.version) == (2, 1), "running again merges nothing again"


def test_a_broker_that_forgot_everything_is_told_again(bench: Bench) -> None:
    training(bench)
    before = {topic: load for topic, load in bench.broker.retained.items() if "/c/" not in topic}
    turns = iter(["serve", "forget", "serve", "stop"])

    def stop() -> bool:
        turn = next(turns)
        if turn == "forget":
            bench.broker.restart(forget=True)
            assert bench.broker.retained == {}
        return turn == "stop"

    bench.service.run(stop, poll=0.0)
    assert bench.broker.retained == before


def test_a_store_that_lost_a_version_says_so(bench: Bench) -> None:
    training(bench)
    bench.store._db.execute("DELETE FROM versions")
    bench.store.save_rounds(standing.dump(bench.service.state.model_copy(update={"version": 5})))
    with pytest.raises(AggregationError, match=r"version 5 is not in the store; restore the store from a backup"):
        bench.restart()


def test_a_config_with_another_rank_keeps_the_version_it_has(tmp_path: Path) -> None:
    """A version is cut once; its bands do not depend on what the file says later."""
    bench = Bench(tmp_path)
    training(bench)
    before = bench.directive.bands
    bench.store.close()
    again = Bench(tmp_path, "wire.band_edges=[2, 6]", "aggregator.rank=6", broker=bench.broker)
    assert again.directive.bands == before
    again.store.close()


def test_the_config_names_all_that_a_directive_says(make: Callable[..., Bench]) -> None:
    overrides = ["training.batch_size=3", "training.seed=5", "adapter.scaling=1.5", "wire.codec_up=fp16"]
    overrides += ["adapter.slice=rotating", "adapter.allocation=spectrum"]
    bench = make(*overrides)
    found, config = bench.directive, bench.config
    assert isinstance(config, Config)
    whole = {"factors": "ab", "kept": 1.0, "tail_penalty": 0.0}
    training = config.training.model_dump(exclude={"personal_steps", "fleet_schedule"})
    assert found.training.model_dump() == {**training, **whole}
    assert (found.adapter.scaling, found.codec, found.num_rounds) == (1.5, "fp16", 2)
    assert (found.adapter.slice, found.adapter.allocation) == ("rotating", "spectrum")
