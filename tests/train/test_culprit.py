"""A number that is not finite: the step is not taken, and the message says where it began."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edge_runtime.errors import RoundError  # noqa: E402 - after the check that torch is there
from edge_runtime.train import families  # noqa: E402 - as above
from edge_runtime.train.live import LiveModel  # noqa: E402 - as above
from edge_runtime.train.loop import LocalTask, train_round  # noqa: E402 - as above
from edge_runtime.train.loss import unwrap  # noqa: E402 - as above
from edge_runtime.train.resume import NotFiniteError  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

LORA = families.get("lora")
EXAMPLES = tiny.examples(10)
TASK = LocalTask(steps=4, learning_rate=1e-2, micro_batch=2, seed=7)


@pytest.fixture
def live(tiny_base: Path) -> LiveModel:
    made = LORA.attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
    LORA.load(made, tiny.random_adapter(tiny.MIXED))
    return made


def poison(parameter: Any, value: float) -> None:
    with torch.no_grad():
        parameter.view(-1)[0] = value


def after(steps: int, act: Callable[[], None]) -> Callable[[Any], None]:
    """Do something once so many steps are done."""

    def on_step(report: Any) -> None:
        if report.step == steps:
            act()

    return on_step


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj", "model.layers.2.input_layernorm", "model.layers.0.self_attn.v_proj"]
)
def test_a_broken_weight_of_the_base_is_named(live: LiveModel, name: str, value: float, checkpointing: bool) -> None:
    module = unwrap(live.model).get_submodule(name)
    poison(next(module.parameters()), value)
    task = LocalTask(steps=1, learning_rate=1e-2, gradient_checkpointing=checkpointing)

    expected = (
        rf"step 1: expected a finite loss, found (nan|inf), first in the output of '{name}[^']*', whose '\S+weight'"
    )
    with pytest.raises(NotFiniteError, match=expected.replace(r"\S+weight", r"\S*weight")) as caught:
        train_round(live, EXAMPLES, task)
    assert "lower learning_rate" in str(caught.value)


@pytest.mark.parametrize("leaf", ["a", "b"])
def test_a_broken_factor_of_the_adapter_is_named_by_its_layer(live: LiveModel, leaf: str) -> None:
    name = tiny.layer(1, "v_proj")
    poison(LORA.trainable(live)[f"{name}.{leaf}"], math.nan)

    with pytest.raises(RoundError, match=rf"in the output of '{name}[^']*', whose"):
        train_round(live, EXAMPLES, TASK)


def test_a_number_that_no_module_gives_out_is_placed_before_the_module_that_it_reaches(live: LiveModel) -> None:
    """Attention computes between its modules: the first that sees a broken product is the output projection."""
    causal = unwrap(live.model)
    taken = causal.get_submodule(tiny.layer(1, "o_proj"))
    taken.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * math.nan,))

    with pytest.raises(NotFiniteError, match=rf"first before '{tiny.layer(1, 'o_proj')}[^']*', whose input it reaches"):
        train_round(live, EXAMPLES, TASK)


def test_a_broken_head_is_named(live: LiveModel) -> None:
    head = unwrap(live.model).get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # no more that of the input
    poison(head.weight, math.nan)

    with pytest.raises(NotFiniteError, match="after the last layer, in the head or the loss"):
        train_round(live, EXAMPLES, TASK)


def test_a_gradient_that_is_not_finite_is_named_where_the_backward_pass_meets_it_first(live: LiveModel) -> None:
    """Layers 1 and 2 are trained, and a gradient that breaks at the output of layer 1 reaches what is below it."""
    layer = unwrap(live.model).get_submodule("model.layers.1")

    def broken(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden.register_hook(lambda gradient: gradient * math.inf)

    layer.register_forward_hook(broken)
    with pytest.raises(NotFiniteError, match=rf"finite gradient, found norm (nan|inf).*'{tiny.layer(1, 'v_proj')}\.b'"):
        train_round(live, EXAMPLES, TASK)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_last_good_state_comes_with_the_error_and_the_round_goes_on_from_it(
    live: LiveModel, tiny_base: Path, optimizer: str
) -> None:
    task = LocalTask(steps=4, learning_rate=1e-2, micro_batch=2, seed=7, optimizer=optimizer)
    whole = train_round(live, EXAMPLES, task).state
    other = LORA.attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
    LORA.load(other, tiny.random_adapter(tiny.MIXED))
    weight = unwrap(other.model).get_submodule("model.layers.1.mlp.down_proj").weight
    good = float(weight.view(-1)[0])
    with pytest.raises(NotFiniteError) as caught:
        train_round(other, EXAMPLES, task, on_step=after(2, lambda: poison(weight, math.nan)))
    state = caught.value.state
    assert state is not None
    assert state.reports == whole.reports[:2]
    poison(weight, good)
    resumed = train_round(other, EXAMPLES, task, start=state).state

    assert resumed.reports == whole.reports
    for name, values in whole.parameters.items():
        assert (resumed.parameters[name] == values).all()
