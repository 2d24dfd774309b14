"""Laws that every family keeps, over the whole table."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.errors import ConfigError  # noqa: E402 - after the check that torch is there
from edge_runtime.train import families  # noqa: E402 - as above
from edge_runtime.train.families import FAMILIES  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

from edge_runtime.lora.adapter import Adapter, Slot  # noqa: E402 - as above
from edge_runtime.lora.dense import as_pair, is_dense  # noqa: E402 - as above
from tests.train.fleet_families import card_of, slot_of  # noqa: E402 - as above

TOKENS = torch.arange(3, 30).view(1, -1)


def slot_for(folder: Path, name: str) -> Slot:
    return tiny.MIXED if name == "lora" else slot_of(card_of(folder), name)


def random_adapter(slot: Slot, seed: int = 0, size: float = 0.3) -> Adapter:
    """One that changes the logits well beyond rounding."""
    found = dict(tiny.random_adapter(slot, seed, size))
    for name, pair in found.items():
        if is_dense(name):
            found[name] = as_pair(pair.a, range(pair.rank), pair.shape[0])
    return Adapter(found)


each_family = pytest.mark.parametrize("name", sorted(FAMILIES))


@each_family
def test_what_was_loaded_is_read_back_bit_for_bit(tiny_base: Path, name: str) -> None:
    family, slot = families.get(name), slot_for(tiny_base, name)
    live = family.attach(tiny.plain_model(tiny_base), slot, scaling=2.0)
    adapter = random_adapter(slot)
    family.load(live, adapter)

    assert family.read_all(live).digest() == adapter.digest()


@each_family
def test_nothing_of_the_base_model_is_trainable_and_all_of_the_trained_slice_is(tiny_base: Path, name: str) -> None:
    family, slot = families.get(name), slot_for(tiny_base, name)
    live = family.attach(tiny.plain_model(tiny_base), slot, scaling=2.0)
    expected = {id(parameter) for parameter in family.trainable(live).values()}

    assert {id(p) for p in live.model.parameters() if p.requires_grad} == expected
    trained = family.read_trained(live)
    numbers = sum(pair.a.size + (0 if is_dense(layer) else pair.b.size) for layer, pair in trained.items())
    assert sum(p.numel() for p in family.trainable(live).values()) == numbers
    assert trained.ranks == slot.trained


@each_family
def test_a_family_just_attached_changes_nothing_and_detached_leaves_nothing(tiny_base: Path, name: str) -> None:
    family, slot = families.get(name), slot_for(tiny_base, name)
    model = tiny.plain_model(tiny_base).eval()
    layers = [layer for layer, _ in model.named_modules()]
    with torch.no_grad():
        before = model(TOKENS).logits
        live = family.attach(model, slot, scaling=2.0)
        attached = live.model.eval()(TOKENS).logits
        family.load(live, random_adapter(slot))
        with family.without(live) as alone:
            silenced = alone(TOKENS).logits
        loaded = live.model(TOKENS).logits
        base = family.detach(live).eval()
        after = base(TOKENS).logits

    # Virtual tokens are there from the beginning.
    assert torch.equal(before, attached) != (name in {"prompt", "prefix"})
    assert torch.equal(before, silenced)
    assert torch.equal(before, after)
    assert not torch.allclose(before, loaded, atol=0.1)
    assert [layer for layer, _ in base.named_modules()] == layers


def test_an_unknown_family_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="lora"):
        families.get("lorra")
