"""Some layers recompute their activations, the others keep them: the gradients are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from edge_runtime.train.batches import pack_together  # noqa: E402 - after the check that torch is there
from edge_runtime.train.checkpointing import (  # noqa: E402 - as above
    backward_layers,
    checkpointing,
    decoder_layers,
    for_memory,
)
from edge_runtime.train.lean import lean  # noqa: E402 - as above
from edge_runtime.train.live import LiveModel, attach, load_adapter, trainable_parameters  # noqa: E402 - as above
from edge_runtime.train.loss import completion_loss  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

EVERY = tiny.slot_of({tiny.layer(index, module): (4, 4) for index in range(3) for module in ("q_proj", "o_proj")})
EXAMPLES = tiny.examples(4)


@pytest.fixture(scope="module", params=[tiny.plain_model, tiny.nf4_model], ids=["fp32", "nf4"])
def live(request: pytest.FixtureRequest, tiny_base: Path) -> LiveModel:
    """All three layers are trained."""
    build: Callable[[Path], Any] = request.param
    made = attach(build(tiny_base), EVERY, scaling=2.0)
    load_adapter(made, tiny.random_adapter(EVERY))
    return made


def gradients(live: LiveModel, recomputed: int | None) -> tuple[dict[str, Any], list[int]]:
    """Of one packed row in float32; and how often each layer ran."""
    runs: Counter[int] = Counter()
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
        for index, layer in enumerate(decoder_layers(live.model))
    ]
    row = pack_together(EXAMPLES, torch.device("cpu"))
    live.model.train()
    with lean(live.model), checkpointing(live.model, recomputed):
        completion_loss(live.model, row.input_ids, row.labels, row.position_ids, row.lengths).total.backward()
    for hook in hooks:
        hook.remove()
    parameters: dict[str, Any] = trainable_parameters(live)
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    live.model.zero_grad(set_to_none=True)
    return found, [runs[index] for index in range(3)]


@pytest.mark.parametrize(
    ("recomputed", "runs"),
    [(1, [2, 1, 1]), (2, [2, 2, 1]), (3, [2, 2, 2]), (None, [2, 2, 2]), (7, [2, 2, 2]), (0, [1, 1, 1])],
)
def test_the_first_layers_run_again_and_the_gradients_are_the_same_to_the_last_bit(
    live: LiveModel, recomputed: int | None, runs: list[int]
) -> None:
    plain, _ = gradients(live, 0)
    found, counted = gradients(live, recomputed)

    assert counted == runs
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, plain[name]), name
        assert gradient.abs().max() > 0


def test_layers_below_the_first_trained_one_do_not_count(tiny_base: Path) -> None:
    """Layer 0 is only held, 1 and 2 are trained: one recomputed is layer 1."""
    live = attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
    load_adapter(live, tiny.random_adapter(tiny.MIXED))

    assert list(backward_layers(live.model)) == list(decoder_layers(live.model))[1:]
    assert gradients(live, 1)[1] == [1, 2, 1]


def test_what_is_kept_of_the_last_layers_is_gone_before_the_first_of_the_others_is_recomputed(live: LiveModel) -> None:
    """So the memory that one layer recomputed needs and what the last layer keeps are never there together."""
    alive, at_recomputation = Counter[str](), []

    class Kept:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor
            alive["now"] += 1

        def __del__(self) -> None:
            alive["now"] -= 1

    first, last = decoder_layers(live.model)[0], decoder_layers(live.model)[2]
    row = pack_together(EXAMPLES, torch.device("cpu"))
    live.model.train()
    plain = last.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            return plain(*args, **kwargs)

    hook = first.mlp.register_forward_pre_hook(lambda *_: at_recomputation.append(alive["now"]))
    with lean(live.model), checkpointing(live.model, 2):
        last.forward = watched
        total = completion_loss(live.model, row.input_ids, row.labels, row.position_ids, row.lengths).total
        kept = alive["now"]
        total.backward()
        del last.forward
    hook.remove()
    live.model.zero_grad(set_to_none=True)

    assert kept > 0
    assert at_recomputation == [0, 0]


@pytest.mark.parametrize("recomputed", [None, 0, 1])
def test_afterwards_no_layer_is_recomputed_whatever_happened(live: LiveModel, recomputed: int | None) -> None:
    def interrupted() -> None:
        with checkpointing(live.model, recomputed):
            assert live.model.is_gradient_checkpointing == (recomputed != 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not live.model.is_gradient_checkpointing


@pytest.mark.parametrize(("recomputed", "expected"), [(None, True), (4, True), (3, True), (2, False), (0, False)])
def test_recomputing_all_but_the_last_layer_is_done_for_memory(recomputed: int | None, expected: bool) -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(4)]

    causal = SimpleNamespace(base_model_prefix="model", model=SimpleNamespace(layers=layers))

    assert for_memory(causal, recomputed) == expected
