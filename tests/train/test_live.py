"""LoRA in two hands, trained and held: together they are the one adapter that was loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from edge_runtime.errors import BaseModelError, RoundError  # noqa: E402 - after the check that torch is there
from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot  # noqa: E402 - as above
from edge_runtime.lora.algebra import take  # noqa: E402 - as above
from edge_runtime.lora.files import write_peft_folder  # noqa: E402 - as above
from edge_runtime.train.base import keep_gradients  # noqa: E402 - as above
from edge_runtime.train.live import (  # noqa: E402 - as above
    LiveModel,
    attach,
    detach,
    load_adapter,
    read_all,
    read_trained,
    trainable_parameters,
    without_adapter,
)
from edge_runtime.train.lora_linear import LoraLinear  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

TOKENS = torch.arange(3, 30).view(1, -1)
Build = Callable[[Path], Any]
every_precision = pytest.mark.parametrize("build", [tiny.plain_model, tiny.nf4_model, tiny.int8_model])


@pytest.fixture(scope="module")
def live(tiny_base: Path) -> LiveModel:
    return attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)


def logits(live: LiveModel) -> Any:
    live.model.eval()
    with torch.no_grad():
        return live.model(TOKENS).logits


@every_precision
def test_trained_and_held_together_compute_what_one_peft_adapter_computes(
    tiny_base: Path, tmp_path: Path, build: Build
) -> None:
    """Whichever directions are trained."""
    from peft import PeftModel  # noqa: PLC0415 - after the check that it is there

    adapter = tiny.random_adapter(tiny.MIXED)
    write_peft_folder(adapter, tmp_path, base_name="tiny", scaling=0.7)
    whole = PeftModel.from_pretrained(build(tiny_base), tmp_path).eval()
    keep_gradients(whole)
    with torch.no_grad():
        expected = whole(TOKENS).logits
    live = attach(build(tiny_base), tiny.MIXED, scaling=2.0)
    for directions in (None, {tiny.layer(1, "q_proj"): (5, 0, 3, 1), tiny.layer(2, "o_proj"): (7,)}):
        load_adapter(live, adapter, directions)

        torch.testing.assert_close(logits(live), expected, rtol=0, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rows_return_to_their_order_whichever_were_trained(live: LiveModel, data: st.DataObject) -> None:
    directions = {
        name: tuple(data.draw(st.permutations(range(found.held)))[: found.trained])
        for name, found in tiny.MIXED.layers.items()
        if found.trained
    }
    adapter = tiny.random_adapter(tiny.MIXED, seed=data.draw(st.integers(0, 1000)))
    load_adapter(live, adapter, directions)
    slices = Adapter({name: take(adapter[name], rows) for name, rows in directions.items()})

    assert read_all(live).digest() == adapter.digest()
    assert read_trained(live).digest() == slices.digest()


def test_a_scale_that_is_no_power_of_two_costs_rounding_only(tiny_base: Path) -> None:
    live = attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=0.3)
    adapter = tiny.random_adapter(tiny.MIXED)
    load_adapter(live, adapter)
    back = read_all(live)

    for name, pair in adapter.items():
        np.testing.assert_array_equal(back[name].a, pair.a)
        np.testing.assert_allclose(back[name].b, pair.b, rtol=3e-7)


def test_what_was_read_does_not_follow_the_model(live: LiveModel) -> None:
    load_adapter(live, tiny.random_adapter(tiny.MIXED, seed=1))
    before = read_all(live)
    digest = before.digest()
    load_adapter(live, tiny.random_adapter(tiny.MIXED, seed=2))

    assert before.digest() == digest


def test_only_the_layers_of_the_slot_are_touched_at_the_ranks_of_the_slot(live: LiveModel) -> None:
    found = {
        (name, hand): factor.shape[0]
        for name, module in live.model.named_modules()
        if isinstance(module, LoraLinear)
        for hand, factor in (("trained", module.a), ("held", module.held_a))
        if factor is not None
    }

    assert found == {
        (tiny.layer(0, "q_proj"), "held"): 6,
        (tiny.layer(1, "q_proj"), "trained"): 4,
        (tiny.layer(1, "q_proj"), "held"): 2,
        (tiny.layer(1, "v_proj"), "trained"): 3,
        (tiny.layer(2, "q_proj"), "trained"): 2,
        (tiny.layer(2, "q_proj"), "held"): 3,
        (tiny.layer(2, "o_proj"), "trained"): 1,
        (tiny.layer(2, "o_proj"), "held"): 7,
    }


def test_layer_one_is_not_taken_for_layer_eleven(tiny_base: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - after the check that it is there

    config = AutoConfig.from_pretrained(tiny_base, num_hidden_layers=12)
    slot = tiny.slot_of({tiny.layer(1, "q_proj"): (2, 1), tiny.layer(11, "q_proj"): (5, 3)})
    live = attach(AutoModelForCausalLM.from_config(config), slot, scaling=1.0)

    assert {name: tuple(p.shape) for name, p in trainable_parameters(live).items() if name.endswith(".a")} == {
        f"{tiny.layer(1, 'q_proj')}.a": (1, 64),
        f"{tiny.layer(11, 'q_proj')}.a": (3, 64),
    }


def test_trained_factors_are_float32_and_held_ones_what_was_asked_for(tiny_base: Path) -> None:
    base = tiny.plain_model(tiny_base).to(torch.bfloat16)
    live = attach(base, tiny.MIXED, scaling=2.0, held_dtype=torch.bfloat16)
    found = {
        hand: {factor.dtype for factor in factors if factor is not None}
        for module in live.model.modules()
        if isinstance(module, LoraLinear)
        for hand, factors in (("trained", (module.a, module.b)), ("held", (module.held_a, module.held_b)))
        if factors[0] is not None
    }

    assert found == {"trained": {torch.float32}, "held": {torch.bfloat16}}


def test_the_held_slice_stays_frozen_after_the_base_model_worked_alone(live: LiveModel) -> None:
    with without_adapter(live):
        pass
    trainable = {id(parameter) for parameter in trainable_parameters(live).values()}

    assert {id(p) for p in live.model.parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("trained", [0, 6])
def test_a_slot_may_train_all_that_it_holds_or_nothing(tiny_base: Path, trained: int) -> None:
    slot = tiny.slot_of({tiny.layer(1, "q_proj"): (6, trained)})
    live = attach(tiny.plain_model(tiny_base), slot, scaling=2.0)
    adapter = tiny.random_adapter(slot)
    load_adapter(live, adapter)

    assert read_all(live).digest() == adapter.digest()
    assert read_trained(live).ranks == ({tiny.layer(1, "q_proj"): 6} if trained else {})


def test_an_adapter_that_does_not_fit_the_slot_is_refused_and_changes_nothing(live: LiveModel) -> None:
    fitting = tiny.random_adapter(tiny.MIXED, seed=3)
    load_adapter(live, fitting)
    name = tiny.layer(1, "q_proj")
    other = tiny.random_adapter(tiny.MIXED, seed=4)
    lacking = Adapter({layer: pair for layer, pair in other.items() if layer != name})
    narrow = Adapter({**other, name: take(other[name], (0, 1))})
    for adapter, directions, reason in (
        (lacking, None, f"lacks {name}"),
        (Adapter({**other, "lm_head": other[name]}), None, "has also lm_head"),
        (narrow, None, "rank 6.*rank 2"),
        (other, {name: (0, 1)}, "4 different directions out of 6"),
        (other, {name: (0, 1, 2, 2)}, "4 different directions out of 6"),
        (other, {name: (0, 1, 2, 6)}, "4 different directions out of 6"),
    ):
        with pytest.raises(RoundError, match=reason):
            load_adapter(live, adapter, directions)

    assert read_all(live).digest() == fitting.digest()


def test_a_base_model_without_the_layer_or_of_another_shape_is_refused(tiny_base: Path) -> None:
    model = tiny.plain_model(tiny_base)
    with pytest.raises(BaseModelError, match=r"layers\.7"):
        attach(model, tiny.slot_of({tiny.layer(7, "q_proj"): (2, 1)}), scaling=1.0)
    with pytest.raises(BaseModelError, match="64, 96"):
        attach(model, Slot({tiny.layer(1, "q_proj"): LayerSlot(64, 96, 2, 1)}), scaling=1.0)
    with pytest.raises(ValueError, match="holds no direction"):
        attach(model, tiny.slot_of({tiny.layer(1, "q_proj"): (0, 0)}), scaling=1.0)

    assert not [name for name, _ in model.named_modules() if "lora" in name]


@every_precision
def test_every_trained_factor_gets_a_gradient_and_no_other(tiny_base: Path, build: Build) -> None:
    """PEFT looks at the type of a base layer's weight; an integer one must not reach its factors."""
    live = attach(build(tiny_base), tiny.MIXED, scaling=2.0)
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    live.model.train()
    live.model(TOKENS, labels=TOKENS).loss.backward()
    trained = {id(parameter) for parameter in trainable_parameters(live).values()}

    assert {id(parameter) for parameter in live.model.parameters() if parameter.grad is not None} == trained
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trainable_parameters(live).values())
    assert {parameter.dtype for parameter in trainable_parameters(live).values()} == {torch.float32}


@every_precision
def test_what_was_attached_can_be_taken_out_without_a_trace(tiny_base: Path, build: Build) -> None:
    base = build(tiny_base)
    keep_gradients(base)
    base.eval()
    with torch.no_grad():
        before = base(TOKENS).logits
    kinds = {name: type(module) for name, module in base.named_modules()}
    live = attach(base, tiny.MIXED, scaling=2.0)
    load_adapter(live, tiny.random_adapter(tiny.MIXED))

    bare = detach(live).eval()

    assert {name: type(module) for name, module in bare.named_modules()} == kinds
    with torch.no_grad():
        assert torch.equal(bare(TOKENS).logits, before)


def test_an_adapter_cannot_be_merged_into_integers_by_mistake(tiny_base: Path) -> None:
    """Rounded into the integers it would be lost, all or most of it."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - after the check that it is there

    model = get_peft_model(tiny.int8_model(tiny_base), LoraConfig(r=2, target_modules=["q_proj"]))

    with pytest.raises(RuntimeError, match="can't be cast"):
        model.merge_and_unload()
