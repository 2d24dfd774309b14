"""An update must be of the layers and ranks that its device said hello with."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.wire.messages import LayerGroup, Offer, group
from server.assigned import check
from tests.runtime.said import offer

NAMES = [f"model.layers.{index}.self_attn.q_proj" for index in range(3)]


def plan(rank: int, held: int = 8, layers: int = 2) -> tuple[LayerGroup, ...]:
    """The first layers are trained at this rank; the others are held only."""
    ranks = [rank if index < layers else 0 for index in range(3)]
    return group(Slot({name: LayerSlot(12, 16, held, found) for name, found in zip(NAMES, ranks, strict=True)}))


def sizes(*ranks: int) -> Mapping[str, tuple[int, int, int]]:
    return {name: (12, 16, rank) for name, rank in zip(NAMES, ranks, strict=False)}


def of(kind: str = "slice") -> Offer:
    return offer("a").model_copy(update={"kind": kind})


@pytest.mark.parametrize("uniform", [True, False])
def test_an_update_of_the_plan_passes(uniform: bool) -> None:
    check(of(), sizes(4, 4), [plan(4)], uniform=uniform)


def test_a_layer_too_many_and_a_layer_too_few_are_named() -> None:
    with pytest.raises(CorruptPayloadError, match=rf"has a layer '{NAMES[2]}' that its plan does not train"):
        check(of(), sizes(4, 4, 4), [plan(4)], uniform=True)
    with pytest.raises(CorruptPayloadError, match=rf"lacks its layer '{NAMES[1]}'"):
        check(of(), sizes(4), [plan(4)], uniform=True)


@pytest.mark.parametrize("rank", [3, 5])
def test_another_rank_than_assigned_is_named(rank: int) -> None:
    with pytest.raises(CorruptPayloadError, match=rf"has rank {rank} in layer '{NAMES[1]}', where its plan has 4"):
        check(of(), sizes(4, rank), [plan(4)], uniform=True)


def test_ranks_that_are_shared_out_may_be_any_that_the_device_holds() -> None:
    check(of(), sizes(1, 8), [plan(4)], uniform=False)
    with pytest.raises(CorruptPayloadError, match="has rank 9"):
        check(of(), sizes(1, 9), [plan(4)], uniform=False)


def test_an_update_of_a_former_plan_passes() -> None:
    check(of(), sizes(4, 4), [plan(2), plan(4)], uniform=True)
    with pytest.raises(CorruptPayloadError, match="where its plan has 2"):
        check(of(), sizes(3, 3), [plan(2), plan(4)], uniform=True)


def test_an_increment_is_of_whichever_layers_devices_train() -> None:
    check(of("increment"), sizes(7), [plan(4)], uniform=True)
