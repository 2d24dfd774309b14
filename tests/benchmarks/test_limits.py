"""What the benchmark of limits reads out of a client's log."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from benchmarks.limits import PLAN, Outcome, _larger_that_fits
from edge_runtime.config import load
from edge_runtime.train.planning import Owner, choose, in_words
from edge_runtime.trainer import AdapterSpec, Training
from profiles.machine import with_reserve
from tests.profiles.cards import smollm2
from tests.profiles.measured import MEASURED

MIB = 2**20
SPEC = AdapterSpec(
    family="lora", target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), scaling=2.0, max_rank=64, max_held=128,
    hold_more=True, max_length=256,
)  # fmt: skip
TRAINING = Training(
    max_steps=4, learning_rate=1e-3, batch_size=4, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=0
)


@pytest.mark.parametrize("limit", [620, 700, 900, 1500, 4000])
def test_a_planned_device_has_the_largest_plan_and_a_modest_one_has_not(limit: int) -> None:
    profile = replace(MEASURED, memory_bearable_bytes=with_reserve(limit * MIB, "").value)
    chosen = choose(profile, smollm2(), SPEC, TRAINING, Owner(), None)
    config = load(None, ["adapter.max_rank=64", "adapter.max_length=256"])
    said = f"plan: {in_words(chosen, smollm2(), SPEC)}"
    outcome = Outcome(limit * MIB, 0, 0, PLAN.search(said), said)

    assert _larger_that_fits(smollm2(), config, outcome) == ""
    modest = PLAN.search(said.replace(f"rank {chosen.rank} of", "rank 2 of").replace(chosen.precision + ",", "nf4,"))
    if limit >= 900:
        assert _larger_that_fits(smollm2(), config, replace(outcome, plan=modest))


def test_a_kill_is_told_from_an_error() -> None:
    well = Outcome(MIB, 0, 0, None, "")

    assert not well.killed
    assert not replace(well, code=10).killed
    assert replace(well, code=-signal.SIGKILL).killed
    assert replace(well, kills=1).killed
