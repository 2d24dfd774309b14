"""A tokenizer of another model is refused before it reads past the embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import BaseModelError, DataError
from edge_runtime.train.vocabulary import check_vocabulary, fingerprint
from tests.train.conftest import VOCABULARY

pytestmark = pytest.mark.torch


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tiny_base)


def test_the_tokenizer_that_belongs_to_a_base_is_taken(tokenizer: Any) -> None:
    assert check_vocabulary(tokenizer, VOCABULARY, "tiny") == ()
    # Many bases pad their embedding to a round number of rows.
    assert check_vocabulary(tokenizer, VOCABULARY + 100, "tiny") == ()


def test_a_larger_vocabulary_is_refused_with_both_numbers(tokenizer: Any) -> None:
    with pytest.raises(BaseModelError, match=r"at most 300 tokens, the embedding rows of tiny; found one of 512; use"):
        check_vocabulary(tokenizer, 300, "tiny")


def test_added_tokens_without_an_embedding_are_told_of(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<image>", "<sound>"])

    assert check_vocabulary(tokenizer, VOCABULARY, "tiny") == ("<image>", "<sound>")
    assert check_vocabulary(tokenizer, VOCABULARY + 1, "tiny") == ("<sound>",)


def test_an_answer_must_have_an_end_that_the_base_knows(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(BaseModelError, match=r"below id 512, the embedding rows of tiny; found 512 \(<end>\)"):
        check_vocabulary(tokenizer, VOCABULARY, "tiny")

    tokenizer.eos_token = None
    with pytest.raises(BaseModelError, match="tokenizer of tiny to have an end-of-sequence token"):
        check_vocabulary(tokenizer, VOCABULARY, "tiny")


def test_the_fingerprint_stays_while_a_tokenizer_is_used_and_loaded_again(tokenizer: Any, tiny_base: Path) -> None:
    before = fingerprint(tokenizer)

    tokenizer(["a text", "another, longer text"], padding="max_length", truncation=True, max_length=3)

    assert fingerprint(tokenizer) == before
    transformers = pytest.importorskip("transformers")
    assert fingerprint(transformers.AutoTokenizer.from_pretrained(tiny_base)) == before


def test_the_fingerprint_changes_with_all_that_changes_ids(tokenizer: Any) -> None:
    found = [fingerprint(tokenizer)]
    tokenizer.chat_template += " "
    found.append(fingerprint(tokenizer))
    tokenizer.add_tokens(["<image>"])
    found.append(fingerprint(tokenizer))
    tokenizer.eos_token = tokenizer.pad_token
    found.append(fingerprint(tokenizer))
    tokenizer.backend_tokenizer.normalizer = pytest.importorskip("tokenizers").normalizers.Lowercase()
    found.append(fingerprint(tokenizer))

    assert len(set(found)) == len(found)


def test_a_tokenizer_that_hides_its_vocabulary_has_no_fingerprint() -> None:
    class Hidden:
        chat_template = None
        eos_token = None

    with pytest.raises(DataError, match="shows its vocabulary"):
        fingerprint(Hidden())
