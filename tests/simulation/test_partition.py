from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.partition import KINDS, counts, dealt
from simulation.settings import Partition

SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=20)


@given(SIZES, st.integers(1, 12), st.integers(0, 99), st.sampled_from(sorted(KINDS)), st.floats(0.01, 10))
def test_every_device_has_its_number_of_examples(
    sizes: list[int], classes: int, seed: int, kind: str, alpha: float
) -> None:
    settings = Partition.model_validate({"kind": kind, "alpha": alpha})
    found = counts(settings, sizes, classes, seed)
    assert found.shape == (len(sizes), classes)
    assert (found >= 0).all()
    assert (found == counts(settings, sizes, classes, seed)).all()
    if kind == "quantity":
        assert (found.sum(axis=1) >= 1).all()
    else:
        assert found.sum(axis=1).tolist() == sizes


def test_a_small_alpha_makes_devices_unlike_and_a_large_one_alike() -> None:
    def largest(alpha: float) -> float:
        found = counts(Partition(alpha=alpha), [1000] * 50, 10, 0)
        return float((found / 1000).max(axis=1).mean())

    assert largest(0.01) > 0.9
    assert largest(1000.0) == pytest.approx(0.1, abs=0.02)


def test_natural_devices_have_one_class_each_and_shards_few() -> None:
    assert ((counts(Partition(kind="natural"), [10] * 7, 3, 0) > 0).sum(axis=1) == 1).all()
    found = counts(Partition(kind="shards", shards=2), [100] * 10, 10, 0)
    assert ((found > 0).sum(axis=1) <= 4).all()
    assert found.sum(axis=0).tolist() == [100] * 10


@given(st.integers(0, 50))
def test_an_example_goes_to_one_device(seed: int) -> None:
    members = [range(40), range(40, 100)]
    found = dealt(np.asarray([[10, 20], [20, 10], [30, 5]]), members, seed)
    flat = [number for numbers in found for number in numbers]
    assert len(flat) == len(set(flat))
    # Of the first class 60 are wanted and 40 are there.
    assert [len([n for n in numbers if n >= 40]) for numbers in found] == [20, 10, 5]
    assert sum(len([n for n in numbers if n < 40]) for numbers in found) == 40
