"""Whether quantised layers work: what the trials find, and what a profile makes of it."""

from __future__ import annotations

import importlib
import math
import subprocess
from typing import Any

import pytest

from profiles import kernels
from profiles.kernels import FIELDS, Outcome, trials, trials_in_child, verdicts
from profiles.machine import Reading

SHAPE = (4, 64, 64)


def verdict(outcome: Outcome, where: str = "cpu", *, installed: bool = True) -> Reading | str:
    """What one outcome says for the profile."""
    return verdicts([outcome], where, "bfloat16", installed=installed)[outcome.field]


def test_close_numbers_are_a_yes_and_others_a_no_with_the_cure() -> None:
    good, bad = verdict(Outcome("four_bit", (0.996, 0.995))), verdict(Outcome("four_bit", (0.996, 0.7)), "cuda")

    assert isinstance(good, Reading)
    assert isinstance(bad, Reading)
    assert (good.value, bad.value) == (True, False)
    assert "wrong numbers" in bad.reason
    assert "cmake" in bad.reason


@pytest.mark.parametrize("field", ["four_bit", "eight_bit"])
def test_not_a_number_is_a_no(field: str) -> None:
    found = verdict(Outcome(field, (math.nan, 1.0)))

    assert isinstance(found, Reading)
    assert found.value is False


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("field", ["four_bit", "eight_bit"])
def test_a_failure_says_why_and_what_to_do(field: str, where: str) -> None:
    found = verdict(Outcome(field, fault="the process ended with 1, saying: Error named symbol not found"), where)

    assert isinstance(found, Reading)
    assert found.value is False
    assert "named symbol not found" in found.reason
    assert "install" in found.reason


def test_a_failure_that_may_pass_is_no_verdict() -> None:
    found = verdict(Outcome("four_bit", fault="the process did not end", passing=True))

    assert isinstance(found, str)
    assert found.startswith(kernels.UNMEASURED)


def test_a_rate_that_failed_is_a_cause() -> None:
    assert verdict(Outcome("int8_gweights_s", fault="no kernel")) == f"{kernels.UNMEASURED}: no kernel"
    assert verdict(Outcome("nf4_gweights_s", fault="no module"), installed=False) == kernels.NO_BITSANDBYTES


@pytest.mark.torch
def test_trials_in_a_child_find_what_trials_here_find() -> None:
    pytest.importorskip("bitsandbytes")
    here = {outcome.field: outcome for outcome in trials(importlib.import_module, "cpu", SHAPE, "float32")}
    child = {outcome.field: outcome for outcome in trials_in_child("cpu", SHAPE, "float32")}

    assert tuple(here) == tuple(child) == FIELDS
    for bits in kernels.BITS:
        assert child[bits].values == pytest.approx(here[bits].values, abs=1e-4)


@pytest.mark.torch
def test_a_child_that_cannot_run_the_trials_costs_no_more_than_a_reason() -> None:
    pytest.importorskip("torch")

    found = {outcome.field: outcome for outcome in trials_in_child("cuda:99", SHAPE, "float32")}

    assert tuple(found) == FIELDS
    assert all(outcome.fault and not outcome.values for outcome in found.values())


def test_a_child_that_ends_half_way_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes ends the process at the first kernel that is missing."""
    said = f"a library's banner\n{kernels.written(Outcome('eight_bit', (1.0, 1.0)))}\n"

    def ended(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, said, "Error named symbol not found at line 90 in ops.cu\n")

    monkeypatch.setattr(subprocess, "run", ended)

    found = {outcome.field: outcome for outcome in trials_in_child("cuda", SHAPE, "float32")}

    assert set(found) == set(FIELDS)
    assert found["eight_bit"].values == (1.0, 1.0)
    assert "named symbol not found" in found["four_bit"].fault
