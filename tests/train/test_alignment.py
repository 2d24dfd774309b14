"""Which directions matter to a device: u' G v of the true gradient, however the model is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from edge_runtime.lora.adapter import Adapter, Pair  # noqa: E402 - after the check that torch is there
from edge_runtime.train.alignment import BATCHES, scores  # noqa: E402 - as above
from edge_runtime.train.data import batch_at  # noqa: E402 - as above
from edge_runtime.train.live import LiveModel, attach, load_adapter, read_all, trainable_parameters  # noqa: E402
from edge_runtime.train.loop import LocalTask  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

EXAMPLES = tiny.examples(10)
TASK = LocalTask(steps=1, learning_rate=1e-2, micro_batch=2, gradient_accumulation_steps=2, seed=7)
ROWS = {tiny.layer(1, "q_proj"): (0, 2, 3, 5), tiny.layer(2, "o_proj"): (6,)}


def live_model(tiny_base: Path, adapter: Adapter, build: Callable[[Path], Any] = tiny.plain_model) -> LiveModel:
    live = attach(build(tiny_base), tiny.MIXED, scaling=2.0)
    load_adapter(live, adapter, ROWS)
    return live


def true_gradients(live: LiveModel) -> dict[str, np.ndarray]:
    """Of the dense weight of each layer, by autograd of transformers' own model, example by example."""
    weights = {name: live.model.get_submodule(name).base.weight for name in live.slot.trained}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in range(BATCHES):
        for index in dict.fromkeys(batch_at(batch, count=len(EXAMPLES), micro_batch=4, seed=7)):
            ids, labels = (torch.tensor([part]) for part in (EXAMPLES[index].input_ids, EXAMPLES[index].labels))
            dense = _dense_logits(live, weights, ids)
            torch.nn.functional.cross_entropy(
                dense[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
            ).backward()
    found = {name: weight.grad.double().numpy() for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(False)
        weight.grad = None
    return found


def _dense_logits(live: LiveModel, weights: dict[str, Any], ids: Any) -> Any:
    """The model with each trained layer as one dense product, so that its weight has a gradient."""
    adapter = read_all(live)
    hooks = []
    for name, weight in weights.items():
        total = weight + torch.from_numpy(adapter[name].product())
        hooks.append(
            live.model.get_submodule(name).register_forward_hook(
                lambda module, args, _, total=total: torch.nn.functional.linear(args[0], total, module.base.bias)
            )
        )
    try:
        return live.model(ids).logits
    finally:
        for hook in hooks:
            hook.remove()


def test_scores_are_those_of_the_true_gradient(tiny_base: Path) -> None:
    adapter = tiny.random_adapter(tiny.MIXED)
    live = live_model(tiny_base, adapter)
    found = scores(live, EXAMPLES, TASK)
    gradients = true_gradients(live)

    assert found.keys() == live.slot.trained.keys()
    for name, values in found.items():
        a, b = adapter[name].a.astype(np.float64), adapter[name].b.astype(np.float64)
        a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=0)
        expected = np.abs(np.einsum("oi,od,id->i", b, gradients[name], a))
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-3 * expected.max())


@pytest.mark.parametrize("recomputed", [None, 1])
def test_recomputing_and_smaller_passes_change_memory_and_not_the_scores(
    tiny_base: Path, recomputed: int | None
) -> None:
    adapter = tiny.random_adapter(tiny.MIXED)
    live = live_model(tiny_base, adapter)
    lean = dataclasses.replace(
        TASK, micro_batch=1, gradient_accumulation_steps=4, gradient_checkpointing=True, recomputed_layers=recomputed
    )
    expected, found = scores(live, EXAMPLES, TASK), scores(live, EXAMPLES, lean)

    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-4 * expected[name].max())


def test_a_4_bit_base_is_scored_and_nothing_of_the_model_changes(tiny_base: Path) -> None:
    adapter = tiny.random_adapter(tiny.MIXED)
    live = live_model(tiny_base, adapter, tiny.nf4_model)
    state = torch.get_rng_state()
    first = scores(live, EXAMPLES, TASK)

    assert all(values.max() > 0 for values in first.values())
    assert all(np.array_equal(values, first[name]) for name, values in scores(live, EXAMPLES, TASK).items())
    assert read_all(live).digest() == adapter.digest()
    assert all(parameter.grad is None for parameter in trainable_parameters(live).values())
    assert not any(live.model.get_submodule(name)._forward_hooks for name in live.slot.trained)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_direction_that_holds_nothing_has_no_score(tiny_base: Path) -> None:
    whole = tiny.random_adapter(tiny.MIXED)
    layers = {name: Pair(pair.a, np.where(np.arange(pair.rank) == 2, 0, pair.b)) for name, pair in whole.items()}
    found = scores(live_model(tiny_base, Adapter(layers)), EXAMPLES, TASK)

    assert all((values[2] == 0) == (len(values) > 2) for values in found.values() if len(values) > 2)
