"""The push against a device's own drift: from its last round and two versions, and what it does to a fleet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from edge_runtime.lora.adapter import Adapter, Pair  # noqa: E402 - after the check that torch is there
from edge_runtime.lora.algebra import changed, cut, decompose, take, to_pair  # noqa: E402 - as above
from edge_runtime.train.drift import drift_of, pushes, record  # noqa: E402 - as above
from edge_runtime.train.resume import RoundState, StepReport  # noqa: E402 - as above
from edge_runtime.train.terms import push  # noqa: E402 - as above
from tests.strategies import gaussian  # noqa: E402 - as above

pytestmark = pytest.mark.torch

LAYER, SHAPE, SCALING = "x", (16, 12), 2.0
REPORTS = tuple(StepReport(step, 3, 1.0, 5, 0.1, 9.0, 0.5 * step) for step in (1, 2, 3))
"""The loss's own gradients have norm 1 on average; with all terms 9, which must not count."""


def handed_out(dense: np.ndarray, rank: int) -> Pair:
    whole = Pair(np.eye(SHAPE[1], dtype=np.float32), dense.astype(np.float32))
    return to_pair(decompose([(1.0, whole)]), 0, rank)


def end_of(held: Pair, rows: tuple[int, ...], moved: Pair) -> RoundState:
    """The end of a round that moved these rows of what was held."""
    before = take(held, rows)
    after = changed(before, moved)
    a, b = held.a.copy(), held.b.copy()
    a[list(rows)], b[:, list(rows)] = after.a, after.b
    beside = record(Adapter({LAYER: Pair(a, b)}), {LAYER: before}, {LAYER: rows})
    parameters = {f"{LAYER}.a": after.a, f"{LAYER}.b": after.b / np.float32(SCALING)}
    return RoundState(REPORTS, parameters, {}, 3, beside=beside)


def small(rank: int, seed: int) -> Pair:
    pair = gaussian(SHAPE, rank, seed)
    return Pair(0.05 * pair.a, 0.05 * pair.b)


def test_the_push_is_the_own_change_less_the_fleets_in_gradients_of_the_usual_norm() -> None:
    held, rows = handed_out(gaussian(SHAPE, 6, 0).product(), 6), (0, 2, 3)
    moved = small(3, 1)
    before = take(held, rows)
    own = changed(before, moved).product() - before.product()
    now = handed_out(held.product() + 0.3 * own, 6)  # the fleet went a third of its way, in two versions
    found = pushes(drift_of(end_of(held, rows, moved), 2, Adapter({LAYER: now}), SCALING, 1.0))[LAYER]

    wanted = own - (now.product().astype(np.float64) - held.product()) / 2
    u, s, vt = np.linalg.svd(wanted)
    wanted = (u[:, :3] * s[:3]) @ vt[:3]  # as many directions as are trained
    factor = np.linalg.norm(found.product()) / np.linalg.norm(wanted)
    np.testing.assert_allclose(found.product() / factor, wanted, atol=2e-3 * np.abs(wanted).max())
    gradients = SCALING * own @ before.a.T, before.b.T @ own
    assert factor == pytest.approx(1.0 / np.sqrt(sum(np.sum(part**2) for part in gradients)), rel=1e-3)


def test_a_device_that_went_where_its_fleet_went_is_not_pushed() -> None:
    held = handed_out(gaussian(SHAPE, 6, 0).product(), 6)
    moved = small(6, 1)
    now = handed_out(changed(held, moved).product(), 6)
    found = pushes(drift_of(end_of(held, tuple(range(6)), moved), 1, Adapter({LAYER: now}), SCALING, 1.0))[LAYER]
    alone = pushes(drift_of(end_of(held, tuple(range(6)), moved), 1, Adapter({LAYER: held}), SCALING, 1.0))[LAYER]

    assert np.linalg.norm(found.product()) < 1e-3 * np.linalg.norm(alone.product())


def test_plans_may_change_between_the_two_rounds() -> None:
    held = handed_out(gaussian(SHAPE, 6, 0).product(), 6)
    last = end_of(held, (0, 1), small(2, 1))
    narrow, wide = cut(held, 4), handed_out(gaussian(SHAPE, 8, 3).product(), 8)

    assert pushes(drift_of(last, 1, Adapter({LAYER: narrow}), SCALING, 1.0))[LAYER].rank == 2
    assert pushes(drift_of(last, 1, Adapter({LAYER: wide}), SCALING, 1.0))[LAYER].rank == 2
    assert drift_of(last, 1, Adapter({"y": held}), SCALING, 1.0) == {}
    assert drift_of(last, 1, Adapter({LAYER: gaussian((4, 4), 2, 0)}), SCALING, 1.0) == {}


def test_without_a_former_round_or_without_a_move_there_is_no_push() -> None:
    held = handed_out(gaussian(SHAPE, 6, 0).product(), 6)
    still = end_of(held, (0, 1), Pair(np.zeros((2, 12), np.float32), np.zeros((16, 2), np.float32)))

    assert drift_of(still, 1, Adapter({LAYER: held}), SCALING, 1.0) == {}
    assert drift_of(RoundState((), {}, {}, 0), 1, Adapter({LAYER: held}), SCALING, 1.0) == {}
    assert pushes({}) == {}


# ── a fleet whose devices want different things ───────────────────────────────────────────────────────────────────


def life(strength: float, *, rounds: int = 30, steps: int = 10, rate: float = 0.15) -> float:
    """Distance from the fleet's optimum that two devices with unlike curvature and optima are left at.

    Device k minimises half of Σ h_k (BA - T_k)² over the entries of the product, all directions trained; the server
    takes the mean of the products. The optimum of the sum is that of the weighted targets, and where devices walk far
    alone each comes near its own: the mean of those is another place.
    """
    draw = np.random.default_rng(0)
    targets = [draw.standard_normal((4, 4)) for _ in range(2)]
    curves = [np.exp(draw.uniform(-2.0, 0.0, (4, 4))) for _ in range(2)]
    optimum = sum(h * t for h, t in zip(curves, targets, strict=True)) / sum(curves)
    state: np.ndarray = np.zeros((4, 4))
    last: list[RoundState | None] = [None, None]
    for _ in range(rounds):
        whole = Pair(np.eye(4, dtype=np.float32), np.zeros((4, 4), np.float32))
        held = Pair(whole.a, state.astype(np.float32))
        after = []
        for at in range(2):
            previous = last[at]
            beside = drift_of(previous, 1, Adapter({LAYER: held}), 1.0, strength) if previous is not None else {}
            ended, last[at] = _walk(held, targets[at], curves[at], beside, strength, steps, rate)
            after.append(ended)
        state = np.mean([pair.product().astype(np.float64) for pair in after], axis=0)
    return float(np.linalg.norm(state - optimum) / np.linalg.norm(optimum))


def _walk(
    held: Pair, target: np.ndarray, curve: np.ndarray, beside: dict[str, Any], strength: float, steps: int, rate: float
) -> tuple[Pair, RoundState]:
    """Plain gradient descent on b alone, so that the fleet's problem is a quadratic one."""
    b = torch.nn.Parameter(torch.from_numpy(held.b.copy()))
    a = torch.nn.Parameter(torch.from_numpy(held.a.copy()))
    reports = []
    for step in range(steps):
        product = b.detach().numpy() @ held.a
        gradient = (curve * (product - target)).astype(np.float32) @ held.a.T
        a.grad, b.grad = torch.zeros_like(a), torch.from_numpy(gradient)
        norm = float(np.linalg.norm(gradient))
        reports.append(StepReport(step + 1, steps, 0.0, 1, rate, norm, norm))
        push(pushes(beside), strength, 1.0)({f"{LAYER}.a": a, f"{LAYER}.b": b})
        with torch.no_grad():
            b -= rate * b.grad
    ended = Pair(held.a, b.detach().numpy().copy())
    beside = {**beside, **record(Adapter({LAYER: ended}), {LAYER: held}, {LAYER: tuple(range(4))})}
    return ended, RoundState(tuple(reports), {f"{LAYER}.a": ended.a, f"{LAYER}.b": ended.b}, {}, steps, beside=beside)


def test_a_fleet_with_unlike_optima_comes_nearer_to_its_own_with_the_push() -> None:
    plain, pushed = life(0.0), life(1.0)

    assert plain > 0.02, "the devices drift, or there would be nothing to correct"
    assert pushed < 0.5 * plain
