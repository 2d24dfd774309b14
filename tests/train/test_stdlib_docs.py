"""The standard library as training data: enough of it, the same on every run, and without side effects."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from edge_runtime.errors import DataError
from edge_runtime.train.stdlib_docs import GROUPS, MAX_COMPLETION, MIN_COMPLETION, doc_pairs, first_words

DIGEST = (
    "import hashlib, sys; from edge_runtime.train.stdlib_docs import GROUPS, doc_pairs; "
    "words = repr([doc_pairs(group) for group in GROUPS]); "
    "strange = {'torch', 'numpy', 'transformers', 'tkinter', 'antigravity', 'this', 'turtle', 'readline'}; "
    "print(hashlib.sha256(words.encode()).hexdigest(), *sorted(strange & set(sys.modules)))"
)


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_each_group_is_large_enough_and_says_nothing_twice(group: str) -> None:
    pairs = doc_pairs(group)

    assert len(pairs) >= 60
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    assert len({pair.completion for pair in pairs}) == len(pairs)
    assert all(MIN_COMPLETION <= len(pair.completion) <= MAX_COMPLETION for pair in pairs)
    assert all("0x" not in pair.prompt and "def " in pair.prompt for pair in pairs)
    assert not any(">>>" in pair.completion for pair in pairs)


def test_another_process_with_another_hash_seed_reads_the_same_and_imports_nothing_strange() -> None:
    """Warnings are errors there: no deprecated module is touched."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DIGEST],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )

    here = hashlib.sha256(repr([doc_pairs(group) for group in GROUPS]).encode()).hexdigest()
    assert done.stdout.split() == [here]


@pytest.mark.torch
def test_what_other_libraries_do_to_the_standard_library_changes_nothing() -> None:
    before = [doc_pairs(group) for group in GROUPS]
    for library in ("torch", "transformers", "bitsandbytes", "peft"):
        pytest.importorskip(library)

    assert [doc_pairs(group) for group in GROUPS] == before


def test_an_unknown_group_lists_the_groups() -> None:
    with pytest.raises(DataError, match=r"'cooking'.*concurrency.*networking"):
        doc_pairs("cooking")


def test_a_module_this_interpreter_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = doc_pairs("text")
    monkeypatch.setitem(GROUPS, "text", ("no_such_module_at_all", *GROUPS["text"]))

    assert doc_pairs("text") == whole


def test_only_whole_paragraphs_that_fit_are_kept() -> None:
    assert first_words(f"One line.\n\n{'long ' * 100}", "f") == "One line."
    assert first_words("One\n   line.\n\n   Two\n   lines.", "f") == "One line.\n\nTwo lines."


def test_a_first_paragraph_that_is_too_long_ends_at_a_sentence_or_a_word() -> None:
    assert first_words(f"A sentence. {'word ' * 100}", "f") == "A sentence."

    cut = first_words("word " * 100, "f")
    assert len(cut) <= MAX_COMPLETION
    assert set(cut.split()) == {"word"}


def test_signature_lines_and_doctests_are_left_out() -> None:
    assert first_words("f(x) -> int\n\nReturn x.\n\n>>> f(1)\n1\n\nMore.", "f") == "Return x."
    assert first_words("", "f") == ""
