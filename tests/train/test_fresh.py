"""An adapter to begin with: it fits the model, changes nothing, and has something to learn in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.errors import BaseModelError  # noqa: E402 - after the check that torch is there
from edge_runtime.train import families, fresh  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return tiny.plain_model(tiny_base)


def test_the_layers_named_are_those_of_every_block(model: Any) -> None:
    slot = fresh.slot_for(model, ["q_proj", "v_proj"], 8)

    assert sorted(slot.layers) == sorted(tiny.layer(i, m) for i in range(3) for m in ("q_proj", "v_proj"))
    assert slot.shapes[tiny.layer(0, "v_proj")] == (32, 64)
    assert set(slot.trained.values()) == {8}
    assert list(fresh.slot_for(model, [tiny.layer(1, "q_proj")], 4).layers) == [tiny.layer(1, "q_proj")]


def test_a_layer_takes_no_more_directions_than_it_has(model: Any) -> None:
    slot = fresh.slot_for(model, ["q_proj", "v_proj"], 1000)

    assert slot.held[tiny.layer(0, "q_proj")] == 64
    assert slot.held[tiny.layer(0, "v_proj")] == 32


def test_quantised_layers_are_found_too(tiny_base: Path, model: Any) -> None:
    pytest.importorskip("bitsandbytes")
    expected = fresh.slot_for(model, ["q_proj", "down_proj"], 4)

    assert fresh.slot_for(tiny.nf4_model(tiny_base), ["q_proj", "down_proj"], 4) == expected
    assert fresh.slot_for(tiny.int8_model(tiny_base), ["q_proj", "down_proj"], 4) == expected


def test_the_same_seed_gives_the_same_adapter_of_zero_product(model: Any) -> None:
    slot = fresh.slot_for(model, ["q_proj", "v_proj"], 4)
    adapter = fresh.fresh_adapter(slot, 7)

    assert adapter.digest() == fresh.fresh_adapter(slot, 7).digest() != fresh.fresh_adapter(slot, 8).digest()
    assert not any(pair.product().any() for pair in adapter.values())
    for pair in adapter.values():
        gram = pair.a @ pair.a.T
        np.testing.assert_allclose(gram, np.eye(4) * gram[0, 0], atol=1e-5)


def test_it_can_be_loaded_and_has_gradients(tiny_base: Path) -> None:
    family, base = families.get("lora"), tiny.plain_model(tiny_base)
    slot = fresh.slot_for(base, ["q_proj"], 4)
    live = family.attach(base, slot, scaling=2.0)
    family.load(live, fresh.fresh_adapter(slot))
    live.model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()

    gradients = [p.grad for name, p in family.trainable(live).items() if name.endswith(".b")]

    assert len(gradients) == 3
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_a_name_that_fits_nothing_is_an_error_that_lists_the_names_there_are(model: Any) -> None:
    with pytest.raises(BaseModelError, match=r"query.*down_proj.*q_proj"):
        fresh.slot_for(model, ["q_proj", "query"], 4)
    with pytest.raises(BaseModelError, match="proj"):
        fresh.slot_for(model, ["proj"], 4)
    with pytest.raises(ValueError, match="rank"):
        fresh.slot_for(model, ["q_proj"], 0)
