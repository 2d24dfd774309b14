"""Predicted seconds per optimiser step, from what the probe measured on this very device.

    step = accumulation · (products + attention + adapters + opened + traffic + calls) + optimizer

`PARTS` explains each. Products are counted as two operations per weight and token in the forward pass of every layer,
as many for the gradient of the inputs of every trained layer (frozen weights have none of their own), once more for
each layer that is recomputed; the adapters' own; the head, forward and backward; attention's, quadratic in the length.

Source: the counts are arithmetic and were read in `edge_runtime.train.lean`; the factors below were fitted on
runs of benchmarks/speed_prediction.py on two cores of x86-64. Examples are taken to have full length: shorter ones
take less.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.errors import ConfigError
from profiles import families
from profiles.card import ModelCard
from profiles.device import DeviceProfile
from profiles.memory import (
    COMPUTE_DTYPES,
    FP32_BYTES,
    PRECISIONS,
    Setting,
    chunk_tokens,
    regained_numbers,
    saved_bytes_per_token,
    trained_numbers,
)

# Times that a product takes what it would at the measured rate, whose weights stay in a cache.
PRODUCTS_TIMES = 1.35
ATTENTION_TIMES = 1.0
ADAPTER_TIMES = 1.2
# A backward pass of attention, in forward passes.
ATTENTION_BACKWARD = 2.5
# Times that opening a weight takes what it does in a cache.
OPENED_TIMES = 3.8
# Times that what a layer keeps for its backward pass goes through memory, in one pass over the layer: norms,
# activations and residuals; and the same of what enters and leaves an adapter in float32, with casts, scaling and sums.
TRAFFIC_TIMES = 1.4
ADAPTER_TRAFFIC_TIMES = 3.5
# The same of what is cast into the type of a product, and back.
CAST_TIMES = 1.0
# The head, which no cache holds.
HEAD_TRAFFIC_TIMES = 1.0
# Small bare calls that one pass over a layer is worth: its operations, the Python, modules and autograd around them,
# and the heap that is released.
CALLS_PER_LAYER = 4350
# What an update moves through memory for each trained number, in bytes at the measured bandwidth. For 4.9 million of
# them (rank 16, all seven modules of SmolLM2-135M) it took 0.0061 s with torch's fused AdamW, and 0.1375 s with the
# 8-bit one of bitsandbytes 0.50, which for processors is written in torch: the best of four, one thread, 41.6 GB/s.
UPDATE_BYTES: Mapping[str, float] = {"adamw": 52.0, "adamw_8bit": 1170.0}

PARTS: Mapping[str, str] = {
    "products": "matrix products of layers and head, at the measured rate of the model's own shapes",
    "attention": "products of attention, quadratic in the length",
    "adapters": "products of what is held, trained and regained",
    "opened": "quantised weights opened at the measured rate, once in each pass over a layer",
    "traffic": "what norms, activations, casts and attention read and write, at the measured bandwidth",
    "optimizer": "the update of what is trained, once a step: 8-bit moments take some twenty times as long",
    "calls": "operations started, at the measured cost of one: most of the time of small models on slow processors",
}

_OPENED: Mapping[str, str] = {"nf4": "nf4_gweights_s", "int8": "int8_gweights_s"}


def shapes(card: ModelCard, tokens: int = 128) -> tuple[tuple[int, int, int], ...]:
    """(tokens, d_in, d_out) of the model's own products, each once: where the probe should measure rates."""
    return tuple(sorted({(tokens, d_in, d_out) for d_out, d_in in card.projections.values()}))


def measured(profile: DeviceProfile, setting: Setting) -> bool:
    """Whether the profile has every rate that a prediction for this setting needs."""
    return not _missing(profile, setting)


def seconds_per_step(profile: DeviceProfile, card: ModelCard, setting: Setting, accumulation: int = 1) -> float:
    """Predicted seconds of one optimiser step.

    Args:
        profile: a device whose rates were measured.
        card: the base model.
        setting: how it is trained.
        accumulation: forward passes per optimiser step.

    Raises:
        ConfigError: the profile lacks a rate that this setting needs.
        BaseModelError: a target module that the model does not have.
    """
    missing = _missing(profile, setting)
    if missing:
        raise ConfigError(f"{profile.name} has no measured {', '.join(missing)}; probe it with measurements")
    return sum(parts(profile, card, setting, accumulation).values())


def parts(profile: DeviceProfile, card: ModelCard, setting: Setting, accumulation: int = 1) -> dict[str, float]:
    """Part (a key of `PARTS`) → seconds of one optimiser step with so many forward and backward passes."""
    bandwidth = profile.memory_bandwidth_gb_s * 1e9
    update = UPDATE_BYTES[setting.optimizer] * trained_numbers(card, setting) / bandwidth
    found = {name: accumulation * seconds for name, seconds in _one_pass(profile, card, setting).items()}
    return {name: update if name == "optimizer" else found[name] for name in PARTS}


def _one_pass(profile: DeviceProfile, card: ModelCard, setting: Setting) -> dict[str, float]:
    """The same of one forward and backward pass, which updates nothing."""
    passes = card.num_layers + setting.recomputed + setting.layers_trained
    opened = 0.0
    weights = card.layer_linear_parameters
    bandwidth = profile.memory_bandwidth_gb_s * 1e9
    if setting.precision in _OPENED:
        rate = getattr(profile, _OPENED[setting.precision]) * 1e9
        opened = OPENED_TIMES * passes * weights / rate
    elif setting.precision != setting.products:
        opened = passes * weights * (PRECISIONS[setting.precision] + COMPUTE_DTYPES[setting.products]) / bandwidth
    adapters = 2 if setting.held > setting.rank else 1
    touched = sum(sum(families.shape(card, setting.family, module)) for module in setting.target_modules)
    inside = touched * FP32_BYTES * adapters
    per_token = TRAFFIC_TIMES * saved_bytes_per_token(card, setting) + ADAPTER_TRAFFIC_TIMES * inside
    if setting.products != setting.compute_dtype:
        both = COMPUTE_DTYPES[setting.products] + COMPUTE_DTYPES[setting.compute_dtype]
        per_token += CAST_TIMES * both * sum(d_out + d_in for d_out, d_in in card.projections.values())
    # Each chunk of the loss reads the whole head, forward and backward.
    chunks = -(-setting.tokens // chunk_tokens(card, setting))
    head = HEAD_TRAFFIC_TIMES * 2 * chunks * card.vocab_size * card.hidden_size * COMPUTE_DTYPES[setting.compute_dtype]
    counted = operations(card, setting)
    rate = _rate(profile, setting) * 1e9
    return {
        "products": PRODUCTS_TIMES * counted["dense"] / rate,
        "attention": ATTENTION_TIMES * counted["attention"] / rate,
        "adapters": ADAPTER_TIMES * counted["adapters"] / (profile.gemm_fp32_gflops * 1e9),
        "opened": opened,
        "traffic": (passes * setting.tokens * per_token + head) / bandwidth,
        "calls": passes * CALLS_PER_LAYER * profile.op_overhead_us * 1e-6,
    }


def operations(card: ModelCard, setting: Setting) -> dict[str, int]:
    """Floating-point operations of one forward and backward pass: dense layers and head, attention, adapters."""
    tokens, trained, layers = setting.tokens, setting.layers_trained, card.num_layers
    passes = layers + setting.recomputed + trained
    attention = 4 * tokens * setting.max_length * card.num_heads * card.head_dim
    adapters = families.numbers(card, setting.family, setting.target_modules, setting.held, passes)
    gradients = families.numbers(card, setting.family, setting.trained, setting.rank, trained)
    return {
        "dense": 2 * tokens * (passes * card.layer_linear_parameters + 2 * card.vocab_size * card.hidden_size),
        "attention": int(attention * (layers + setting.recomputed + ATTENTION_BACKWARD * trained)),
        "adapters": 2 * tokens * (adapters + gradients + passes * regained_numbers(card, setting)),
    }


def _rate(profile: DeviceProfile, setting: Setting) -> float:
    return profile.gemm_bf16_gflops if setting.products == "bf16" else profile.gemm_fp32_gflops


def _missing(profile: DeviceProfile, setting: Setting) -> list[str]:
    needed = {
        f"rate of {setting.products} products": _rate(profile, setting),
        "rate of fp32 products": profile.gemm_fp32_gflops,
        "memory bandwidth": profile.memory_bandwidth_gb_s,
        "cost of a call": profile.op_overhead_us,
    }
    if setting.precision in _OPENED:
        needed[f"rate of opening {setting.precision} weights"] = getattr(profile, _OPENED[setting.precision])
    return [name for name, value in needed.items() if value <= 0]
