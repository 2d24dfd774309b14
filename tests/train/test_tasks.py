"""From what a round asks for to the task of the loop."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from edge_runtime.train.tasks import rate_of
from profiles.families import FAMILIES
from tests.runtime.said import SPEC, TRAINING

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("rank", "exponent", "times"), [(8, 0.5, 1), (2, 0.5, 2), (2, 0.0, 1), (1, 1.0, 8), (16, 1.0, 1)]
)
def test_a_small_rank_takes_a_larger_rate_and_none_a_smaller_one(rank: int, exponent: float, times: float) -> None:
    assert SPEC.max_rank == 8
    training = TRAINING.model_copy(update={"rate_exponent": exponent})
    assert rate_of(training, rank, SPEC) == pytest.approx(times * TRAINING.learning_rate)


def test_families_without_pairs_have_one_rate() -> None:
    training = TRAINING.model_copy(update={"rate_exponent": 0.5})
    rates = {name: rate_of(training, 2, SPEC.model_copy(update={"family": name})) for name in FAMILIES}
    assert {name for name, rate in rates.items() if rate > TRAINING.learning_rate} == {"lora", "dora"}
