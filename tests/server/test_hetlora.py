"""HetLoRA: norms are the weights, and what that leads to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import scale
from server import aggregators
from server.aggregators.hetlora import hetlora
from tests.server.merging import LAYER, dense, learnt_state, updates_from


def test_a_device_buys_weight_with_a_large_product_and_none_with_examples() -> None:
    state = learnt_state(6)
    first, second = updates_from(state, hetlora(), [6, 6])
    large = replace(second, trained=Adapter({n: scale(p, 100.0) for n, p in second.trained.items()}))
    many = replace(second, weight=1e6)
    plain, bought, counted = (
        hetlora().combine(state, [first, other]).state.adapter[LAYER] for other in (second, large, many)
    )
    assert np.linalg.norm(bought.a - second.trained[LAYER].a) < 0.02 * np.linalg.norm(plain.a - second.trained[LAYER].a)
    assert np.array_equal(counted.a, plain.a)


def test_where_nobody_has_learnt_anything_examples_decide() -> None:
    state = hetlora().init({LAYER: (14, 18)}, 4, 0)
    updates = updates_from(state, hetlora(), [4, 4], size=0.0, weights=[1.0, 3.0])
    merged = hetlora().combine(state, updates).state.adapter
    assert not dense(merged, merged.shapes)[LAYER].any()
    assert np.isfinite(merged[LAYER].a).all()


@pytest.mark.parametrize("parameters", [{"gamma": 0.0}, {"gamma": 1.5}, {"penalty": -1.0}])
def test_bad_parameters_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'hetlora': aggregator\.(gamma|penalty) must be"):
        aggregators.build("hetlora", **parameters)


def test_no_rule_may_stand_before_weights_that_it_cannot_give() -> None:
    with pytest.raises(ConfigError, match="weighs by norms"):
        aggregators.build("hetlora", robust="clip")
