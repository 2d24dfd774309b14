"""A fleet whose devices have bases of unlike precision, some with what they lost beside them: all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_runtime.lora.files import read_peft_folder
from edge_runtime.wire.broker import Settings, start
from tests.product import Launcher
from tests.story.fleet import SETTINGS, Fleet, Part, write_examples
from tests.wire.conftest import require

pytestmark = [pytest.mark.story, pytest.mark.broker, pytest.mark.torch, pytest.mark.timeout(900)]

REGAINED = 4
PRECISIONS = ("nf4", "int8", "bf16")


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    """Ends what a test began."""
    with ExitStack() as stack:
        yield stack


def test_devices_of_unlike_precision_share_an_adapter_and_none_of_what_they_regained(
    tiny_base: Path, tmp_path: Path, closing: ExitStack
) -> None:
    from edge_runtime.train.source import fingerprint, resolve  # noqa: PLC0415 - belongs to an extra

    require("nats")
    broker = start("nats", store=tmp_path / "broker", settings=Settings(ack_wait_s=2.0), patience=90.0)
    closing.callback(broker.stop)
    processes = Launcher(tmp_path, {"EDGE_RUNTIME_CACHE": str(tmp_path / "cache")})
    closing.callback(processes.end)
    settings = SETTINGS.replace("[adapter]", f"[adapter]\nregained = {REGAINED}")
    parts = tuple(
        Part(
            precision,
            write_examples(tmp_path / f"{precision}.jsonl", seed),
            tiny_base,
            (f"device.precision={precision}", "device.rank=4", "device.held=8"),
        )
        for seed, precision in enumerate(PRECISIONS)
    )
    fleet = Fleet(processes, broker.address, fingerprint(resolve(str(tiny_base))), parts, settings=settings).begin()

    assert fleet.codes() == dict.fromkeys(("server", *PRECISIONS), 0)
    assert fleet.updates() == [(number, name) for number in (1, 2) for name in sorted(PRECISIONS)]
    merged = fleet.merged()[1]
    assert {name.rsplit(".", 1)[1] for name in merged} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    done = {event["client"]: event for event in fleet.events("report") if event["state"] == "done"}
    assert {name: event["export_max_logit_diff"] <= 1e-4 for name, event in done.items()} == dict.fromkeys(
        PRECISIONS, True
    )
    folders = {
        name: sorted(path.parent.name for path in fleet.state_dir(name).glob("personal*/adapter_config.json"))
        for name in PRECISIONS
    }
    assert folders == {"nf4": ["personal", "personal-nf4"], "int8": ["personal"], "bf16": ["personal"]}
    alone, stacked = (read_peft_folder(fleet.state_dir("nf4") / name) for name in folders["nf4"])
    assert set(alone.ranks.values()) == {8}
    assert {stacked.ranks[name] for name in alone} == {8 + REGAINED}
    assert {stacked.ranks[name] for name in stacked.keys() - alone.keys()} == {REGAINED}
