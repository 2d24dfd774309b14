"""The real trainer when memory runs out: it steps down, loses no step, and ends where it would have ended."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import DeviceMemoryError, PlanError
from edge_runtime.trainer import AdapterSpec, StepReport, Training
from tests.product import QUIET
from tests.train.devices import cache_in
from tests.train.tiny import random_adapter

pytest.importorskip("torch")

from edge_runtime.train import data
from edge_runtime.train.local import LocalSettings, LocalTrainer
from edge_runtime.train.planning import Owner
from profiles.terms import Overrides

pytestmark = pytest.mark.torch

TARGETS = ("q_proj", "v_proj")
SPEC = AdapterSpec(
    family="lora", target_modules=TARGETS, scaling=2.0, max_rank=8, max_held=8, hold_more=True, max_length=256
)
TRAINING = Training(
    max_steps=4, learning_rate=5e-3, batch_size=32, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=7
)
FIXED = Overrides(
    rank=4, held=4, layers_trained=3, trained_modules=TARGETS, precision="fp32", max_length=256, threads=1
)
WHOLE = replace(FIXED, micro_batch=32, gradient_checkpointing=False)


@pytest.fixture(scope="module")
def settings(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalSettings:
    """A device with long examples, that passes all of a batch through the model at once."""
    folder = tmp_path_factory.mktemp("device")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"say {n}", "completion": " ".join(words[(n * at + at * at) % 10] for at in range(50 + n))}
        for n in range(40)
    ]
    path = folder / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return LocalSettings(
        str(tiny_base), data.load_examples(str(path)), 0.1, 2, Owner(overrides=WHOLE), cache_in(folder)
    )


class Device:
    """A trainer that has planned and received, and what it said and did."""

    def __init__(self, settings: LocalSettings) -> None:
        self.said: list[str] = []
        self.steps: list[StepReport] = []
        self.plans: list[int] = []
        self.trainer = LocalTrainer(settings, say=self.said.append)
        self.introduce(None)

    def introduce(self, ceiling: int | None) -> None:
        """Plan below a ceiling, and receive."""
        self.trainer.introduce(SPEC, TRAINING, ceiling, self.plans.append)
        self.trainer.receive(random_adapter(self.trainer.ready.slot, 0, 0.05))

    def train(self, at_step: Any = None) -> Any:
        """A round."""

        def stepped(report: StepReport) -> None:
            self.steps.append(report)
            if at_step is not None:
                at_step(report)

        return self.trainer.train(TRAINING, 1, stepped, lambda: False)

    def leave_the_way_to_the_plan(self) -> None:
        """From now on the plan may cut a batch as it likes; no layer is recomputed instead."""
        cut = replace(FIXED, gradient_checkpointing=False)
        self.trainer._settings = replace(self.trainer._settings, owner=Owner(overrides=cut))


def test_a_step_down_that_trains_the_same_slice_goes_on_with_the_model_that_is_loaded(settings: LocalSettings) -> None:
    whole = Device(settings)
    plain = whole.train()
    device = Device(settings)
    live = device.trainer.ready.live

    def fail(report: StepReport) -> None:
        if report.step == 2:
            raise DeviceMemoryError("memory ran out")

    with pytest.raises(DeviceMemoryError):
        device.train(fail)
    device.leave_the_way_to_the_plan()
    device.introduce(device.plans[0] - 1)
    result = device.train()

    assert device.trainer.ready.live is live
    assert device.trainer.ready.plan.micro_batch < 32
    assert device.plans[1] < device.plans[0]
    assert [report.step for report in device.steps] == [1, 2, 3, 4], "no step is lost, and none is done twice"
    assert "going on after step 2 of 4" in device.said
    for name, pair in plain.change.items():
        # Equal but for the order in which a batch's gradients are summed.
        np.testing.assert_allclose(result.change[name].product(), pair.product(), rtol=1e-2, atol=1e-5)
    assert (result.examples, result.loss_first) == (plain.examples, pytest.approx(plain.loss_first, rel=1e-5))


def test_a_step_down_to_more_layers_recomputed_loses_neither_model_nor_bit(settings: LocalSettings) -> None:
    """The micro-batch is given; then fewer activations kept are all that can give way."""
    fixed = replace(FIXED, micro_batch=32, optimizer="adamw")
    free = replace(settings, owner=Owner(overrides=fixed))
    plain = Device(free).train()
    device = Device(free)
    live, before = device.trainer.ready.live, device.trainer.ready.plan

    def fail(report: StepReport) -> None:
        if report.step == 2:
            raise DeviceMemoryError("memory ran out")

    with pytest.raises(DeviceMemoryError):
        device.train(fail)
    device.introduce(device.plans[0] - 1)
    result = device.train()

    assert device.trainer.ready.live is live
    assert (before.recomputed_layers, device.trainer.ready.plan.recomputed_layers) == (0, 1)
    assert [report.step for report in device.steps] == [1, 2, 3, 4]
    assert result.change.digest() == plain.change.digest()


def test_another_optimiser_keeps_the_model_and_begins_the_round_anew(settings: LocalSettings) -> None:
    """Moments of another kind."""
    device = Device(settings)
    live = device.trainer.ready.live

    def fail(report: StepReport) -> None:
        raise DeviceMemoryError("memory ran out")

    with pytest.raises(DeviceMemoryError):
        device.train(fail)
    eight_bit = Owner(overrides=replace(WHOLE, optimizer="adamw_8bit"))
    device.trainer._settings = replace(device.trainer._settings, owner=eight_bit)
    device.introduce(device.plans[0] + 1)
    device.steps.clear()
    result = device.train()

    assert device.trainer.ready.live is live
    assert device.trainer.ready.plan.optimizer == "adamw_8bit"
    assert [report.step for report in device.steps] == [1, 2, 3, 4]
    assert result.change.digest() == Device(replace(settings, owner=eight_bit)).train().change.digest()


def test_an_interrupted_round_goes_on_bit_for_bit_with_the_plan_it_had(settings: LocalSettings) -> None:
    whole = Device(settings)
    plain = whole.train()
    device = Device(settings)

    def fail(report: StepReport) -> None:
        if report.step == 3:
            raise DeviceMemoryError("memory ran out")

    with pytest.raises(DeviceMemoryError):
        device.train(fail)
    device.introduce(None)

    assert device.train().change.digest() == plain.change.digest()


def test_memory_that_runs_out_in_the_middle_of_an_update_begins_the_round_anew(
    settings: LocalSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some parameters may have moved and others not: nobody could go on from there."""
    device = Device(settings)

    def fail(*_args: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("torch.optim.AdamW.step", fail)
        with pytest.raises(DeviceMemoryError, match="step 1 updated the adapter"):
            device.train()
    device.introduce(None)
    device.train()
    assert [report.step for report in device.steps] == [1, 2, 3, 4]


def test_another_slice_begins_the_round_anew(settings: LocalSettings) -> None:
    device = Device(settings)

    def fail(report: StepReport) -> None:
        raise DeviceMemoryError("memory ran out")

    with pytest.raises(DeviceMemoryError):
        device.train(fail)
    smaller = Owner(overrides=replace(WHOLE, rank=2, held=2, micro_batch=None))
    device.trainer._settings = replace(device.trainer._settings, owner=smaller)
    device.introduce(device.plans[0] - 1)
    device.steps.clear()
    device.train()

    assert [report.step for report in device.steps] == [1, 2, 3, 4]
    assert set(device.trainer.ready.slot.trained.values()) == {2}


def test_a_peak_beyond_what_the_device_bears_steps_down_before_the_kernel_kills(settings: LocalSettings) -> None:
    device = Device(settings)
    profile = device.trainer._profile
    assert profile is not None
    device.trainer._profile = replace(profile, memory_bearable_bytes=device.trainer._footprint.peak_bytes // 2)

    with pytest.raises(DeviceMemoryError, match=r"after step 1 the peak is \d+ MiB, and this device can bear \d+ MiB"):
        device.train()
    assert len(device.steps) == 1
    device.trainer._profile = profile
    device.introduce(None)
    device.train()
    assert [report.step for report in device.steps] == [1, 2, 3, 4]


def test_a_ceiling_below_the_smallest_plan_is_a_plan_error(settings: LocalSettings) -> None:
    device = Device(settings)
    with pytest.raises(PlanError, match="MiB"):
        device.introduce(64 << 20)


def test_the_plan_is_told_before_anything_large_is_loaded(settings: LocalSettings, tmp_path: Path) -> None:
    trainer = LocalTrainer(replace(settings, cache=tmp_path), say=lambda _: None)

    def told(peak: int) -> None:
        assert peak > 0
        assert not (tmp_path / "bases").exists(), "not even converted"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.introduce(SPEC, TRAINING, None, told)


# ── a real limit ──────────────────────────────────────────────────────────────────────────────────────────────────

LIMITED = """
import json, pickle, resource, sys
from tests.train.test_local_memory import Device, DeviceMemoryError
from edge_runtime.train import heap

device = Device(pickle.loads(bytes.fromhex(sys.stdin.read())))
device.leave_the_way_to_the_plan()
heap.steady(64 << 10)  # every tensor is mapped on its own: no hole of the heap, there by chance, can hold one
failures = []

def limit(report):
    # After two steps there are 16 MiB more than the process has mapped, and a step maps and unmaps 100.
    if report.step == 2:
        mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (16 << 20), -1))

def fails(work):
    try:
        return work()
    except DeviceMemoryError as error:
        failures.append(str(error))

result = fails(lambda: device.train(limit))
while result is None:
    device.introduce(device.plans[-1] - 1)
    result = fails(device.train)
print(json.dumps([failures, [step.step for step in device.steps], device.trainer.ready.plan.micro_batch]))
"""


@pytest.mark.story
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not enforce RLIMIT_AS")
def test_an_allocation_that_really_fails_steps_down_and_finishes_the_round(settings: LocalSettings) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED],
        input=pickle.dumps(settings).hex(),
        env={**os.environ, **QUIET},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    failures, steps, micro_batch = json.loads(ended.stdout.splitlines()[-1])

    assert failures
    assert all("memory ran out while step" in failure for failure in failures)
    assert steps == [1, 2, 3, 4]
    assert micro_batch < 32
