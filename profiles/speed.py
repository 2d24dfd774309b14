"""Predicted seconds per optimiser step, from the measured rate of matrix products: first form.

    pass = products / (EFFICIENCY · rate) + layer passes · LAYER_SECONDS + weights opened · OPEN_SECONDS
    step = accumulation · pass

Products: two floating-point operations per weight and token in the forward pass of every layer, as many for the
gradient of the inputs of every trained layer (frozen weights have none of their own), once more for each that is
recomputed; the adapters' own (forward, and both gradients of what is trained); and the head, forward and backward.
Attention's products, quadratic in the length, are counted too.

Source: the count is arithmetic; the three constants were fitted on SmolLM2-135M at 128 to 512 tokens on one thread of
x86-64 with avx512_bf16 (1.00 s predicted and 0.85 s found at best for 30 layers, rank 8, 128 tokens in bf16). Expect a
third either way on another machine: the time that memory takes is not modelled.
"""

from __future__ import annotations

from edge_runtime.errors import ConfigError
from profiles.card import ModelCard
from profiles.device import DeviceProfile
from profiles.memory import Setting

# Of the rate of bare products, what a whole training step reaches: norms, activations and copies take the rest.
EFFICIENCY = 0.55
# Calling the operations of one layer once, whatever their size.
LAYER_SECONDS = 0.002
# Opening one 4-bit weight, once per pass.
OPEN_SECONDS = 3e-10


def seconds_per_step(profile: DeviceProfile, card: ModelCard, setting: Setting, accumulation: int = 1) -> float:
    """Predicted seconds of one optimiser step.

    Args:
        profile: a device whose matrix products were measured.
        card: the base model.
        setting: how it is trained.
        accumulation: forward passes per optimiser step.

    Raises:
        ConfigError: the profile has no measured rate for the setting's compute type.
        BaseModelError: a target module that the model does not have.
    """
    rate = profile.gemm_bf16_gflops if setting.compute_dtype == "bf16" else profile.gemm_fp32_gflops
    if rate <= 0:
        raise ConfigError(
            f"{profile.name} has no measured rate of {setting.compute_dtype} products; probe it with measurements"
        )
    trained = setting.layers_trained
    passes = card.num_layers + trained * (2 if setting.gradient_checkpointing else 1)
    opened = passes * card.layer_linear_parameters if setting.precision == "nf4" else 0
    products = operations(card, setting) / (EFFICIENCY * rate * 1e9)
    return accumulation * (products + passes * LAYER_SECONDS + opened * OPEN_SECONDS)


def operations(card: ModelCard, setting: Setting) -> int:
    """Floating-point operations of one forward and backward pass."""
    tokens, trained, layers = setting.tokens, setting.layers_trained, card.num_layers
    again = trained if setting.gradient_checkpointing else 0
    per_rank = card.rank_parameters(setting.target_modules)
    attention = 2 * setting.max_length * card.num_heads * card.head_dim
    layer = 2 * tokens * (card.layer_linear_parameters + attention + setting.held * per_rank)
    gradients = 2 * tokens * trained * setting.rank * per_rank
    head = 2 * tokens * card.vocab_size * card.hidden_size
    return layer * (layers + trained + again) + gradients + 2 * head
