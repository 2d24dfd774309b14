"""What each family computes, and its gradients, against transformers' own model with the formula written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.func import functional_call  # noqa: E402 - after the check that torch is there
from torch.nn import functional  # noqa: E402 - as above
from transformers import DynamicCache  # noqa: E402 - as above

from edge_runtime.errors import BaseModelError, RoundError  # noqa: E402 - as above
from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot  # noqa: E402 - as above
from edge_runtime.lora.dense import as_pair, is_dense, path_of, tensor_of  # noqa: E402 - as above
from edge_runtime.lora.named_draws import places, uniform  # noqa: E402 - as above
from edge_runtime.train import families  # noqa: E402 - as above
from edge_runtime.train.batches import pack_together  # noqa: E402 - as above
from edge_runtime.train.data import IGNORED  # noqa: E402 - as above
from edge_runtime.train.dense_modules import KINDS, mask_of  # noqa: E402 - as above
from edge_runtime.train.lean import lean  # noqa: E402 - as above
from edge_runtime.train.loss import completion_loss  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above
from tests.train.fleet_families import card_of, slot_of  # noqa: E402 - as above

pytestmark = pytest.mark.torch

EXAMPLES = tiny.examples(3, seed=4)
DENSE = sorted(name for name in families.FAMILIES if name != "lora")


def adapter_for(slot: Slot, seed: int = 3) -> Adapter:
    found = dict(tiny.random_adapter(slot, seed, 0.1))
    return Adapter(
        {
            name: as_pair(pair.a, range(pair.rank), pair.shape[0]) if is_dense(name) else pair
            for name, pair in found.items()
        }
    )


def _bottleneck(name: str, tensor: Any, y: Any) -> Any:
    width = y.shape[-1]
    down = torch.stack(
        [torch.from_numpy(uniform(f"hidden:{name}:{unit}", width, width**-0.5)) for unit in range(len(tensor))]
    )
    hidden = functional.gelu(y @ (down + tensor[:, :width]).T + tensor[:, width])
    return y + hidden @ tensor[:, width + 1 :]


def _values(name: str, tensor: Any, weight: Any) -> Any:
    mask = torch.from_numpy(mask_of(name, tensor.numel(), tuple(weight.shape)))
    return weight + torch.zeros(weight.numel()).scatter(0, mask, tensor.flatten()).view_as(weight)


WEIGHTS: dict[str, Callable[[str, Any, Any], Any]] = {
    "scale": lambda _name, t, w: w * (1 + t[0])[:, None],
    "scale_in": lambda _name, t, w: w * (1 + t[0]),
    "weight": lambda _name, t, w: w + t[0],
    "values": _values,
}
OUTPUTS: dict[str, Callable[[str, Any, Any], Any]] = {
    "bias": lambda _name, t, y: y + t[0],
    "hidden": _bottleneck,
}


def behind_virtual(model: Any, adapter: Adapter, leaves: dict[str, Any], ids: Any) -> dict[str, Any]:
    """What transformers is called with for virtual tokens: their embeddings, or a cache of their keys and values."""
    rows = {}
    for name, pair in adapter.items():
        if tensor_of(name) in {"prompt", "prefix"}:
            drawn = [uniform(f"virtual:{name}:{row}", pair.shape[1], 0.1) for row in range(pair.rank)]
            rows[name] = leaves[f"{name}.a"] + torch.from_numpy(np.stack(drawn))
    if not rows:
        return {}
    count = len(next(iter(rows.values())))
    if "model.embed_tokens#prompt" in rows:
        return {"inputs_embeds": torch.cat([rows["model.embed_tokens#prompt"], model.model.embed_tokens(ids)[0]])[None]}
    cache = DynamicCache()
    cos, sin = model.model.rotary_emb(torch.zeros(1, count, 64), torch.arange(count)[None])
    for index in range(3):
        keys, values = (
            rows[f"{tiny.layer(index, module)}#prefix"].view(1, count, 2, 16).transpose(1, 2)
            for module in ("k_proj", "v_proj")
        )
        half = torch.cat([-keys[..., 8:], keys[..., :8]], -1)
        cache.update(keys * cos + half * sin, values, index)
    positions = torch.arange(count, count + ids.shape[1])[None]
    return {"input_ids": ids, "past_key_values": cache, "position_ids": positions}


def reference(model: Any, adapter: Adapter) -> tuple[float, dict[str, Any]]:
    """The loss of all examples, one by one, and the gradient of each tensor; pairs as `<layer>.a` and `.b`."""
    leaves: dict[str, Any] = {}
    for name, pair in adapter.items():
        leaves[f"{name}.a"] = torch.tensor(pair.a, requires_grad=True)
        if not is_dense(name):
            leaves[f"{name}.b"] = torch.tensor(pair.b, requires_grad=True)
    known = dict(model.named_parameters())
    changed, hooks = {}, []
    for name in adapter:
        path, kind = path_of(name), tensor_of(name)
        tensor = leaves[f"{name}.a"]
        if kind in WEIGHTS:
            changed[f"{path}.weight"] = WEIGHTS[kind](name, tensor, known[f"{path}.weight"])
        elif kind in OUTPUTS:
            act = OUTPUTS[kind]
            hooks.append(
                model.get_submodule(path).register_forward_hook(
                    lambda _m, _x, y, act=act, name=name, tensor=tensor: act(name, tensor, y)
                )
            )
        elif kind == "magnitude":
            weight = known[f"{path}.weight"]
            moved = weight + leaves[f"{path}.b"] @ leaves[f"{path}.a"]
            norms = moved.detach().norm(dim=1)
            changed[f"{path}.weight"] = ((weight.norm(dim=1) + tensor[0]) / norms)[:, None] * moved
    total = torch.zeros(())
    for example in EXAMPLES:
        ids = torch.tensor([example.input_ids])
        given = behind_virtual(model, adapter, leaves, ids) or {"input_ids": ids}
        logits = functional_call(model, changed, kwargs=given).logits[0, -ids.shape[1] : -1]
        labels = torch.tensor(example.labels[1:])
        total = total + functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    total.backward()
    for hook in hooks:
        hook.remove()
    return float(total.detach()), {name: leaf.grad for name, leaf in leaves.items()}


def ours(live: Any) -> float:
    row = pack_together(EXAMPLES, torch.device("cpu"))
    live.model.train()
    with lean(live.model):
        loss = completion_loss(live.model, row.input_ids, row.labels, row.position_ids, row.lengths).total
        loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("name", DENSE)
def test_loss_and_gradients_are_those_of_the_formula(tiny_base: Path, name: str) -> None:
    family, slot = families.get(name), slot_of(card_of(tiny_base), name)
    adapter = adapter_for(slot)
    loss, wanted = reference(tiny.plain_model(tiny_base), adapter)
    live = family.attach(tiny.plain_model(tiny_base), slot, scaling=2.0)
    family.load(live, adapter)

    assert ours(live) == pytest.approx(loss, rel=1e-5)
    assert family.trainable(live)
    for key, parameter in family.trainable(live).items():
        layer, factor = key.rpartition(".")[0], key[-1]
        rows = list(range(slot.trained[layer]))
        full = wanted[key][rows] if factor == "a" else 2.0 * wanted[key][:, rows]
        scale = float(full.abs().max())
        assert scale > 1e-4
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), full.numpy(), atol=2e-4 * scale)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("build", [tiny.nf4_model, tiny.int8_model])
def test_over_a_quantised_base_a_family_begins_as_that_base_and_learns(
    tiny_base: Path, name: str, build: Callable[[Path], Any]
) -> None:
    family, slot = families.get(name), slot_of(card_of(tiny_base), name)
    model = build(tiny_base)
    live = family.attach(model, slot, scaling=2.0)
    nothing = {
        layer: as_pair(np.zeros_like(pair.a), range(pair.rank), pair.shape[0]) if is_dense(layer) else pair
        for layer, pair in adapter_for(slot).items()
    }
    family.load(live, Adapter({n: p if is_dense(n) else type(p)(p.a, p.b * 0) for n, p in nothing.items()}))
    started = ours(live)
    with family.without(live):
        row = pack_together(EXAMPLES, torch.device("cpu"))
        with torch.no_grad(), lean(live.model):
            alone = float(completion_loss(live.model, row.input_ids, row.labels, row.position_ids, row.lengths).total)

    # Virtual tokens are there from the beginning.
    assert (started == pytest.approx(alone, rel=1e-6)) != (name in {"prompt", "prefix"})
    assert all(parameter.grad is not None for parameter in family.trainable(live).values())


@pytest.mark.parametrize("name", [name for name in DENSE if name in {"sparse", "bottleneck", "prompt", "prefix"}])
def test_other_rows_than_the_first_are_trained_and_read_back_in_their_order(tiny_base: Path, name: str) -> None:
    family, slot = families.get(name), slot_of(card_of(tiny_base), name)
    live = family.attach(tiny.plain_model(tiny_base), slot, scaling=2.0)
    adapter = adapter_for(slot)
    rows = dict.fromkeys(slot.trained, (1, 2, 4))
    family.load(live, adapter, rows)

    assert family.read_all(live).digest() == adapter.digest()
    for layer, pair in family.read_trained(live).items():
        np.testing.assert_array_equal(pair.a, adapter[layer].a[[1, 2, 4]])
        np.testing.assert_array_equal(pair.b, adapter[layer].b[:, [1, 2, 4]])


def test_what_does_not_fit_the_base_is_refused(tiny_base: Path) -> None:
    model = tiny.plain_model(tiny_base)
    attach = families.get("ia3").attach
    path = tiny.layer(0, "q_proj")
    for name, width, said in (
        (f"{path}#scale", 63, "rows of 63 numbers"),
        (f"{path}#spin", 64, "kind of tensor"),
        ("model.layers.9.self_attn.q_proj#scale", 64, "no layer"),
    ):
        with pytest.raises(BaseModelError, match=said):
            attach(model, Slot({name: LayerSlot(1, width, 1, 1)}), scaling=2.0)
    live = attach(model, Slot({f"{path}#scale": LayerSlot(1, 64, 1, 1)}), scaling=2.0)
    with pytest.raises(RoundError, match="does not fit"):
        families.get("ia3").load(live, Adapter({}))


def test_a_mask_is_the_beginning_of_a_longer_one_and_has_no_entry_twice() -> None:
    long = places("some layer", 900, 2000)
    assert len(set(long.tolist())) == 900
    assert long.min() >= 0
    assert long.max() < 2000
    np.testing.assert_array_equal(places("some layer", 37, 2000), long[:37])
    assert not np.array_equal(places("another", 37, 2000), long[:37])
    with pytest.raises(ValueError, match="half"):
        places("some layer", 1001, 2000)


def test_numbers_that_a_text_names_are_spread_evenly() -> None:
    found = uniform("text", 4000, 0.5)
    assert np.abs(found).max() <= 0.5
    assert abs(float(found.mean())) < 0.02
    assert float(found.std()) == pytest.approx(0.5 / 3**0.5, rel=0.03)


def test_the_tensors_of_the_table_of_sizes_are_those_of_the_modules(tiny_base: Path) -> None:
    from profiles.families import FAMILIES  # noqa: PLC0415 - a name of the other table

    card = card_of(tiny_base)
    named = {tensor_of(layer) for name in FAMILIES for layer in slot_of(card, name).layers} - {""}
    assert named == set(KINDS)
    assert set(FAMILIES) == set(families.FAMILIES)
