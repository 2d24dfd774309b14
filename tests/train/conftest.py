"""A tiny base model with random weights and a tokenizer of its own, for tests that need no real language."""

from __future__ import annotations

import inspect
import json
import string
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

# ChatML, as SmolLM2 and Qwen speak it, without an injected system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 512

BuildTinyBase = Callable[..., Path]


def _write_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([inspect.getsource(module) for module in (json, string, textwrap)], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0], unk_token=SPECIAL[0]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def _write_model(folder: Path, *, tied: bool, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        # Larger than usual, so that random logits differ enough for a test to tell two models apart.
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


@pytest.fixture(scope="session")
def build_tiny_base(tmp_path_factory: pytest.TempPathFactory) -> BuildTinyBase:
    """A function that writes one more tiny base: `build_tiny_base(tied=..., dtype=...)`, returns its folder."""

    def build(*, tied: bool = True, dtype: str = "float32") -> Path:
        folder = tmp_path_factory.mktemp("tiny-base")
        _write_tokenizer(folder)
        _write_model(folder, tied=tied, dtype=dtype)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_base(build_tiny_base: BuildTinyBase) -> Path:
    """A Hugging Face folder: Llama, hidden 64, 3 layers, 4 heads, 2 key/value heads, vocabulary 512, tied head, fp32.

    Shared by the whole session: read it, never write into it.
    """
    return build_tiny_base()
