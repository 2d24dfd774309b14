"""Fleets of real processes on a real broker, by every family beside LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_runtime.lora.dense import is_dense, rows_of
from edge_runtime.lora.native import read_native_folder
from edge_runtime.wire.broker import Settings, start
from profiles.families import FAMILIES
from tests.product import Launcher
from tests.story.fleet import SETTINGS, TARGETS, Fleet, Part, write_examples
from tests.wire.conftest import require

pytestmark = [pytest.mark.story, pytest.mark.broker, pytest.mark.torch, pytest.mark.timeout(900)]

RATES = {"prefix": 0.1, "prompt": 0.05, "ia3": 0.02, "bitfit": 0.02, "layer_norm": 0.02}
"""Where that of LoRA is too low to see something in a few steps."""


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    """Ends what a test began."""
    with ExitStack() as stack:
        yield stack


LONGER = ("bottleneck", "ia3", "layer_norm", "prefix", "bitfit")
"""Of each kind of exchange, `make test` runs one: pairs with a vector, rows of a tensor, rows of tokens."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONGER)) for name in sorted(set(FAMILIES) - {"lora"})],
)
def test_a_fleet_of_processes_finishes_by_every_family(
    tiny_base: Path, tmp_path: Path, closing: ExitStack, name: str
) -> None:
    from edge_runtime.train.source import fingerprint, resolve  # noqa: PLC0415 - belongs to an extra

    require("nats")
    family = FAMILIES[name]
    broker = start("nats", store=tmp_path / "broker", settings=Settings(ack_wait_s=2.0), patience=90.0)
    closing.callback(broker.stop)
    processes = Launcher(tmp_path, {"EDGE_RUNTIME_CACHE": str(tmp_path / "cache")})
    closing.callback(processes.end)
    settings = (
        SETTINGS.replace(json.dumps(TARGETS), f'{json.dumps(family.examples)}\nfamily = "{name}"')
        .replace("rank = 16\n", "")
        .replace("[training]", f"[training]\nlearning_rate = {RATES.get(name, 0.005)}")
    )
    choices = (
        {"wide": ("device.rank=6",), "narrow": ("device.rank=2",)} if family.ranked else {"wide": (), "narrow": ()}
    )
    parts = tuple(
        Part(who, write_examples(tmp_path / f"{who}.jsonl", seed), tiny_base, chosen)
        for seed, (who, chosen) in enumerate(choices.items())
    )
    fleet = Fleet(processes, broker.address, fingerprint(resolve(str(tiny_base))), parts, settings=settings).begin()

    assert fleet.codes() == dict.fromkeys(("server", *choices), 0)
    versions, merged = fleet.merged()
    assert versions == [0, 1, 2]
    tensors = [pair for layer, pair in merged.items() if is_dense(layer)]
    assert tensors
    assert all(rows_of(pair) is not None and pair.a.any() for pair in tensors)
    done = {event["client"]: event for event in fleet.events("report") if event["state"] == "done"}
    assert sorted(done) == sorted(choices)
    for who, event in done.items():
        assert event["export_max_logit_diff"] <= 1e-4
        assert event["held_out"]["personal"] < event["held_out"]["base"]
        personal = read_native_folder(fleet.state_dir(who) / "personal").adapter
        assert personal.shapes == merged.shapes
