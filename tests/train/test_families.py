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

TOKENS = torch.arange(3, 30).view(1, -1)
each_family = pytest.mark.parametrize("name", sorted(FAMILIES))


@each_family
def test_what_was_loaded_is_read_back_bit_for_bit(tiny_base: Path, name: str) -> None:
    family = families.get(name)
    live = family.attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
    adapter = tiny.random_adapter(tiny.MIXED)
    family.load(live, adapter)

    assert family.read_all(live).digest() == adapter.digest()


@each_family
def test_nothing_of_the_base_model_is_trainable_and_all_of_the_trained_slice_is(tiny_base: Path, name: str) -> None:
    family = families.get(name)
    live = family.attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
    expected = {id(parameter) for parameter in family.trainable(live).values()}

    assert {id(p) for p in live.model.parameters() if p.requires_grad} == expected
    assert sum(p.numel() for p in family.trainable(live).values()) == family.read_trained(live).parameters


@each_family
def test_a_family_just_attached_changes_nothing_and_detached_leaves_nothing(tiny_base: Path, name: str) -> None:
    family = families.get(name)
    model = tiny.plain_model(tiny_base).eval()
    layers = [layer for layer, _ in model.named_modules()]
    with torch.no_grad():
        before = model(TOKENS).logits
        live = family.attach(model, tiny.MIXED, scaling=2.0)
        attached = live.model.eval()(TOKENS).logits
        family.load(live, tiny.random_adapter(tiny.MIXED))
        with family.without(live) as alone:
            silenced = alone(TOKENS).logits
        loaded = live.model(TOKENS).logits
        base = family.detach(live).eval()
        after = base(TOKENS).logits

    assert torch.equal(before, attached)
    assert torch.equal(before, silenced)
    assert torch.equal(before, after)
    assert not torch.allclose(before, loaded, atol=0.1)
    assert [layer for layer, _ in base.named_modules()] == layers


def test_an_unknown_family_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="lora"):
        families.get("lorra")
