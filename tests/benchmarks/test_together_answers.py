"""Devices of a causal model that go side by side learn what each would learn in the product's own training loop."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from benchmarks import answers_fleet
from benchmarks.answers_fleet import BATCH, LENGTH, MODULES, ROWS, SCALING, Fleet
from benchmarks.methods_fleet import Life, Rate, Way
from benchmarks.together import Judging, Together, Training, side_by_side
from benchmarks.together_answers import Answers
from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.algebra import change
from edge_runtime.train import live, loop
from edge_runtime.train.data import Tokenised
from edge_runtime.train.fresh import slot_for
from edge_runtime.train.loss import completion_loss
from edge_runtime.train.terms import tail
from tests.benchmarks.learnt import assert_as_alone
from tests.train import tiny

pytestmark = pytest.mark.torch

HELD = 6


@pytest.fixture
def fleet(tiny_base: Path) -> Fleet:
    """Four devices; adapted are the last two of three blocks."""
    model = tiny.plain_model(tiny_base)
    slot = slot_for(model, [f"layers.{at}.{module}" for at in (1, 2) for module in MODULES], 1)
    devices = {f"device-{at}": (rank, list(tiny.examples(11, at))) for at, rank in enumerate((1, 2, 4, 6))}
    return Fleet(model, "tiny", devices, list(tiny.examples(20, 99)), dict(slot.shapes), taking_part=2)


def adapter_of(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    slot = Slot({name: LayerSlot(*shape, held=rank, trained=rank) for name, shape in shapes.items()})
    return tiny.random_adapter(slot, seed, size=0.1)


def wanted_of(fleet: Fleet) -> list[Training]:
    """Devices of every kind: all rows, some rows, one factor, a penalty, fewer texts than a batch, other steps."""
    texts = [own for _, own in fleet.devices.values()]

    def one(rank: int, rows: range, at: int, **more: Any) -> Training:
        facts: dict[str, Any] = {"steps": 4, "order": 7 + at, "rate": 3e-3 * (at + 1)} | more
        rows_of: Mapping[str, Sequence[int]] = dict.fromkeys(fleet.shapes, rows)
        return Training(adapter_of(fleet.shapes, rank, at), rows_of, facts.pop("texts", texts[at % 4]), **facts)

    return [
        one(HELD, range(HELD), 0),
        one(HELD, range(2), 1),
        one(3, range(1, 3), 2),
        one(4, range(4), 3, factors="b"),
        one(4, range(4), 4, kept=0.5, penalty=0.05),
        one(2, range(2), 5, texts=texts[0][:3]),
        one(2, range(2), 6, steps=2),
    ]


def alone(fleet: Fleet, one: Training) -> Adapter:
    """By the product's loop, over the whole model."""
    slot = Slot({name: LayerSlot(*pair.shape, pair.rank, len(one.rows[name])) for name, pair in one.seen.items()})
    found = live.attach(fleet.model, slot, scaling=fleet.scaling)
    live.load_adapter(found, one.seen, one.rows)
    before = live.read_trained(found)
    terms = [tail(one.kept, one.penalty, fleet.scaling)] if one.penalty else []
    task = loop.LocalTask(
        steps=one.steps, learning_rate=one.rate, micro_batch=BATCH, warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, seed=one.order, schedule="linear", factors=one.factors,
    )  # fmt: skip
    loop.train_round(found, [text for text in one.texts if isinstance(text, Tokenised)], task, terms=terms)
    after = live.read_trained(found)
    live.detach(found)
    return Adapter({name: change(after[name], before[name]) for name in after})


@pytest.mark.parametrize("devices", [1, 3, 64])
def test_each_device_learns_what_the_product_would_teach_it_alone(fleet: Fleet, devices: int) -> None:
    wanted = wanted_of(fleet)
    expected = [alone(fleet, one) for one in wanted]
    found = Together(Answers(fleet), devices).train(wanted)
    assert_as_alone(expected, found, noise=1e-6)


def test_an_adapter_is_judged_by_the_tokens_of_answers(fleet: Fleet) -> None:
    adapter = adapter_of(fleet.shapes, 4, 3)
    slot = Slot({name: LayerSlot(*pair.shape, pair.rank, pair.rank) for name, pair in adapter.items()})
    found = live.attach(fleet.model, slot, scaling=fleet.scaling)
    live.load_adapter(found, adapter)
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for text in fleet.held_out:
            ids, labels = torch.tensor([text.input_ids]), torch.tensor([text.labels])
            total += float(completion_loss(found.model, ids, labels).total)
            said = found.model(ids).logits[0, :-1].argmax(dim=-1)
            right += int((said == labels[0, 1:]).sum())
            count += text.learned
    live.detach(found)
    expected = (total / count, right / count)
    assert Together(Answers(fleet)).judge(Judging(adapter, fleet.held_out)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", [Way("increment"), Way("fed_sb"), Way("flora")])
def test_a_fleet_learns_to_answer(fleet: Fleet, way: Way) -> None:
    engine = Together(Answers(fleet))
    idle = Adapter({name: Pair(pair.a, 0 * pair.b) for name, pair in adapter_of(fleet.shapes, 1, 0).items()})
    before, _ = engine.judge(Judging(idle, fleet.held_out))
    [ended] = side_by_side([Life(fleet, way, steps=6, seed=0, rate=Rate(5e-3, 0.0)).run(3, 1)], engine)
    assert sorted(ended.rounds) == [1, 2, 3]
    assert ended.rounds[3].loss < before
    assert ended.numbers_up > 0


def test_what_the_blocks_below_made_of_a_text_is_kept(fleet: Fleet, tmp_path: Path) -> None:
    judging = Judging(adapter_of(fleet.shapes, 2, 1), fleet.held_out)
    first = Together(Answers(fleet, keep=tmp_path)).judge(judging)
    kept = sorted(tmp_path.rglob("*.npy"))
    assert len(kept) == len({text.input_ids for text in fleet.held_out})
    fleet.model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))  # nobody goes through it again
    assert Together(Answers(fleet, keep=tmp_path)).judge(judging) == pytest.approx(first, rel=1e-6)


def _rows(folder: Path, task: int, words: int) -> None:
    for side, count in (("train", ROWS + 20), ("eval", 5)):
        lines = [
            {"instruction": f"task {task}", "input": "word " * words + str(row), "output": f"{side} {row}"}
            for row in range(count)
        ]
        path = folder / f"client_{task:02}.{side}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def test_a_fleet_has_the_tasks_whose_rows_need_not_be_cut_each_on_one_device(tiny_base: Path, tmp_path: Path) -> None:
    for task, words in enumerate((1, 500, 2, 3)):
        _rows(tmp_path, task, words)
    fleet = answers_fleet.build(tmp_path, 0, (1, 2), model=str(tiny_base), blocks=2)
    assert sorted(len(texts) for _, texts in fleet.devices.values()) == [ROWS, 2 * ROWS]
    assert all(len(text.input_ids) <= LENGTH for _, texts in fleet.devices.values() for text in texts)
    assert len(fleet.held_out) == 3 * 5
    assert {name.split(".")[2] for name in fleet.shapes} == {"1", "2"}
    assert fleet.scaling == SCALING
