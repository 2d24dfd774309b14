"""Predicted peak memory of one training process: a sum of named parts, each from a formula or a measurement.

`PARTS` explains each. The peak is what the kernel calls the resident set at its largest, pages of files included.

Source of the activations per token and layer: read in `edge_runtime.train.lean`, and equal to what
`torch.autograd.graph.saved_tensors_hooks` counted on SmolLM2-135M (12,680 bytes in bf16 with q, k, v, o as targets,
16,904 with all seven, without the angles that all layers share). NF4 with double quantisation: 0.5 B per weight, one
8-bit scale per 64 and one float32 per 16,384 weights (Dettmers et al., QLoRA, arXiv 2305.14314, section 3). The
constants were fitted on fresh processes on x86-64 Linux (torch 2.13 for CPUs, transformers 4.57, bitsandbytes 0.50)
with the heap kept in order by `edge_runtime.train.heap`;
benchmarks/memory_prediction.py says how far the sums are from the truth. The base
is taken to be on disk at its precision. Predictions for GPUs follow the same formulas and are not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from edge_runtime.errors import ConfigError, unknown_name
from profiles import families
from profiles.card import ModelCard
from profiles.device import MIB

# Bytes per weight of a linear layer.
PRECISIONS: Mapping[str, float] = {
    "nf4": 0.5 + 1 / 64 + 4 / 16384,
    "int8": 1.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp32": 4.0,
}

# Those that lose enough of a weight for its leading directions to be worth regaining (int8 costs SmolLM2-135M 0.2 % of
# its loss, and nothing of that comes back: benchmarks/mixed_precision.py), and bytes of a number of those.
REGAINABLE = ("nf4",)
REGAINED_BYTES = 2

# Bytes per number of activations and embeddings.
COMPUTE_DTYPES: Mapping[str, int] = {"bf16": 2, "fp32": 4}

# Bytes per trained number, by optimiser: parameter and gradient in float32, and two moments, each of 4 bytes, or of one
# byte and a float32 scale for 256 of them (arXiv 2110.02861). What an 8-bit update opens is one tensor, for a moment.
TRAINED_BYTES: Mapping[str, float] = {"adamw": 4 + 4 + 8, "adamw_8bit": 4 + 4 + 2 * (1 + 4 / 256)}
# Tensors of fewer numbers keep their moments in float32 with either; the default of bitsandbytes.
LEAST_8BIT = 4096
FP32_BYTES = 4

# Modules that read the same input.
READERS = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"o_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"down_proj"}),
)

# The loss is computed over as many tokens at a time as fit their float32 logits in here.
LOGITS_BYTES = 8 * MIB
# ... but no fewer tokens than this, because each chunk reads the whole head.
CHUNK_LEAST = 32

RUNTIME_BYTES = 399 * MIB
CLIENT_BYTES = 18 * MIB
TOKENIZER_BYTES_PER_ENTRY = 150
# A CUDA context with its libraries, on the card; what is published lies between 0.3 and 0.6 GB.
CUDA_CONTEXT_BYTES = 600 * MIB

# Which of the two floors fills the memory that is being planned.
FLOORS: Mapping[str, int] = {
    "host": RUNTIME_BYTES,
    "gpu": CUDA_CONTEXT_BYTES,
    "shared": RUNTIME_BYTES + CUDA_CONTEXT_BYTES,
}

# What the backward pass through one layer needs for a moment, as a share of what the layer keeps.
GRADIENTS_SHARE = 1.6
# Pages of glibc's heap that are held without use, as a share of what comes and goes between two releases of it.
HEAP_SHARE = 0.8
# CUDA's caching allocator rounds and keeps blocks: a tenth of what comes and goes.
GPU_SHARE = 0.1

PARTS: Mapping[str, str] = {
    "runtime": "interpreter, torch, transformers and bitsandbytes after their first step; on a GPU its context",
    "client": "this project's own libraries, and the tokenizer by its vocabulary",
    "base_weights": "linear weights at the plan's precision, with their scales and what is regained of their loss",
    "embeddings": "embedding, head and norms in the compute type",
    "dequantised": "the largest weight that is kept in another type, opened for one product",
    "casts": "what enters and leaves one product, where it is computed in another type than the activations have",
    "held_adapter": "directions that are held and not trained, float32, and what was received of the trained ones",
    "trained_adapter": "parameter, gradient and two moments of each trained number: 16 bytes, 10 with 8-bit moments, "
    "and 4 for each copy that a term beside the loss needs",
    "activations": "kept for the backward pass: of each trained layer its input if it is recomputed, or else all",
    "backward": "one layer in its backward pass: its gradients, and what it recomputes beyond what was given back",
    "logits": "one chunk of the head's output in both types, and the sum of its exponentials",
    "slack": "pages that the allocator holds without using them",
}


@dataclass(frozen=True)
class Setting:
    """One way to train: everything about a plan that decides how much memory and time it takes.

    Attributes:
        target_modules: suffixes of the modules with an adapter, such as q_proj.
        rank: directions trained in each target of each trained layer.
        held: directions held in each target of every layer, the trained ones included.
        layers_trained: the last so many layers are trained.
        precision: how the base's linear weights are kept: nf4, int8, bf16, fp16 or fp32.
        compute_dtype: type of activations: bf16 or fp32.
        product_dtype: type in which the linear layers multiply; None for that of the activations.
        micro_batch: sequences per forward pass.
        max_length: tokens per sequence.
        gradient_checkpointing: recompute trained layers in the backward pass.
        trained_modules: those of the target modules that are trained; the others are held only. None for all.
        recomputed_layers: with checkpointing, the first so many of the trained layers are recomputed, and the last ones
            keep their activations; None for all of them. Without checkpointing it says nothing.
        optimizer: a name in TRAINED_BYTES.
        copies: of the trained numbers in float32 that terms beside the loss need.
        family: a name in `profiles.families.FAMILIES`.
        regained: directions of what a quantised base lost beside each of its linear layers.
    """

    target_modules: tuple[str, ...]
    rank: int
    held: int
    layers_trained: int
    precision: str = "nf4"
    compute_dtype: str = "bf16"
    micro_batch: int = 1
    max_length: int = 256
    gradient_checkpointing: bool = True
    trained_modules: tuple[str, ...] | None = None
    recomputed_layers: int | None = None
    optimizer: str = "adamw"
    product_dtype: str | None = None
    copies: int = 0
    family: str = "lora"
    regained: int = 0

    def __post_init__(self) -> None:
        families.family(self.family)
        if self.precision not in PRECISIONS:
            raise ConfigError(unknown_name("precision", self.precision, PRECISIONS))
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ConfigError(unknown_name("compute dtype", self.compute_dtype, COMPUTE_DTYPES))
        if self.products not in COMPUTE_DTYPES:
            raise ConfigError(unknown_name("product dtype", self.products, COMPUTE_DTYPES))
        if self.optimizer not in TRAINED_BYTES:
            raise ConfigError(unknown_name("optimizer", self.optimizer, TRAINED_BYTES))
        if self.recomputed_layers is not None and not 0 <= self.recomputed_layers <= self.layers_trained:
            raise ConfigError(
                f"expected between 0 and all {self.layers_trained} trained layers to be recomputed; "
                f"found {self.recomputed_layers}"
            )
        if not 0 < self.rank <= self.held:
            raise ConfigError(f"expected 0 < rank <= held; found rank {self.rank}, held {self.held}")
        if self.copies < 0:
            raise ConfigError(f"expected no copy of the trained numbers or some; found {self.copies}")
        if self.regained < 0:
            raise ConfigError(f"expected no direction to be regained or some; found {self.regained}")
        counts = (self.layers_trained, self.micro_batch, self.max_length)
        if min(counts) < 1:
            raise ConfigError(f"layers trained, micro-batch and length are at least 1; found {counts}")
        if not self.trained or not set(self.trained) <= set(self.target_modules):
            raise ConfigError(
                f"expected at least one trained module out of {', '.join(self.target_modules)}; found {self.trained}"
            )

    @property
    def trained(self) -> tuple[str, ...]:
        """The modules that are trained."""
        return self.target_modules if self.trained_modules is None else self.trained_modules

    @property
    def products(self) -> str:
        """The type in which the linear layers multiply."""
        return self.product_dtype or self.compute_dtype

    @property
    def recomputed(self) -> int:
        """Trained layers that run once more in the backward pass."""
        if not self.gradient_checkpointing:
            return 0
        return self.layers_trained if self.recomputed_layers is None else self.recomputed_layers

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass, virtual ones included."""
        virtual = self.held if families.family(self.family).virtual else 0
        return self.micro_batch * (self.max_length + virtual)


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted peak, part by part, in bytes; `PARTS` explains each."""

    runtime: int
    client: int
    base_weights: int
    embeddings: int
    dequantised: int
    casts: int
    held_adapter: int
    trained_adapter: int
    activations: int
    backward: int
    logits: int
    slack: int

    @property
    def total(self) -> int:
        """The predicted peak, in bytes."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Part → bytes, in the order of `PARTS`."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def describe(self, most: int | None = None) -> str:
        """The parts that matter, largest first, on one line; at most `most` of them."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])[:most]
        return ", ".join(f"{name.replace('_', ' ')} {size / MIB:.0f} MiB" for name, size in ordered if size >= MIB)


def estimate(card: ModelCard, setting: Setting, pool: str = "host") -> MemoryEstimate:
    """Predicted peak of training `card` as `setting` says.

    Args:
        card: the base model.
        setting: how it is trained.
        pool: which memory fills up: "host", "gpu" or "shared" (see `DeviceProfile.pool`).

    Raises:
        ConfigError: an unknown pool, or more layers trained than the model has.
        BaseModelError: a target module that the model does not have.
    """
    if pool not in FLOORS:
        raise ConfigError(unknown_name("memory pool", pool, FLOORS))
    if setting.layers_trained > card.num_layers:
        raise ConfigError(f"{card.name} has {card.num_layers} layers; found {setting.layers_trained} to be trained")
    held = families.numbers(card, setting.family, setting.target_modules, setting.held, card.num_layers)
    layer = setting.tokens * saved_bytes_per_token(card, setting)
    entry = setting.tokens * card.hidden_size * COMPUTE_DTYPES[setting.compute_dtype]
    again = layer if setting.recomputed else 0
    heap = int((HEAP_SHARE if pool == "host" else GPU_SHARE) * again)
    # The layers that keep all are the last, so the backward pass has let go of it when the first one is recomputed:
    # either they are at their largest, or what is recomputed is, and one layer that keeps all costs nothing.
    whole = (setting.layers_trained - setting.recomputed) * layer
    beyond = max(0, again - whole)
    return MemoryEstimate(
        runtime=FLOORS[pool],
        client=0 if pool == "gpu" else CLIENT_BYTES + TOKENIZER_BYTES_PER_ENTRY * card.vocab_size,
        base_weights=_base_weights(card, setting),
        embeddings=_embeddings(card, setting, pool),
        dequantised=_dequantised(card, setting),
        casts=_casts(card, setting),
        held_adapter=held * FP32_BYTES,
        trained_adapter=_trained_adapter(card, setting),
        activations=setting.recomputed * entry + whole,
        backward=int(GRADIENTS_SHARE * layer) + beyond,
        logits=_logits(card, setting),
        slack=max(0, again + heap - whole) - beyond,
    )


def saved_bytes_per_token(card: ModelCard, setting: Setting) -> int:
    """What one trained layer keeps of one token for its backward pass, in bytes.

    The input of a product is kept where directions that read it are trained, once for all that read it; a frozen
    product keeps nothing.
    """
    targets = set(setting.trained)
    reads = families.family(setting.family).reads
    read = sum(card.shape(next(iter(group)))[1] for group in READERS if reads and group & targets)
    read += families.kept(card, setting.family, setting.trained, setting.rank)
    attention = (card.num_heads + 2 * card.num_kv_heads) * card.head_dim
    numbers = 2 * card.hidden_size + attention + 2 * card.intermediate_size + read
    return COMPUTE_DTYPES[setting.compute_dtype] * numbers + 2 * FP32_BYTES


def regained_numbers(card: ModelCard, setting: Setting) -> int:
    """Numbers of what one layer has regained beside its linear modules."""
    if setting.precision not in REGAINABLE:
        return 0
    return sum(min(setting.regained, *shape) * sum(shape) for shape in card.projections.values())


def trained_numbers(card: ModelCard, setting: Setting) -> int:
    """Numbers that the optimiser updates."""
    return families.numbers(card, setting.family, setting.trained, setting.rank, setting.layers_trained)


def chunk_tokens(card: ModelCard, setting: Setting) -> int:
    """Tokens whose logits exist at once."""
    return min(max(CHUNK_LEAST, LOGITS_BYTES // (FP32_BYTES * card.vocab_size)), setting.tokens)


def _trained_adapter(card: ModelCard, setting: Setting) -> int:
    plain = trained_numbers(card, setting) * (TRAINED_BYTES["adamw"] + setting.copies * FP32_BYTES)
    saved = TRAINED_BYTES["adamw"] - TRAINED_BYTES[setting.optimizer]
    if not saved:
        return int(plain)
    factors = families.sizes(card, setting.family, setting.trained, setting.rank, setting.layers_trained)
    return int(plain - saved * sum(size for size in factors if size >= LEAST_8BIT))


def _base_weights(card: ModelCard, setting: Setting) -> int:
    scales = sum(d_out for d_out, _ in card.projections.values()) * card.num_layers * 2
    regained = REGAINED_BYTES * card.num_layers * regained_numbers(card, setting)
    weights = int(card.linear_parameters * PRECISIONS[setting.precision])
    return weights + regained + (scales if setting.precision == "int8" else 0)


def _embeddings(card: ModelCard, setting: Setting, pool: str) -> int:
    numbers = card.embedding_parameters + card.vector_parameters
    if setting.compute_dtype == "fp32" and setting.precision == "nf4" and pool == "host":
        return numbers * (4 + 2)  # the bf16 file stays mapped beside the float32 copy
    return numbers * COMPUTE_DTYPES[setting.compute_dtype]


def _dequantised(card: ModelCard, setting: Setting) -> int:
    """The largest linear weight in the type that it is multiplied in."""
    copies = int(setting.precision != setting.products) + families.family(setting.family).opened
    return copies * max(d_out * d_in for d_out, d_in in card.projections.values()) * COMPUTE_DTYPES[setting.products]


def _casts(card: ModelCard, setting: Setting) -> int:
    """Input, output and gradient of the widest product, in the type that it is computed in."""
    if setting.products == setting.compute_dtype:
        return 0
    widest = max(d_out + 2 * d_in for d_out, d_in in card.projections.values())
    return setting.tokens * widest * COMPUTE_DTYPES[setting.products]


def _logits(card: ModelCard, setting: Setting) -> int:
    """A chunk's logits in float32, twice while they are summed, and in the compute type where that is another one."""
    chunk = chunk_tokens(card, setting)
    other = COMPUTE_DTYPES[setting.compute_dtype]
    return chunk * card.vocab_size * (2 * FP32_BYTES + (other if other != FP32_BYTES else 0))
