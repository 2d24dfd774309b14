"""The benchmark of unlike precisions: what it opens, what it calls learnt, and what it holds against what."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from benchmarks import mixed_precision  # noqa: E402 - after the checks that libraries are there
from benchmarks.mixed_precision import ALIKE, BY_OUTPUTS, BY_WEIGHTS, PLAIN, Outcome  # noqa: E402 - as above
from benchmarks.mixed_precision_fleet import OPENED, Learnt, learnt  # noqa: E402 - as above
from edge_runtime.lora.adapter import Adapter, Pair  # noqa: E402 - as above

pytestmark = pytest.mark.torch


def test_the_wider_a_precision_the_less_it_loses() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    lost = {name: float((weight - opened(weight)).norm() / weight.norm()) for name, opened in OPENED.items()}

    assert lost["bf16"] < lost["int8"] < lost["nf4"]
    assert lost["nf4"] < 0.15


def test_learnt_is_one_for_the_error_itself_zero_across_it_and_less_than_nothing_against_it() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, generator=draw), torch.randn(6, 2, generator=draw)
    inputs = torch.randn(20, 8, generator=draw)
    seen = {"layer": inputs.T @ inputs}
    error = {"layer": b @ a}
    # Orthogonal to the columns of b: across the error for any inputs.
    across = torch.linalg.qr(b, mode="complete").Q[:, 2:4]
    expected = ((b, 1.0), (0.25 * b, 0.25), (-b, -1.0), (across, 0.0))
    for left, share in expected:
        found = learnt(Adapter({"layer": Pair(a.numpy(), left.contiguous().numpy())}), error, seen)
        assert (found.of_weights, found.of_outputs) == pytest.approx((share, share), abs=1e-5)


def outcome(loss: float, share: float) -> Outcome:
    return Outcome(dict.fromkeys(OPENED, loss), Learnt(0.0, share), (1.0, 1.0))


def test_bias_is_beyond_that_of_the_bf16_fleet_and_what_is_removed_is_a_part_of_it() -> None:
    found = {
        **{way: [outcome(1.0, 0.1)] for way in ALIKE.values()},
        PLAIN: [outcome(1.2, 0.5)],
        BY_WEIGHTS: [outcome(1.2, 0.5)],
        BY_OUTPUTS: [outcome(0.9, 0.2)],
    }
    told = mixed_precision.figures(found)

    assert told["bias"] == pytest.approx(0.4)
    assert told["bias_removed_by_weights"] == pytest.approx(0.0)
    assert told["bias_removed_by_outputs"] == pytest.approx(0.75)
    assert told["mixed_over_bf16_on_nf4"] == pytest.approx(1.2)
    assert told["regained_by_outputs_over_mixed"] == pytest.approx(0.75)
    assert told["bias_95"] is None, "one seed says nothing of the next"
