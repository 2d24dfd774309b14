"""Server optimisers: the formulae, written densely; what they compose with; and what they remember."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from server import aggregators
from server.aggregators.method import Aggregator, State, Update, load_state, save_state
from server.aggregators.optimizers import OPTIMIZERS
from server.aggregators.robust import ROBUST
from tests.server.merging import JUDGED, LAYER, SHAPES, STEPPED, Dense, dense, learnt_state, updates_from

WHOLE = min(SHAPES[LAYER])
"""A global rank at which nothing of the larger layer is ever cut off."""
every_optimizer = pytest.mark.parametrize("name", sorted(OPTIMIZERS))
RULES: dict[str | None, dict[str, Any]] = {
    None: {},
    **{rule: {"byzantine": 1} for rule in ROBUST},
    "clip": {"ratio": 1.5},
}


def whole(state: State) -> Dense:
    """The global products, tails included."""
    return {name: dense(state.adapter)[name] + dense(state.tail)[name] for name in SHAPES}


def life(method: Aggregator, merges: int, seed: int, state: State | None = None) -> list[State]:
    """The states of a fleet that trains so many rounds."""
    states = [state or learnt_state(WHOLE)]
    for number in range(merges):
        updates = updates_from(states[-1], method, [3, 5, 2], seed=seed + number)
        states.append(method.combine(states[-1], updates).state)
    return states


def follows(name: str, parameters: dict[str, float], changes: list[np.ndarray]) -> list[np.ndarray]:
    """The steps of an optimiser by its formula, on dense matrices."""
    velocity, rows, columns, steps = 0.0 * changes[0], np.zeros(len(changes[0])), np.zeros(len(changes[0][0])), []
    rate, tau = parameters["server_learning_rate"], parameters.get("tau", 0.0)
    for change in changes:
        if name == "momentum":
            velocity = parameters["server_momentum"] * velocity + change
            steps.append(rate * velocity)
            continue
        kept, second = parameters["beta1"], parameters["beta2"]
        velocity = kept * velocity + (1 - kept) * change
        r, c = (change**2).mean(axis=1), (change**2).mean(axis=0)
        if name == "adam":
            rows, columns = second * rows + (1 - second) * r, second * columns + (1 - second) * c
        else:
            rows = rows - (1 - second) * r * np.sign(rows - r)
            columns = columns - (1 - second) * c * np.sign(columns - c)
        left, right = rows + tau**2, columns + tau**2
        v = np.outer(left, right) / np.sqrt(left.mean() * right.mean())
        steps.append(rate * velocity / np.sqrt(v))
    return steps


PARAMETERS: dict[str, dict[str, Any]] = {
    "momentum": {"server_learning_rate": 0.7, "server_momentum": 0.8},
    "adam": {"server_learning_rate": 0.02, "beta1": 0.8, "beta2": 0.9, "tau": 1e-3},
    "yogi": {"server_learning_rate": 0.02, "beta1": 0.8, "beta2": 0.9, "tau": 1e-3},
}


@every_optimizer
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_steps_are_those_of_the_formula(name: str, seed: int) -> None:
    plain = aggregators.build("increment")
    method = aggregators.build("increment", optimizer=name, **PARAMETERS[name])
    state, changes = learnt_state(WHOLE), list[np.ndarray]()
    for number in range(3):
        updates = updates_from(state, method, [3, 5, 2], seed=seed + number)
        before = whole(state)[LAYER]
        changes.append(whole(plain.combine(state, updates).state)[LAYER] - before)
        after = method.combine(state, updates).state
        expected = follows(name, PARAMETERS[name], changes)[-1]
        moved = whole(after)[LAYER] - before
        assert float(np.linalg.norm(moved - expected)) < 1e-4 * float(np.linalg.norm(expected))
        state = after


@pytest.mark.parametrize("method", STEPPED)
def test_a_rate_of_one_without_momentum_changes_nothing(method: str) -> None:
    plain = aggregators.build(method)
    told = aggregators.build(method, optimizer="momentum", server_learning_rate=1.0, server_momentum=0.0)
    assert save_state(life(told, 2, 5)[-1]) == save_state(life(plain, 2, 5)[-1])


@every_optimizer
@pytest.mark.parametrize("method", STEPPED)
@pytest.mark.parametrize("robust", [None, *sorted(ROBUST)], ids=str)
def test_it_composes_with_every_method_and_rule_and_forgets_no_order(
    name: str, method: str, robust: str | None
) -> None:
    if robust is not None and method not in JUDGED:
        return
    built = aggregators.build(method, robust=robust, optimizer=name, **RULES[robust])
    state = learnt_state(8)
    for number in range(2):
        updates = updates_from(state, built, [3, 5, 2, 4, 4], seed=number)
        after = built.combine(state, updates)
        assert save_state(after.state) == save_state(built.combine(state, updates[::-1]).state)
        assert after.state.adapter.ranks == state.adapter.ranks
        assert all(np.isfinite(layer).all() for layer in whole(after.state).values())
        state = after.state


@every_optimizer
def test_what_it_remembers_survives_a_restart(name: str) -> None:
    method = aggregators.build("increment", optimizer=name)
    first = life(method, 2, 1)[-1]
    assert "velocity" in first.carried
    again = load_state(save_state(first))
    assert save_state(life(method, 1, 9, again)[-1]) == save_state(life(method, 1, 9, first)[-1])


def test_momentum_goes_on_where_nobody_learns() -> None:
    method = aggregators.build("increment", optimizer="momentum", server_momentum=0.5)
    state = life(method, 1, 3)[-1]
    moved = whole(state)[LAYER] - whole(learnt_state(WHOLE))[LAYER]
    idle = method.combine(state, updates_from(state, method, [4, 4], size=0.0)).state
    assert whole(idle)[LAYER] - whole(state)[LAYER] == pytest.approx(0.5 * moved, abs=1e-5)


def test_layers_that_nobody_trained_keep_product_and_memory() -> None:
    method = aggregators.build("increment", optimizer="adam")
    state = life(method, 1, 3)[-1]

    def without(update: Update) -> Update:
        return replace(update, received=update.received.only([LAYER]), trained=update.trained.only([LAYER]))

    after = method.combine(state, map(without, updates_from(state, method, [4, 4]))).state
    other = next(name for name in SHAPES if name != LAYER)
    for part in (lambda of: of.adapter, lambda of: of.carried["velocity"], lambda of: of.carried["moments"]):
        assert np.array_equal(part(after)[other].a, part(state)[other].a)
        assert np.array_equal(part(after)[other].b, part(state)[other].b)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"optimizer": "adamm"}, "adam"),
        ({"optimizer": "adam", "beta1": 1.0}, "beta1 must be at least 0 and below 1; found 1.0"),
        ({"optimizer": "yogi", "tau": 0.0}, "tau must be positive"),
        ({"optimizer": "momentum", "server_learning_rate": -1.0}, "server_learning_rate must be positive"),
        ({"optimizer": "momentum", "beta2": 0.5}, "beta2"),
        ({"server_momentum": 0.5}, "server_momentum"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        aggregators.build("increment", **asked)
