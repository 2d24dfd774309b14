"""Cores against the same product written out, and seen from outside as adapters of the layers that they stand by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot  # noqa: E402 - after the check that torch is there
from edge_runtime.train.cores import CoreLinear, expanded, inserted  # noqa: E402 - as above
from edge_runtime.train.live import attach, load_adapter, read_all, without_adapter  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

SIZE, RANKS = 6, (6, 2)
NAMES = (tiny.layer(0, "q_proj"), tiny.layer(2, "v_proj"))
SLOT = Slot(
    {f"{name}.core": LayerSlot(SIZE, SIZE, held=rank, trained=rank) for name, rank in zip(NAMES, RANKS, strict=True)}
)


@pytest.mark.parametrize("build", [tiny.plain_model, tiny.nf4_model])
def test_an_adapter_of_cores_is_one_of_their_layers_from_outside(tiny_base: Any, build: Any) -> None:
    """The same logits, whether the core lives in the model or its product stands beside the layer."""
    tokens = torch.arange(3, 19)[None]
    adapter = tiny.random_adapter(SLOT, size=0.5)
    live = attach(inserted(build(tiny_base), SLOT), SLOT, scaling=2.0)
    with torch.no_grad():
        before = live.model(input_ids=tokens).logits
        load_adapter(live, adapter)
        found = live.model(input_ids=tokens).logits
        with without_adapter(live) as model:
            alone = model(input_ids=tokens).logits
    outside = expanded(read_all(live), live.model)
    assert set(outside) == set(NAMES)
    assert outside.ranks == dict(zip(NAMES, RANKS, strict=True))
    plain = attach(
        build(tiny_base),
        Slot({n: LayerSlot(*outside[n].shape, held=outside[n].rank, trained=outside[n].rank) for n in NAMES}),
        scaling=2.0,
    )
    load_adapter(plain, outside)
    with torch.no_grad():
        wanted = plain.model(input_ids=tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(before, alone)
    assert (found - before).abs().max() > 1e-3


def test_values_and_gradients_are_those_of_the_product_written_out() -> None:
    torch.manual_seed(0)
    layer = CoreLinear(torch.nn.Linear(24, 40), "q", SIZE)
    torch.nn.init.normal_(layer.core.weight)
    layer.core.weight.requires_grad_()
    x = torch.randn(2, 7, 24, requires_grad=True)
    weights = torch.randn(2, 7, 40)
    wanted = x @ (layer.base.weight + layer.b @ layer.core.weight @ layer.a).T + layer.base.bias
    found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        *(torch.autograd.grad((y * weights).sum(), [x, layer.core.weight]) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_bases_are_the_same_on_every_device_and_orthonormal() -> None:
    one, again, other = (CoreLinear(torch.nn.Linear(24, 40), name, SIZE) for name in ("q", "q", "v"))
    assert torch.equal(one.a, again.a)
    assert torch.equal(one.b, again.b)
    assert not torch.allclose(one.a, other.a)
    np.testing.assert_allclose(one.a @ one.a.T, np.eye(SIZE), atol=1e-5)
    np.testing.assert_allclose(one.b.T @ one.b, 40 / SIZE * np.eye(SIZE), atol=1e-4)
    assert not one.b.requires_grad


def test_a_slot_without_cores_and_an_adapter_without_them_stay_as_they_are(tiny_base: Any) -> None:
    model = tiny.plain_model(tiny_base)
    adapter = tiny.random_adapter(tiny.MIXED)
    assert inserted(model, tiny.MIXED) is model
    assert not any(isinstance(module, CoreLinear) for module in model.modules())
    assert expanded(adapter, model).digest() == Adapter(dict(adapter)).digest()
