"""Simulated devices that really train, in one model of a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError, DataError
from simulation.settings import files_of, load
from tests.simulation.fleets import asked, events, run

pytest.importorskip("torch")

pytestmark = pytest.mark.torch

WORDS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [{"text": f"number {number}", "label": WORDS[number % 4]} for number in range(80)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(base: Path, data: Path) -> list[str]:
    return [
        "simulation.trainer=real", f"simulation.base={base}", f'simulation.data=["{data}"]',
        "simulation.precision=fp32",
        'adapter.target_modules=["q_proj","v_proj"]', "adapter.max_length=24", "training.max_steps=3",
        "training.learning_rate=2e-2", "training.batch_size=2", "device.eval_fraction=0.25", "device.eval_examples=2",
    ]  # fmt: skip


def settings_of(base: Path, data: Path) -> list[Path]:
    return files_of(load(None, asked(*settings(base, data)))[1])


def test_a_fleet_really_learns_and_devices_of_other_ranks_share_its_model(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    devices = '[{device = "raspberry-pi-5", count = 2, name = "pi"}, {device = "jetson-orin-nano", name = "orin"}]'
    found = run(tmp_path, *settings(tiny_base, data), "rounds.num_rounds=4", "simulation.finish=true", devices=devices)
    assert found.finished, found.why
    losses = [row.held_out for row in found.versions]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < losses[0]
    assert all(row.loss is None for row in found.versions)
    assert all(row.personal is not None for row in found.devices)


def test_it_is_known_how_many_tokens_of_what_devices_hold_out_the_model_would_say(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    found = run(tmp_path, *settings(tiny_base, data), "rounds.num_rounds=3", "simulation.finish=true")
    lines = [json.loads(line) for line in events(tmp_path).splitlines()]
    for row in found.versions:
        # Of those that trained from the version before.
        shares = [
            line["accuracy"] for line in lines if line["event"] == "update" and line["version"] == row.version - 1
        ]
        assert row.accuracy == pytest.approx(sum(shares) / len(shares))
    assert found.versions[-1].accuracy is not None
    assert found.versions[-1].accuracy > (found.versions[0].accuracy or 0.0), "'number' is easy to learn"
    told = {line["device"]: line for line in lines if line["event"] == "personal"}
    assert [(row.accuracy, row.personal_accuracy) for row in found.devices] == [
        (told[row.device]["accuracy"], told[row.device]["personal_accuracy"]) for row in found.devices
    ]
    assert all(0 < (row.personal_accuracy or 0) <= 1 for row in found.devices)


def test_it_is_told_who_has_which_classes(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    run(tmp_path, *settings(tiny_base, data), "rounds.num_rounds=1", "simulation.partition.kind=natural")
    lines = [json.loads(line) for line in events(tmp_path).splitlines()]
    told = {line["device"]: line["data"] for line in lines if line["event"] == "device"}
    assert [sum(count > 0 for count in counts) for counts in told.values()] == [1, 1, 1]
    assert all(len(counts) == len(WORDS) for counts in told.values())


def test_data_may_be_named_by_a_pattern(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    (data.parent / "more.jsonl").write_text(json.dumps({"text": "number 80", "label": "white"}))
    files = settings_of(tiny_base, data.parent / "*.jsonl")
    assert files == [data, data.parent / "more.jsonl"]
    with pytest.raises(ConfigError, match=r"simulation\.data: no file is called .*\*\.txt"):
        settings_of(tiny_base, data.parent / "*.txt")
    (data.parent / "more.jsonl").unlink()


@pytest.mark.slow
def test_processes_train_to_the_same_bytes(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    found = [
        run(tmp_path / engine, *settings(tiny_base, data), f"simulation.engine={engine}", "simulation.workers=2")
        for engine in ("inline", "processes")
    ]
    assert found[0].adapter == found[1].adapter
    assert events(tmp_path / "inline") == events(tmp_path / "processes")


def test_what_a_round_leaves_in_the_model_is_not_seen_by_the_next_device(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    """The update of a device is the same, whoever trained before it."""
    devices = '[{device = "raspberry-pi-5", count = 3, name = "pi"}]'
    chosen = (*settings(tiny_base, data), "rounds.num_rounds=1")
    run(tmp_path / "all", *chosen, devices=devices)
    slow = devices.replace('name = "pi"', 'name = "pi", straggler_sigma = 2.0')
    run(tmp_path / "order", *chosen, devices=slow)

    def losses(name: str) -> dict[str, tuple[float, float]]:
        lines = [json.loads(line) for line in events(tmp_path / name).splitlines()]
        updates = [line for line in lines if line["event"] == "update"]
        return {line["device"]: (line["held_out"], line["loss_last"]) for line in updates}

    assert list(losses("all")) != list(losses("order")), "they trained in another order"
    assert losses("all") == losses("order")


def test_a_device_without_examples_is_named(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    with pytest.raises(DataError, match=r"'pi-\d+' has \d of the 80 examples"):
        run(tmp_path, *settings(tiny_base, data), devices='[{device = "raspberry-pi-5", count = 79, name = "pi"}]')


def test_what_outlives_a_round_is_refused(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="carries nothing from round to round"):
        run(tmp_path, *settings(tiny_base, data), "training.correction=1.0")


@pytest.mark.parametrize(
    ("text", "said"), [("nonsense", "one JSON object"), ("[1]", "JSON object"), ("", "at least one row")]
)
def test_data_that_cannot_be_read_are_named(tmp_path: Path, tiny_base: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"bad\.jsonl.*{said}"):
        run(tmp_path / "out", *settings(tiny_base, path))


def test_the_surrogate_loads_no_torch() -> None:
    from tests.test_house import TORCH, loaded_by  # noqa: PLC0415  the house's own probe

    code = (
        "from pathlib import Path; import tempfile; from tests.simulation.fleets import run\n"
        "assert run(Path(tempfile.mkdtemp())).finished"
    )
    assert not loaded_by(code) & TORCH
