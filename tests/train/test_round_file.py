"""A round's state on disk: whole, or ignored with a word about it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from edge_runtime.train import round_file
from edge_runtime.train.resume import RoundState, StepReport

pytestmark = pytest.mark.torch


def state_of(seed: int = 0, steps: int = 2) -> RoundState:
    """A state with every kind of array that optimisers hold."""
    draw = np.random.default_rng(seed)
    shared = draw.standard_normal(8).astype(np.float32)
    return RoundState(
        reports=tuple(StepReport(at + 1, 9, float(draw.random()), 3, 1e-3, 0.1) for at in range(steps)),
        parameters={
            "layer.a": draw.standard_normal((2, 3)).astype(np.float32),
            "layer.b": draw.standard_normal((5, 2)).astype(np.float32),
        },
        moments={
            "layer.a": {"step": np.array(2, np.int64), "state": draw.integers(0, 255, (2, 3), np.uint8), "map": shared},
            "layer.b": {"step": np.array(2.0, np.float32), "state": np.zeros((5, 2), np.float32), "map": shared},
        },
        position=steps,
        rng=bytes(range(7)),
    )


def assert_equal(one: RoundState, other: RoundState) -> None:
    """Equal bit for bit."""
    assert (one.reports, one.position, one.rng) == (other.reports, other.position, other.rng)
    arrays: list[dict[str, Any]] = [
        {**state.parameters, **{f"{name}/{at}": v for name, held in state.moments.items() for at, v in held.items()}}
        for state in (one, other)
    ]
    assert arrays[0].keys() == arrays[1].keys()
    for name, values in arrays[0].items():
        found = arrays[1][name]
        assert (values.dtype, values.shape, values.tobytes()) == (found.dtype, found.shape, found.tobytes())


LABELS = {"key": "k", "round": "3"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("whole") / "state"
    round_file.write(path, state_of(), LABELS)
    return path.read_bytes()


def test_a_state_comes_back_bit_for_bit_with_its_labels(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "state"
    round_file.write(path, state_of(), LABELS)
    found, problem = round_file.read(path)

    assert problem == ""
    assert found is not None
    assert_equal(found, state_of())
    assert found.moments["layer.a"]["map"] is found.moments["layer.b"]["map"]
    assert round_file.look(path) == (LABELS, "")


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file  # noqa: PLC0415 - for this test alone

    round_file.write(tmp_path / "state", state_of(), LABELS)
    found = load_file(tmp_path / "state")

    assert (found["parameters/layer.a"] == state_of().parameters["layer.a"]).all()


def test_a_file_that_is_not_there_is_no_problem(tmp_path: Path) -> None:
    assert round_file.look(tmp_path / "state") == ({}, "")


def test_a_file_cut_off_anywhere_is_ignored_with_a_word(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "state"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found, problem = round_file.read(path)

        assert found is None
        assert "ignored" in problem
        assert str(path) in problem
        assert not round_file.look(path).labels


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_file_with_any_byte_changed_is_ignored_or_says_the_same(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    """A few bytes mean nothing: the spaces that pad the header."""
    path = tmp_path_factory.getbasetemp() / "changed"
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    assert round_file.look(path).labels in (LABELS, {})
    found, problem = round_file.read(path)
    if found is None:
        assert "ignored" in problem
    else:
        assert_equal(found, state_of())


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_other_file_is_ignored_with_a_word(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)

    assert round_file.read(path)[0] is None
    assert "ignored" in round_file.read(path)[1]
    assert "ignored" in round_file.look(path).problem


def test_the_tensors_of_another_program_are_ignored_with_a_word(tmp_path: Path) -> None:
    from safetensors.numpy import save_file  # noqa: PLC0415 - for this test alone

    save_file({"parameters/layer.a": np.zeros((2, 2), np.float32)}, tmp_path / "state")

    assert "no state of a round in this version's format" in round_file.look(tmp_path / "state").problem
    assert round_file.read(tmp_path / "state")[0] is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_whoever_is_killed_while_writing_leaves_the_former_state(tmp_path: Path, whole: bytes, share: float) -> None:
    """What was written until then lies beside the file, and is overwritten by the next write."""
    path = tmp_path / "state"
    round_file.write(path, state_of(1), LABELS)
    (tmp_path / ".state.new").write_bytes(whole[: int(share * len(whole))])
    found, _ = round_file.read(path)
    assert found is not None
    assert_equal(found, state_of(1))

    round_file.write(path, state_of(2), LABELS)
    found, _ = round_file.read(path)
    assert found is not None
    assert_equal(found, state_of(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_write_that_fails_leaves_the_former_state(tmp_path: Path) -> None:
    path = tmp_path / "state"
    round_file.write(path, state_of(1), LABELS)
    (tmp_path / ".state.new").mkdir()  # nothing can be written there now
    with contextlib.suppress(OSError):
        round_file.write(path, state_of(2), LABELS)
    found, _ = round_file.read(path)

    assert found is not None
    assert_equal(found, state_of(1))
