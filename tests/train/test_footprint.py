"""The peak of this process: over its life, and since a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from edge_runtime.train.footprint import CLEAR_REFS, Footprint, host_bytes, host_peak_bytes

pytestmark = [pytest.mark.torch, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")]

MIB = 1 << 20
SIZE = 192 * MIB
NEAR = 24 * MIB
"""What an interpreter may do beside."""


def fill() -> bytearray:
    return bytearray(b"x" * SIZE)  # two of them for a moment


def test_a_peak_is_remembered_after_its_memory_is_gone() -> None:
    footprint = Footprint()
    before = host_bytes()
    fill()

    assert footprint.since_begin("host") >= before + SIZE or not CLEAR_REFS.exists()
    assert footprint.peak_bytes >= before + SIZE
    assert abs(host_bytes() - before) < NEAR


def test_a_new_beginning_forgets_the_peak_and_life_does_not() -> None:
    footprint = Footprint()
    fill()
    peak = footprint.peak_bytes
    footprint.begin()

    assert footprint.since_begin("host") - host_bytes() < NEAR
    assert footprint.peak_bytes >= peak


def test_where_the_kernel_keeps_its_peak_samples_stand_in(tmp_path: Path) -> None:
    fill()  # a former peak that cannot be set back
    footprint = Footprint(reset=tmp_path / "missing")
    before = footprint.since_begin("host")
    assert abs(before - host_bytes()) < NEAR
    held = fill()
    footprint.sample()
    del held

    assert SIZE - NEAR < footprint.since_begin("host") - before < SIZE + NEAR
    assert host_peak_bytes() >= footprint.since_begin("host")


def test_a_file_that_takes_the_order_and_does_nothing_is_found_out(tmp_path: Path) -> None:
    fill()
    useless = tmp_path / "clear_refs"
    useless.touch()
    footprint = Footprint(reset=useless)
    if not footprint._exact:
        assert abs(footprint.since_begin("host") - host_bytes()) < NEAR
    assert useless.read_text() == "5"
