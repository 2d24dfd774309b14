"""A model that runs lean is the model: same loss and same gradients as transformers' own, for every tested class."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from edge_runtime.errors import BaseModelError  # noqa: E402 - after the check that torch is there
from edge_runtime.lora.adapter import LayerSlot, Slot  # noqa: E402 - as above
from edge_runtime.train.batches import pack_together  # noqa: E402 - as above
from edge_runtime.train.lean import REWRITTEN, lean  # noqa: E402 - as above
from edge_runtime.train.live import LiveModel, attach, load_adapter, trainable_parameters  # noqa: E402 - as above
from edge_runtime.train.loss import completion_loss  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

SIZES = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXAMPLES = tiny.examples(5, seed=3)
CPU = torch.device("cpu")


def model_of(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **CONFIGS.get(kind, {}), **more)
    return transformers.AutoModelForCausalLM.from_config(config)


def live_of(model: Any) -> LiveModel:
    slot = Slot(
        {
            name: LayerSlot(module.out_features, module.in_features, held=5, trained=3)
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in PROJECTIONS
        }
    )
    live = attach(model, slot, scaling=2.0)
    load_adapter(live, tiny.random_adapter(slot, size=0.2))
    return live


def stock(live: LiveModel) -> tuple[float, dict[str, Any]]:
    """Loss and gradients by transformers' own modules, one example at a time."""
    total: Any = 0.0
    for example in EXAMPLES:
        total = (
            total + completion_loss(live.model, torch.tensor([example.input_ids]), torch.tensor([example.labels])).total
        )
    return _gradients(live, total)


def ours(live: LiveModel, *, checkpointing: bool = False) -> tuple[float, dict[str, Any]]:
    row = pack_together(EXAMPLES, CPU)
    live.model.train()
    with lean(live.model):
        if checkpointing:
            live.model.gradient_checkpointing_enable({"use_reentrant": False})
        total = completion_loss(live.model, row.input_ids, row.labels, row.position_ids, row.lengths).total
        found = _gradients(live, total)
        if checkpointing:
            live.model.gradient_checkpointing_disable()
    return found


def _gradients(live: LiveModel, total: Any) -> tuple[float, dict[str, Any]]:
    parameters = trainable_parameters(live)
    found = torch.autograd.grad(total, list(parameters.values()))
    return float(total.detach()), dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_and_lean_is_as_transformers_computes_each_example_alone(kind: str, checkpointing: bool) -> None:
    live = live_of(model_of(kind))
    loss, gradients = stock(live)
    lean_loss, lean_gradients = ours(live, checkpointing=checkpointing)

    assert lean_loss == pytest.approx(loss, rel=1e-5)
    for name, exact in gradients.items():
        found = lean_gradients[name].flatten()
        assert torch.cosine_similarity(found, exact.flatten(), dim=0) > 0.9999, name
        assert (found - exact.flatten()).norm() <= 1e-3 * exact.norm(), name


def test_in_bfloat16_the_gradients_agree_to_its_rounding() -> None:
    live = live_of(model_of("llama"))
    loss, gradients = stock(live)
    for name, parameter in live.model.named_parameters():
        if not parameter.requires_grad and "held" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    lean_loss, lean_gradients = ours(live)
    whole, exact = (torch.cat([g.flatten() for g in found.values()]) for found in (lean_gradients, gradients))

    assert lean_loss == pytest.approx(loss, rel=2e-2)
    assert torch.cosine_similarity(whole, exact, dim=0) > 0.995


def test_every_rewritten_class_was_among_those_compared() -> None:
    classes = {type(module).__name__ for kind in CONFIGS for module in model_of(kind).modules()}

    assert REWRITTEN.keys() <= classes


def test_no_example_sees_another(tiny_base: Any) -> None:
    """The loss of one example does not move when another one in the pack changes."""
    model = tiny.plain_model(tiny_base)
    losses = []
    for other in (EXAMPLES[0], EXAMPLES[3]):
        row = pack_together([other, EXAMPLES[1]], CPU)
        labels = row.labels.clone()
        labels[:, : row.lengths[0]] = -100
        with lean(model), torch.no_grad():
            losses.append(float(completion_loss(model, row.input_ids, labels, row.position_ids, row.lengths).total))

    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_architecture_that_is_not_rewritten_is_packed_through_transformers_interface() -> None:
    live = live_of(model_of("phi3", pad_token_id=0))
    assert not {type(module).__name__ for module in live.model.modules()} & REWRITTEN.keys()
    loss, gradients = stock(live)
    lean_loss, lean_gradients = ours(live)

    assert lean_loss == pytest.approx(loss, rel=1e-5)
    for name, exact in gradients.items():
        assert torch.allclose(lean_gradients[name], exact, rtol=1e-3, atol=1e-5), name


def test_attention_that_does_more_is_refused_by_names_of_those_tested() -> None:
    model = model_of("mistral")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 4
    row = pack_together(EXAMPLES, CPU)

    with lean(model), pytest.raises(BaseModelError, match=r"sliding window of 4 tokens; tested architectures: Llama"):
        completion_loss(model, row.input_ids, row.labels, row.position_ids, row.lengths)


def test_afterwards_the_model_is_as_it_was(tiny_base: Any) -> None:
    model = tiny.plain_model(tiny_base)
    before = model.config._attn_implementation
    ids = torch.tensor([EXAMPLES[0].input_ids])
    plain = model(ids).logits
    with lean(model):
        pass

    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(ids).logits, plain)
