"""Fleets of real trainers, of every family, over the broker in memory: from the plan to the adapter that leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from edge_runtime.lora.dense import is_dense, rows_of  # noqa: E402 - after the check that torch is there
from edge_runtime.train import data  # noqa: E402 - as above
from edge_runtime.train.local import LocalTrainer  # noqa: E402 - as above
from edge_runtime.train.planning import Owner  # noqa: E402 - as above
from profiles.families import FAMILIES  # noqa: E402 - as above
from profiles.terms import Overrides  # noqa: E402 - as above
from tests.runtime.fleets import fleet_in, in_memory  # noqa: E402 - as above
from tests.story.fleet import write_examples  # noqa: E402 - as above
from tests.train.conftest import build_tiny_base, tiny_base  # noqa: E402 - as above
from tests.train.devices import settings_in  # noqa: E402 - as above

__all__ = ["build_tiny_base", "tiny_base"]

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

RATES = {"prefix": 0.5, "prompt": 0.1}
"""What is far from the loss, and small in a random model, learns at a higher rate."""


def device(folder: Path, base: Path, seed: int, rank: int | None, layers: int) -> Callable[[], Any]:
    folder.mkdir()
    plan = Overrides(
        rank=rank, held=rank, layers_trained=layers, precision="fp32", compute_dtype="fp32", micro_batch=2, threads=1
    )
    found = settings_in(folder, base, plan)
    examples = data.load_examples(str(write_examples(folder / "own.jsonl", seed)))
    return partial(LocalTrainer, replace(found, examples=examples, owner=Owner(overrides=plan)), say=lambda _: None)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_fleet_of_unequal_devices_learns_by_every_family(tiny_base: Path, tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    few, many = (2, 5) if family.ranked else (None, None)
    layers = 3 if family.modules == "embedding" else 2
    devices = {
        "many": device(tmp_path / "many", tiny_base, 0, many, 3),
        "few": device(tmp_path / "few", tiny_base, 1, few, layers),
    }
    with in_memory() as folder:
        fleet = fleet_in(
            folder, name,
            f"adapter.family={name}", f"adapter.target_modules={json.dumps(family.examples)}", "adapter.max_rank=5",
            "adapter.max_length=32", f"training.learning_rate={RATES.get(name, 0.02)}",
            "training.max_steps=6", "training.batch_size=2",
            "training.personal_steps=1", "training.warmup_steps=0", "rounds.num_rounds=3",
            devices=devices,
        ).run()  # fmt: skip
        merged = fleet.merged()
        trainers: Any = fleet.trainers
        personal = [lives[-1].personal() for lives in trainers.values()]
        updates = [record for record in fleet.records if record["event"] == "update"]
    losses = [[record["loss_first"] for record in updates if record["client"] == who] for who in devices]

    assert set(fleet.delivered) == set(devices)
    assert all(adapter.shapes == merged.shapes for adapter in personal)
    assert all(last < first for first, *_, last in losses)
    assert all(np.isfinite(pair.a).all() and pair.product().any() for pair in merged.values())
    for layer, pair in merged.items():
        if is_dense(layer):
            rows = rows_of(pair)
            assert rows is not None
            assert rows.tolist() == list(range(pair.shape[0]))
            # Rows that only the larger device trains have moved as well.
            assert pair.a.any(axis=1).all()
