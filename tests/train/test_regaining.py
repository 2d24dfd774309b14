"""A base that regained what it lost: nearer to its original, part of no adapter, and refused where it cannot be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import BaseModelError
from edge_runtime.lora.adapter import Adapter
from tests.train import tiny

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from safetensors.torch import load_file  # noqa: E402 - after the check that torch is there

from edge_runtime.train import cores, families, live, prepared, regaining  # noqa: E402 - as above
from edge_runtime.train.base import PreparedBase, load, prepare  # noqa: E402 - as above
from edge_runtime.train.local import LocalTrainer  # noqa: E402 - as above
from edge_runtime.train.lora_linear import OPENERS, opened_weight  # noqa: E402 - as above
from profiles.memory import REGAINABLE  # noqa: E402 - as above
from profiles.terms import Overrides  # noqa: E402 - as above
from tests.train.devices import settings_in  # noqa: E402 - as above
from tests.train.test_local import SPEC, received_by, trained  # noqa: E402 - as above

WHOLE = 64
"""The smaller side of the largest layers of the tiny base: all that a layer can lose."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def made(tiny_base: Path, cache: Path, regained: int, precision: str = "nf4") -> PreparedBase:
    return prepare(str(tiny_base), precision=precision, regained=regained, cache=cache)


def layers_of(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ in OPENERS}


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def lost(model: Any, original: Any) -> float:
    """The sum of squares of what all layers lack of the original's."""
    return sum(
        float((original.get_submodule(name).weight.detach() - opened_weight(layer)).square().sum())
        for name, layer in layers_of(model).items()
    )


@pytest.mark.parametrize("precision", REGAINABLE)
def test_with_all_directions_the_weights_are_those_of_the_original_to_rounding(
    tiny_base: Path, cache: Path, precision: str
) -> None:
    original = tiny.plain_model(tiny_base)
    model = load(made(tiny_base, cache, WHOLE, precision), compute_dtype="fp32").model

    assert len(layers_of(model)) == 3 * 7
    for name, layer in layers_of(model).items():
        weight = original.get_submodule(name).weight
        bare = weight - opened_without(layer)
        # The factors are kept in bfloat16, whose rounding is 2^-9 of each.
        assert (weight - opened_weight(layer)).norm() < 0.01 * bare.norm()
    difference = (logits_of(model) - logits_of(original)).abs().max()
    bare_model = load(made(tiny_base, cache, 0, precision), compute_dtype="fp32").model
    assert difference < 0.1 * (logits_of(bare_model) - logits_of(original)).abs().max()


def opened_without(layer: Any) -> Any:
    beside = layer.regained
    del layer.regained
    try:
        return opened_weight(layer)
    finally:
        layer.regained = beside


def test_more_directions_leave_less(tiny_base: Path, cache: Path) -> None:
    original = tiny.plain_model(tiny_base)
    left = [
        lost(load(made(tiny_base, cache, rank), compute_dtype="fp32").model, original) for rank in (0, 4, 16, WHOLE)
    ]

    assert left == sorted(left, reverse=True)
    assert left[-1] < 1e-3 * left[0]


def test_a_layer_computes_with_the_weight_that_it_is_opened_as_and_its_gradient_too(
    tiny_base: Path, cache: Path
) -> None:
    model = load(made(tiny_base, cache, 4), compute_dtype="fp32").model
    for layer in layers_of(model).values():
        x = torch.randn(5, layer.in_features, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, x @ opened_weight(layer).T, rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, opened_weight(layer).sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)


def test_a_base_with_directions_is_prepared_once_beside_the_one_without(tiny_base: Path, cache: Path) -> None:
    bare, with_four = made(tiny_base, cache, 0), made(tiny_base, cache, 4)

    assert bare.fingerprint == with_four.fingerprint
    assert bare.folder != with_four.folder
    assert made(tiny_base, cache, 4) == with_four
    assert prepared.check(with_four.folder).regained == 4
    assert (bare.folder / "model.safetensors").read_bytes() == (with_four.folder / "model.safetensors").read_bytes()
    factors = load_file(with_four.folder / regaining.FILE)
    assert {tensor.dtype for tensor in factors.values()} == {torch.bfloat16}
    assert factors["model.layers.0.mlp.up_proj.a"].shape == (4, 64)


def test_two_machines_prepare_the_same_directions(tiny_base: Path, cache: Path, tmp_path: Path) -> None:
    one, other = made(tiny_base, cache, 4), made(tiny_base, tmp_path, 4)

    assert (one.folder / regaining.FILE).read_bytes() == (other.folder / regaining.FILE).read_bytes()


@pytest.mark.parametrize("precision", ["int8", "bf16", "fp16", "fp32"])
def test_a_base_that_lost_nothing_is_refused(tiny_base: Path, tmp_path: Path, precision: str) -> None:
    with pytest.raises(BaseModelError, match="of precision nf4"):
        made(tiny_base, tmp_path, 4, precision)


@pytest.mark.parametrize(("has", "asked"), [(0, 4), (4, 0), (4, 8)])
def test_a_folder_prepared_elsewhere_must_have_as_many_as_the_fleet_asks_for(
    tiny_base: Path, cache: Path, tmp_path: Path, has: int, asked: int
) -> None:
    given = tmp_path / "given"
    shutil.copytree(made(tiny_base, cache, has).folder, given)

    assert prepare(str(given), regained=has, cache=tmp_path).folder == given
    with pytest.raises(BaseModelError, match=f"--regained {asked}"):
        prepare(str(given), regained=asked, cache=tmp_path)


def test_too_little_memory_is_refused_and_says_what_would_help(tiny_base: Path, cache: Path) -> None:
    from edge_runtime.train.checkpoint import open_folder  # noqa: PLC0415 - needs torch

    with pytest.raises(BaseModelError, match="--regained on a larger machine"):
        regaining.check_memory(open_folder(tiny_base), made(tiny_base, cache, 0).folder, 1 << 20)


def test_directions_of_another_base_are_refused(tiny_base: Path, cache: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 - needs torch

    found = made(tiny_base, cache, 4)
    factors = load_file(found.folder / regaining.FILE)
    name = "model.layers.1.mlp.up_proj"
    save_file({**factors, f"{name}.a": torch.zeros(4, 63)}, tmp_path / regaining.FILE)
    bare = load(replace(found, regained=0), compute_dtype="fp32").model
    with pytest.raises(BaseModelError, match=name):
        regaining.attach(bare, tmp_path)
    save_file({key: value for key, value in factors.items() if key != f"{name}.a"}, tmp_path / regaining.FILE)
    with pytest.raises(BaseModelError, match=name):
        regaining.attach(bare, tmp_path)


def test_stacked_under_an_adapter_they_do_over_the_bare_base_what_they_do_beside_it(
    tiny_base: Path, cache: Path
) -> None:
    found, adapter = made(tiny_base, cache, 4), tiny.random_adapter(tiny.MIXED)
    with_both = families.get("lora").attach(load(found, compute_dtype="fp32").model, tiny.MIXED, scaling=2.0)
    live.load_adapter(with_both, adapter)
    whole = regaining.stacked(adapter, found.folder)
    slot = tiny_slot(whole)
    bare = families.get("lora").attach(load(replace(found, regained=0), compute_dtype="fp32").model, slot, scaling=2.0)
    live.load_adapter(bare, whole)

    torch.testing.assert_close(logits_of(with_both.model), logits_of(bare.model), rtol=1e-4, atol=1e-4)
    assert whole.keys() >= adapter.keys()
    assert len(whole) == 3 * 7


def tiny_slot(adapter: Adapter) -> Any:
    from edge_runtime.lora.adapter import LayerSlot, Slot  # noqa: PLC0415 - beside its only use

    return Slot({name: LayerSlot(*pair.shape, held=pair.rank, trained=0) for name, pair in adapter.items()})


def test_without_its_adapter_a_base_keeps_what_it_regained(tiny_base: Path, cache: Path) -> None:
    model = load(made(tiny_base, cache, 4), compute_dtype="fp32").model
    before = logits_of(model)
    attached = families.get("lora").attach(model, tiny.MIXED, scaling=2.0)
    live.load_adapter(attached, tiny.random_adapter(tiny.MIXED))
    with live.without_adapter(attached):
        within = logits_of(model)

    torch.testing.assert_close(within, before)
    torch.testing.assert_close(logits_of(live.detach(attached)), before)


def test_a_device_trains_over_what_its_base_regained_and_never_sends_it(tiny_base: Path, tmp_path: Path) -> None:
    plan = Overrides(rank=2, held=4, precision="nf4", micro_batch=1, threads=1, compute_dtype="fp32")
    trainers = []
    for regained in (0, WHOLE):
        trainer = LocalTrainer(settings_in(tmp_path, tiny_base, plan), say=lambda _: None)
        trainer.introduce(SPEC.model_copy(update={"regained": regained}), trained_by(), None, lambda _: None)
        trainers.append(trainer)
    results = []
    for trainer in trainers:
        received_by(trainer)
        frozen = {name: beside[0].clone() for name, beside in beside_of(trainer)}
        results.append(trained(trainer))
        for name, beside in beside_of(trainer):
            assert torch.equal(beside[0], frozen[name])

    bare, whole = results
    assert whole.change.sizes == bare.change.sizes, "the slice alone is sent"
    assert any(not np.array_equal(whole.change[name].b, bare.change[name].b) for name in bare.change)
    assert trainers[1].personal().sizes == trainers[0].personal().sizes
    assert whole.loss_first != bare.loss_first


def trained_by() -> Any:
    from tests.train.test_local import TRAINING  # noqa: PLC0415 - as above

    return TRAINING


def beside_of(trainer: LocalTrainer) -> list[tuple[str, Any]]:
    return [
        (name, layer.regained)
        for name, layer in layers_of(trainer.ready.base.model).items()
        if hasattr(layer, "regained")
    ]


def test_a_device_with_a_plain_base_has_nothing_to_regain(tiny_base: Path, tmp_path: Path) -> None:
    plan = Overrides(rank=2, precision="fp32", micro_batch=1, threads=1)
    trainer = LocalTrainer(settings_in(tmp_path, tiny_base, plan), say=lambda _: None)
    trainer.introduce(SPEC.model_copy(update={"regained": 4}), trained_by(), None, lambda _: None)

    assert trainer.ready.base.prepared.regained == 0


def test_cores_stand_beside_what_was_regained(tiny_base: Path, cache: Path) -> None:
    from edge_runtime.lora.adapter import LayerSlot, Slot  # noqa: PLC0415 - beside its only use

    model = load(made(tiny_base, cache, 4), compute_dtype="fp32").model
    before = logits_of(model)
    cores.inserted(model, Slot({f"{tiny.layer(1, 'q_proj')}.core": LayerSlot(4, 4, 4, 4)}))

    torch.testing.assert_close(logits_of(model), before)
