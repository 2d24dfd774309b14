"""Small values for the tests of training: models, slots, adapters and examples, all decided by a seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.train.data import IGNORED, Tokenised

VOCABULARY = 512
SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}


def layer(index: int, module: str) -> str:
    """The path of an attention layer in the tiny base model."""
    return f"model.layers.{index}.self_attn.{module}"


def slot_of(ranks: Mapping[str, tuple[int, int]]) -> Slot:
    """A slot from layer path → (held, trained)."""
    return Slot(
        {
            name: LayerSlot(*SHAPES[name.rsplit(".", 1)[1]], held=held, trained=trained)
            for name, (held, trained) in ranks.items()
        }
    )


# Every case at once: trained in part, trained whole, only held, and nothing at all.
MIXED = slot_of(
    {
        layer(0, "q_proj"): (6, 0),
        layer(0, "k_proj"): (0, 0),
        layer(1, "q_proj"): (6, 4),
        layer(1, "v_proj"): (3, 3),
        layer(2, "q_proj"): (5, 2),
        layer(2, "o_proj"): (8, 1),
    }
)


def random_adapter(slot: Slot, seed: int = 0, size: float = 0.3) -> Adapter:
    """An adapter that fits a slot and changes the logits of the tiny base model well beyond rounding."""
    draw = np.random.default_rng(seed)
    return Adapter(
        {
            name: Pair(
                (size * draw.standard_normal((found.held, found.d_in))).astype(np.float32),
                (size * draw.standard_normal((found.d_out, found.held))).astype(np.float32),
            )
            for name, found in slot.layers.items()
            if found.held
        }
    )


def examples(count: int, seed: int = 0, longest: int = 24) -> tuple[Tokenised, ...]:
    """Prompts and completions of unequal length; each completion repeats its prompt's last token."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt = draw.integers(3, VOCABULARY, int(draw.integers(2, longest // 2)))
        completion = np.full(int(draw.integers(1, longest // 2)), prompt[-1])
        made.append(
            Tokenised(
                tuple(int(token) for token in (*prompt, *completion)),
                (IGNORED,) * len(prompt) + tuple(int(token) for token in completion),
            )
        )
    return tuple(made)


def plain_model(folder: Path) -> Any:
    """The tiny base model in float32."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - a heavy extra

    return AutoModelForCausalLM.from_pretrained(folder)


def nf4_model(folder: Path) -> Any:
    """The tiny base model with 4-bit linear layers that compute in float32, as it comes from transformers.

    On CPUs with bfloat16 instructions its evaluation differs from its training by bitsandbytes' packed kernels, until
    `keep_gradients` turns them off.
    """
    import torch  # noqa: PLC0415 - a heavy extra
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: PLC0415 - a heavy extra

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    # Without a dtype, transformers would load what is not quantised as float16.
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def int8_model(folder: Path) -> Any:
    """The tiny base model with 8-bit linear layers, all but its head, that computes in float32."""
    import torch  # noqa: PLC0415 - a heavy extra

    from edge_runtime.train.eight_bit import Int8Linear  # noqa: PLC0415 - as above

    model = plain_model(folder)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear.of(module))
    return model
