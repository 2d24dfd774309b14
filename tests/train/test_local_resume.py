"""The real trainer killed at any moment: a round costs at most an interval more, and ends in the same bytes."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import RoundError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import decompose, to_pair
from edge_runtime.trainer import AdapterSpec, LocalResult, StepReport, Training
from tests.product import QUIET
from tests.train.tiny import random_adapter

torch = pytest.importorskip("torch")

from edge_runtime.train.families import get  # noqa: E402 - as above
from edge_runtime.train.keeping import FINISHED, IN_PROGRESS, Keeping  # noqa: E402 - as above
from edge_runtime.train.local import LocalSettings, LocalTrainer  # noqa: E402 - as above
from edge_runtime.train.loss import unwrap  # noqa: E402 - as above
from edge_runtime.train.planning import Owner  # noqa: E402 - as above
from profiles.terms import Overrides  # noqa: E402 - as above
from tests.train.devices import settings_in  # noqa: E402 - as above

pytestmark = pytest.mark.torch

TARGETS = ("q_proj", "v_proj")
SPEC = AdapterSpec(
    family="lora", target_modules=TARGETS, scaling=2.0, max_rank=64, max_held=64, hold_more=True, max_length=32
)
TRAINING = Training(
    max_steps=14, learning_rate=5e-3, batch_size=2, warmup_steps=2, weight_decay=0.01, max_grad_norm=1.0, seed=7,
    schedule="cosine", lora_plus_ratio=2.0,
)  # fmt: skip
LONG = TRAINING.model_copy(update={"max_steps": 60})
"""Of some seconds, so that a kill falls into it."""
EVERY = 3
# Rank 64 on the query projections, whose factors then are large enough for moments in 8 bits.
PLANNED = Overrides(rank=64, held=64, precision="fp32", micro_batch=1, threads=1, compute_dtype="fp32")


@pytest.fixture(scope="module")
def settings(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalSettings:
    """A device that keeps nothing on disk."""
    return settings_in(tmp_path_factory.mktemp("device"), tiny_base, PLANNED)


def keeping(settings: LocalSettings, folder: Path) -> LocalSettings:
    return replace(settings, keeping=Keeping(folder, EVERY, 3600.0))


class Device:
    """A trainer that has planned and received."""

    def __init__(self, settings: LocalSettings, training: Training = TRAINING) -> None:
        self.said: list[str] = []
        self.steps: list[StepReport] = []
        self.training = training
        self.trainer = LocalTrainer(settings, say=self.said.append)
        self.trainer.introduce(SPEC, training, None, lambda _: None)
        self.receive(random_adapter(self.trainer.ready.slot, 0, 0.05))

    def receive(self, adapter: Adapter) -> None:
        self.trainer.receive(adapter)

    def train(self, round_number: int = 1, stop_after: int | None = None, at_step: Any = None) -> LocalResult:
        """A round, or the beginning of one."""
        self.steps.clear()

        def stepped(report: StepReport) -> None:
            self.steps.append(report)
            if at_step is not None:
                at_step(report)

        return self.trainer.train(
            self.training, round_number, stepped, lambda: stop_after is not None and len(self.steps) >= stop_after
        )

    @property
    def numbers(self) -> list[int]:
        """The steps that were reported."""
        return [report.step for report in self.steps]


# ── a real kill ───────────────────────────────────────────────────────────────────────────────────────────────────

KILLED = """
import json, pickle, sys
from tests.train.test_local_resume import LONG, Device

device = Device(pickle.loads(bytes.fromhex(sys.stdin.read())), LONG)
print(json.dumps("ready"), flush=True)
result = device.train(at_step=lambda report: print(json.dumps([report.step, report.loss.hex()]), flush=True))
print(json.dumps(result.change.digest()), flush=True)
"""


@dataclass(frozen=True)
class Run:
    """What one process said before it ended.

    Attributes:
        losses: by step, in hexadecimal digits.
        digest: of the change; empty where the process was killed first.
    """

    losses: dict[int, str]
    digest: str


def run(settings: LocalSettings, kill_after: int | None, delay: float) -> Run:
    """One process; SIGKILL `delay` seconds after it reported `kill_after` steps."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **QUIET},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(pickle.dumps(settings).hex())
    process.stdin.close()
    losses: dict[int, str] = {}
    digest = ""
    for line in process.stdout:
        said = json.loads(line)
        if isinstance(said, list):
            losses[said[0]] = said[1]
        elif said != "ready":
            digest = said
        if kill_after is not None and len(losses) >= kill_after:
            time.sleep(delay)
            process.kill()
            kill_after = None  # what it has said until then is read to the end
    process.stdout.close()
    assert process.wait() in {0, -signal.SIGKILL}
    return Run(losses, digest)


@pytest.mark.story
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize(("precision", "optimizer", "seed"), [("fp32", "adamw", 1), ("nf4", "adamw_8bit", 2)])
def test_kill_9_at_any_moment_costs_an_interval_and_no_bit(
    settings: LocalSettings, tmp_path: Path, precision: Any, optimizer: str, seed: int
) -> None:
    chosen = replace(settings, owner=Owner(overrides=replace(PLANNED, precision=precision, optimizer=optimizer)))
    whole = Device(chosen, LONG)
    expected = whole.train()
    losses = {report.step: report.loss.hex() for report in whole.steps}
    draw = random.Random(seed)  # at which moments: the same in each repetition
    kept, last, killed, found = keeping(chosen, tmp_path), 0, 0, Run({}, "")
    for kill_after in (draw.randint(1, 9), draw.randint(1, 9), None):
        found = run(kept, kill_after, draw.uniform(0.0, 0.05))
        killed += not found.digest
        if not found.digest:
            assert found.losses, "it was killed after a step"
        if found.losses:
            # The first step may follow one that was kept and not reported any more.
            assert last - EVERY < min(found.losses) <= last + 2, "at most an interval is done again, none is left out"
            assert found.losses == {step: losses[step] for step in found.losses}
            last = max(found.losses)
    assert killed, "no process was killed before its end: the round is too short"
    assert found.digest == expected.change.digest()

    # Once more, as after a kill between the last step and the outbox: nothing is trained again.
    again = Device(kept, LONG)
    assert again.train().change.digest() == expected.change.digest()
    assert again.numbers == []
    assert "going on after step 60 of 60" in again.said
    assert [path.name for path in tmp_path.iterdir()] == [FINISHED]


# ── in one process ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_round_that_was_asked_to_stop_loses_no_step_in_another_process(
    settings: LocalSettings, tmp_path: Path
) -> None:
    plain = Device(settings).train()
    stopped = Device(keeping(settings, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        stopped.train(stop_after=5)
    resumed = Device(keeping(settings, tmp_path))
    result = resumed.train()

    assert resumed.numbers == list(range(6, 15))
    assert result.change.digest() == plain.change.digest()
    assert (result.examples, result.loss_first, result.loss_last) == (
        plain.examples, plain.loss_first, plain.loss_last,
    )  # fmt: skip


@pytest.mark.parametrize("change", ["training", "round", "adapter", "data", "precision", "optimizer"])
def test_the_state_of_another_round_plan_or_data_set_is_told_about_and_ignored(
    settings: LocalSettings, tmp_path: Path, change: str
) -> None:
    kept = keeping(settings, tmp_path)
    stopped = Device(kept)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(stop_after=2)
    training = TRAINING.model_copy(update={"max_steps": 2, "seed": 8 if change == "training" else TRAINING.seed})
    if change == "data":
        kept = replace(kept, examples=tuple(reversed(kept.examples)))
    if change == "precision":
        kept = replace(kept, owner=Owner(overrides=replace(PLANNED, precision="int8")))
    if change == "optimizer":
        kept = replace(kept, owner=Owner(overrides=replace(PLANNED, optimizer="adamw_8bit")))
    other = Device(kept, training)
    if change == "adapter":
        other.receive(random_adapter(other.trainer.ready.slot, 1, 0.05))
    other.train(2 if change == "round" else 1)

    assert other.numbers == [1, 2]
    assert any("another round, plan or data set" in said for said in other.said)


def test_a_damaged_state_is_told_about_and_the_round_begins_anew(settings: LocalSettings, tmp_path: Path) -> None:
    stopped = Device(keeping(settings, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        stopped.train(stop_after=2)
    path = tmp_path / IN_PROGRESS
    path.write_bytes(path.read_bytes()[:-1])
    again = Device(keeping(settings, tmp_path))
    again.train()

    assert again.numbers[0] == 1
    assert any("damaged and is ignored" in said for said in again.said)


def test_a_number_that_is_not_finite_ends_the_round_and_keeps_the_steps_before_it(
    settings: LocalSettings, tmp_path: Path
) -> None:
    plain = Device(settings).train()
    broken = Device(keeping(settings, tmp_path))
    weight = unwrap(broken.trainer.ready.live.model).get_submodule("model.layers.1.input_layernorm").weight

    def poison(report: StepReport) -> None:
        if report.step == 5:
            with torch.no_grad():
                weight[0] = math.nan

    with pytest.raises(
        RoundError, match=r"step 6: expected a finite loss, found nan.*'model\.layers\.1\.input_layernorm"
    ):
        broken.train(at_step=poison)
    again = Device(keeping(settings, tmp_path))

    assert again.train().change.digest() == plain.change.digest()
    assert again.numbers[0] == 6


def factorised_anew(device: Device) -> Adapter:
    """What a server would make of the device's own adapter: the same products in its own form."""
    found = get("lora").read_all(device.trainer.ready.live)
    return Adapter({name: to_pair(decompose([(1.0, pair)]), 0, pair.rank) for name, pair in found.items()})


def test_moments_that_are_carried_over_survive_a_restart_in_the_middle_of_the_next_round(
    settings: LocalSettings, tmp_path: Path
) -> None:
    """Rank 4: what is left of a factorisation at full rank has little in common with the one before."""
    small = replace(settings, owner=Owner(overrides=replace(PLANNED, rank=4, held=4)))
    training = TRAINING.model_copy(update={"carry_moments": True})
    digests = set()
    for way in ("memory", "disk", "restarted", "without"):
        folder = tmp_path / way
        chosen = small if way == "memory" else keeping(small, folder)
        device = Device(chosen, training.model_copy(update={"carry_moments": way != "without"}))
        first = device.train().change.digest()
        adapter = factorised_anew(device)
        if way == "restarted":
            device = Device(chosen, training)
            device.receive(adapter)
            with pytest.raises(KeyboardInterrupt):
                device.train(2, stop_after=4)
            device = Device(chosen, training)
        device.receive(adapter)
        digests.add((first, device.train(2).change.digest(), way == "without"))
        assert any("remembers the last round" in said for said in device.said) == (way in {"memory", "disk"})

    assert len(digests) == 2
    assert len({second for _, second, _ in digests}) == 2


def test_a_schedule_that_this_version_does_not_know_is_told_with_those_it_does(settings: LocalSettings) -> None:
    device = Device(settings, TRAINING.model_copy(update={"schedule": "zigzag"}))
    with pytest.raises(RoundError, match="unknown schedule 'zigzag'; expected one of: constant, cosine, linear"):
        device.train()
