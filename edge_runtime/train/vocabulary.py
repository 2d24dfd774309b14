"""Whether a tokenizer belongs to a base model, and a name for what it does."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from edge_runtime.errors import BaseModelError, DataError


def check_vocabulary(tokenizer: Any, vocab_size: int, name: str) -> tuple[str, ...]:
    """Refuse a tokenizer whose ordinary tokens the base model has no embedding for, or that cannot end an answer.

    Tokens *added* beyond the embedding are no error as long as no text holds them: Gemma 3 1B comes with such a one
    (`<image_soft_token>`, id 262,144 of a vocabulary of 262,144). `token_cache.tokens_of` refuses an example that
    does.

    Args:
        tokenizer: a Hugging Face tokenizer.
        vocab_size: rows of the base model's input embedding.
        name: of the base, for the message.

    Returns:
        The added tokens for which the base has no embedding, by id; a caller may tell people of them.

    Raises:
        BaseModelError: names both numbers, or the end-of-sequence token that is missing.
    """
    if not tokenizer.eos_token:
        raise BaseModelError(
            f"expected the tokenizer of {name} to have an end-of-sequence token, which ends every answer; found none; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.vocab_size > vocab_size:  # the tokenizer's number leaves added tokens out
        raise BaseModelError(
            f"expected a tokenizer of at most {vocab_size} tokens, the embedding rows of {name}; found one of "
            f"{tokenizer.vocab_size}; use the tokenizer that the base was published with"
        )
    if not 0 <= tokenizer.eos_token_id < vocab_size:
        raise BaseModelError(
            f"expected the end-of-sequence token below id {vocab_size}, the embedding rows of {name}; found "
            f"{tokenizer.eos_token_id} ({tokenizer.eos_token}); use the tokenizer that the base was published with"
        )
    added = sorted(tokenizer.added_tokens_decoder.items())
    return tuple(str(token) for index, token in added if index >= vocab_size)


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) of all that decides which ids a text becomes: vocabulary, rules, chat template, end of sequence.

    Raises:
        DataError: the tokenizer does not show its vocabulary.
    """
    total = hashlib.sha256()
    for part in (_rules(tokenizer), json.dumps([tokenizer.chat_template, tokenizer.eos_token], sort_keys=True)):
        content = part.encode()
        total.update(len(content).to_bytes(8, "big"))
        total.update(content)
    return total.hexdigest()


def _rules(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = str(backend.to_str())
        # What stands before it, truncation and padding, changes with the last call of the tokenizer, and decides
        # nothing here.
        return rules[max(rules.find('"added_tokens"'), 0) :]
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if vocabulary is None:
        raise DataError(
            f"expected a tokenizer that shows its vocabulary (get_vocab), found {type(tokenizer).__name__}; without "
            "one, tokens cannot be kept: give no cache"
        )
    return json.dumps([type(tokenizer).__name__, sorted(vocabulary().items())])
