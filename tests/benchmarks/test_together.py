"""Devices that go through the model side by side learn what each would learn alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from benchmarks import wire_fleet
from benchmarks.methods_fleet import SMALLEST, Life, Rate, Way
from benchmarks.methods_settings import WAYS
from benchmarks.together import Judging, Together, Training, side_by_side
from benchmarks.together_labels import Labels
from benchmarks.wire_fleet import Fleet
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import cut, fresh_rows
from edge_runtime.train.classify import Labelled
from edge_runtime.train.terms import tail
from server import aggregators
from tests.benchmarks.learnt import assert_as_alone

pytestmark = pytest.mark.torch

HELD, D = 6, 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(40))]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT of random weights."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts of three labels, each with words that it prefers."""
    draw = np.random.default_rng(0)
    rows = ["sentence\tlabel"]
    for _ in range(700):
        label = int(draw.integers(3))
        words = draw.integers(12 * label, 12 * label + 20, draw.integers(3, 12)) % 40
        rows.append(" ".join(f"w{word}" for word in words) + f"\t{label}")
    (tmp_path / "train.tsv").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


def fleet_of(data: Path, encoder: Path) -> Fleet:
    return wire_fleet.build(data, 0, (1, 2, 4, 6), alpha=0.5, encoder=str(encoder))


def adapter_of(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    return Adapter(
        {
            name: Pair(
                fresh_rows(np.zeros((0, d_in), np.float32), rank, f"{seed}:{name}"),
                draw.normal(0, 0.1, (d_out, rank)).astype(np.float32),
            )
            for name, (d_out, d_in) in shapes.items()
        }
    )


def wanted_of(fleet: Fleet) -> list[Training]:
    """Devices of every kind: all rows, some rows, one factor, a penalty, fewer texts than a batch, other steps."""
    names = list(fleet.shapes)
    texts = [held for _, held in fleet.devices.values()]

    def one(rank: int, rows: range, at: int, **more: Any) -> Training:
        facts: dict[str, Any] = {"steps": 5, "order": 7 + at, "rate": 3e-3 * (at + 1)} | more
        return Training(
            adapter_of(fleet.shapes, rank, at), dict.fromkeys(names, rows), facts.pop("texts", texts[at % 4]), **facts
        )

    return [
        one(HELD, range(HELD), 0),
        one(HELD, range(2), 1),
        one(3, range(1, 3), 2),
        one(4, range(4), 3, factors="b"),
        one(4, range(4), 4, factors="a"),
        one(4, range(4), 5, kept=0.5, penalty=0.05),
        one(2, range(2), 6, texts=texts[0][:3]),
        one(2, range(2), 7, steps=2),
    ]


def alone(fleet: Fleet, one: Training) -> Adapter:
    terms = [tail(one.kept, one.penalty, fleet.classifier.live.scaling)] if one.penalty else []
    with wire_fleet.attached(fleet, one.seen, one.rows) as found:
        texts = [text for text in one.texts if isinstance(text, Labelled)]
        moved, _ = wire_fleet.train(found, texts, one.steps, one.order, one.rate, terms, one.factors)
    return moved


@pytest.mark.parametrize("devices", [3, 64])
def test_each_device_learns_what_it_would_learn_alone(data: Path, encoder: Path, devices: int) -> None:
    fleet = fleet_of(data, encoder)
    wanted = wanted_of(fleet)
    expected = [alone(fleet, one) for one in wanted]
    found = Together(Labels(fleet), devices).train(wanted)
    assert_as_alone(expected, found, noise=1e-7)
    assert not found[3]["encoder.layer.0.attention.self.query"].a.any()


def test_an_adapter_is_judged_as_it_is_alone(data: Path, encoder: Path) -> None:
    fleet = fleet_of(data, encoder)
    adapter = adapter_of(fleet.shapes, 4, 3)
    expected = wire_fleet.evaluate(fleet, adapter)
    assert Together(Labels(fleet)).judge(Judging(adapter, fleet.held_out)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", sorted(aggregators.METHODS))
def test_a_fleet_of_every_method_learns(data: Path, encoder: Path, method: str) -> None:
    fleet = fleet_of(data, encoder)
    way = next(way for way in WAYS.values() if way.method == method)
    if way.rank != SMALLEST:
        way = Way(method)
    rate = Rate(2e-2, 0.0)
    life = Life(fleet, way, steps=4, seed=0, rate=rate)
    zero = Adapter({name: cut(pair, 1) for name, pair in adapter_of(fleet.shapes, 1, 0).items()})
    idle = Adapter({name: Pair(pair.a, np.zeros_like(pair.b)) for name, pair in zero.items()})
    engine = Together(Labels(fleet))
    before, _ = engine.judge(Judging(idle, fleet.held_out))
    [ended] = side_by_side([life.run(3, 1)], engine)
    losses = [point.loss for point in ended.rounds.values()]
    assert sorted(ended.rounds) == [1, 2, 3]
    assert min(*losses, ended.personal.loss) < before
    assert ended.numbers_up > 0
    assert ended.numbers_down > 0


def test_lives_side_by_side_are_what_they_are_alone(data: Path, encoder: Path) -> None:
    ways = [Way("increment"), Way("hetlora"), Way("increment", 6, central=True), Way("fedsa_lora", SMALLEST)]

    def ends(ways: list[Way]) -> list[Any]:
        fleet = fleet_of(data, encoder)
        lives = [Life(fleet, way, steps=2, seed=0, rate=Rate(5e-3, 0.5)).run(2, 1) for way in ways]
        return side_by_side(lives, Together(Labels(fleet)))

    together = ends(ways)
    for way, found in zip(ways, together, strict=True):
        [alone] = ends([way])
        assert found.rounds[2].loss == pytest.approx(alone.rounds[2].loss, rel=1e-3)
        assert (found.numbers_up, found.numbers_down) == (alone.numbers_up, alone.numbers_down)


def test_a_fleet_that_diverges_ends_and_the_others_go_on(data: Path, encoder: Path) -> None:
    fleet = fleet_of(data, encoder)
    rates = (Rate(1e-3, 0.0), Rate(1e38, 0.0))
    lives = [Life(fleet, Way("increment"), steps=3, seed=0, rate=rate).run(2, 1) for rate in rates]
    good, bad = side_by_side(lives, Together(Labels(fleet)))
    assert np.isfinite(good.rounds[2].loss)
    assert bad.personal.loss == np.inf
