"""Tokens on disk are the tokens of the tokenizer, made once, and made anew when anything about them is wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.errors import DataError
from edge_runtime.train import token_cache
from edge_runtime.train.data import Example, Message, TokenisedSet, load_examples, tokenise, tokenise_all
from edge_runtime.train.flat_tokens import FlatTokens, lengths_of
from edge_runtime.train.token_cache import Long, in_words, tokens_of
from edge_runtime.train.vocabulary import check_vocabulary

laws = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


class Letters:
    """One token per character, and a vocabulary to be known by."""

    def __init__(self, *, eos: str = "\x00", template: str | None = None, largest: int = 0x10FFFF) -> None:
        self.eos_token, self.chat_template, self._largest = eos, template, largest
        self.calls = 0

    def get_vocab(self) -> dict[str, int]:
        return {"largest": self._largest}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        self.calls += 1
        return [ord(letter) for letter in text]

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert (tokenize, add_generation_prompt) in {(False, True), (False, False)}
        return "".join(turn["content"] + "\x00" for turn in conversation)


def pair(prompt: str, completion: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", completion)))


EXAMPLES = [pair("ask " * size, "say " * (size % 5 + 1)) for size in range(1, 12)] + [Example(text="plain")]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cached(tmp_path: Path, said: list[str]) -> Callable[..., TokenisedSet]:
    """`tokens_of` with a cache of this test's own."""

    def call(examples: Any = EXAMPLES, *, letters: Letters | None = None, length: int = 20, **more: Any) -> Any:
        return tokens_of(examples, letters or Letters(), length, cache=tmp_path / "tokens", say=said.append, **more)

    return call


def sets(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "tokens").iterdir() if path.is_dir())


# --- what is made ----------------------------------------


@laws
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=9), st.text(min_size=1, max_size=9)), max_size=6),
    st.integers(1, 20),
)
def test_cache_and_memory_hold_what_the_tokenizer_says(
    tmp_path: Path, texts: list[tuple[str, str]], length: int
) -> None:
    examples = [pair(prompt, answer) for prompt, answer in texts]
    expected = tokenise_all(examples, Letters(), length)

    for cache in (None, tmp_path / "tokens", tmp_path / "tokens"):
        found = tokens_of(examples, Letters(), length, cache=cache, say=pytest.fail)
        assert list(found.examples) == list(expected.examples)
        assert (found.dropped, found.cut, found.refused) == (expected.dropped, expected.cut, 0)
        assert lengths_of(found.examples).tolist() == [len(one.input_ids) for one in expected.examples]


@pytest.mark.parametrize("on_disk", [False, True])
def test_long_examples_are_cut_or_refused_and_counted(tmp_path: Path, on_disk: bool) -> None:
    examples = [pair("p" * 30, "answer"), pair("ask", "say"), pair("ask", "answer" * 10), Example(text="fits")]
    cache = tmp_path if on_disk else None

    def made(long: Long) -> TokenisedSet:
        return tokens_of(examples, Letters(), 20, cache=cache, say=pytest.fail, long=long)

    cut, refused = made("cut"), made("refuse")

    assert list(cut.examples) == [tokenise(example, Letters(), 20) for example in examples]
    assert list(refused.examples) == [tokenise(examples[index], Letters(), 20) for index in (1, 3)]
    assert (cut.cut, cut.refused, cut.dropped) == (2, 0, 0)
    assert (refused.cut, refused.refused, refused.dropped) == (0, 2, 0)
    assert in_words(cut, 20) == "of 4 examples, 2 longer than 20 tokens and lost their beginning or end"
    assert in_words(refused, 20) == "of 4 examples, 2 longer than 20 tokens and left out"


def test_examples_with_nothing_to_learn_are_counted_and_said(cached: Any) -> None:
    examples = [Example(text="x"), Example(text="yy"), pair("ask", "say")]

    found = cached(examples, letters=Letters(eos=""), length=30)
    nothing = cached(examples, letters=Letters(eos=""), length=1)

    assert (len(found.examples), found.dropped, found.cut) == (2, 1, 0)
    assert (len(nothing.examples), nothing.dropped, nothing.cut) == (0, 3, 0)
    assert list(nothing.examples) == []
    assert "1 left out because nothing to learn is in their first 30 tokens" in in_words(found, 30)
    assert in_words(cached([pair("ask", "say")]), 20) == ""


def test_an_id_beyond_the_embedding_names_the_example_and_both_numbers(cached: Any, tmp_path: Path) -> None:
    examples = [pair("ask", "say"), pair("ask for é", "say")]
    message = r'example 2 \("ask for é"\): expected token ids below 128, the base\'s embedding rows; found 233'

    with pytest.raises(DataError, match=message):
        cached(examples, vocab_size=128)
    assert sets(tmp_path) == []
    # Kept for a base that has the row, then asked for by one that has not.
    assert len(cached(examples, vocab_size=256).examples) == 2
    with pytest.raises(DataError, match=message):
        cached(examples, vocab_size=128)


def test_impossible_requests_are_refused(cached: Any) -> None:
    with pytest.raises(ValueError, match="unknown policy for long examples 'drop'; expected one of: cut, refuse"):
        cached(long="drop")
    with pytest.raises(ValueError, match="at least 1 token"):
        cached(length=0)


# --- when it is made ----------------------------------------


def test_examples_are_tokenised_once_and_mapped_from_disk(cached: Any, tmp_path: Path, said: list[str]) -> None:
    first, again = Letters(), Letters()

    made, kept = cached(letters=first), cached(letters=again)

    assert first.calls > 0
    assert again.calls == 0
    assert isinstance(kept.examples, FlatTokens)
    assert isinstance(kept.examples._stored.base, np.memmap)
    assert kept == made
    assert said == []
    assert {path.name for path in sets(tmp_path)[0].iterdir()} == {"tokens.i32", "index.i64", "header.json"}


def test_whatever_decides_the_tokens_decides_the_set(cached: Any, tmp_path: Path) -> None:
    cached()
    cached(EXAMPLES[::-1])
    cached(EXAMPLES[:-1])
    cached(length=21)
    cached(long="refuse")
    for letters in (Letters(eos="\x01"), Letters(template="t"), Letters(largest=5)):
        cached(letters=letters)

    assert len(sets(tmp_path)) == 8


def test_tokens_of_a_large_set_never_stand_in_memory_together(cached: Any) -> None:
    examples = [pair(str(number) * 50, "answer " * 300) for number in range(400)]

    tracemalloc.start()
    try:
        found = cached(examples, length=10_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    tokens = int(lengths_of(found.examples).sum())
    # A third of the flat array itself, which in turn is a quarter of what two tuples of pointers take.
    assert peak < 4 * tokens / 3


# --- what may go wrong ----------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_count(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"dropped":0', b'"dropped":1'))


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("tokens.i32", _flip, "another digest"),
    ("tokens.i32", lambda path: os.truncate(path, 40), "found 40"),
    ("tokens.i32", Path.unlink, "found none"),
    ("index.i64", _flip, "another digest"),
    ("index.i64", lambda path: os.truncate(path, 0), "found 0"),
    ("header.json", _other_count, "another digest"),
    ("header.json", lambda path: os.truncate(path, 0), "digest"),
    ("header.json", Path.unlink, "found none"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_set_is_made_anew_with_a_sentence(
    cached: Any, tmp_path: Path, said: list[str], name: str, damage: Callable[[Path], Any], reason: str
) -> None:
    expected = list(cached().examples)
    damage(sets(tmp_path)[0] / name)

    found = cached()

    assert list(found.examples) == expected
    assert len(said) == 1
    assert "made anew" in said[0]
    assert reason in said[0]
    cached(letters=(third := Letters()))
    assert (len(said), third.calls) == (1, 0)


def test_a_set_under_another_name_is_not_taken(cached: Any, tmp_path: Path, said: list[str]) -> None:
    cached(length=19)
    other = sets(tmp_path)[0]
    expected = list(cached().examples)
    own = next(path for path in sets(tmp_path) if path != other)
    (own / "header.json").write_bytes((other / "header.json").read_bytes())

    assert list(cached().examples) == expected
    assert "expected the tokens" in said[0]


ROOT = Path(__file__).parents[2]

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train.test_token_cache import EXAMPLES, Letters
from edge_runtime.train.token_cache import tokens_of

class Killed(Letters):
    def encode(self, text, *, add_special_tokens):
        if self.calls == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text, add_special_tokens=add_special_tokens)

Killed.__name__ = "Letters"
tokens_of(EXAMPLES, Killed(), 20, cache=Path(sys.argv[1]), say=print)
"""


def test_a_process_that_is_killed_leaves_nothing_that_is_taken_for_a_set(
    cached: Any, tmp_path: Path, said: list[str]
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "tokens")], check=False, cwd=ROOT)
    left = [path.name for path in sets(tmp_path)]

    found = cached()

    assert done.returncode == -signal.SIGKILL
    assert len(left) == 1
    assert list(found.examples) == list(tokenise_all(EXAMPLES, Letters(), 20).examples)
    assert left == [f"{path.name}.part" for path in sets(tmp_path)]
    assert said == []


def test_a_cache_that_cannot_be_written_costs_a_sentence(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")

    found = tokens_of(EXAMPLES, Letters(), 20, cache=tmp_path / "file" / "tokens", say=said.append)

    assert list(found.examples) == list(tokenise_all(EXAMPLES, Letters(), 20).examples)
    assert len(said) == 1
    assert "cannot be kept in" in said[0]


def test_a_full_disk_costs_a_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """The kernel refuses every file of more than 400 bytes, as it does where no more room is."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n{KILLED}"
    code = code.replace("self.calls == 9", "False").replace("tokens_of(", "found = tokens_of(")
    code += "\nprint(len(found.examples), 'examples')"

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokens")], capture_output=True, text=True, check=True, cwd=ROOT
    )

    sentence, count = done.stdout.splitlines()
    assert sentence.startswith("tokens cannot be kept in")
    assert count == f"{len(EXAMPLES)} examples"
    assert sets(tmp_path) == []


def test_a_tokenizer_that_hides_its_vocabulary_needs_no_cache_and_gets_none(tmp_path: Path) -> None:
    class Hidden(Letters):
        get_vocab = None  # type: ignore[assignment]

    assert len(tokens_of(EXAMPLES, Hidden(), 20, cache=None, say=pytest.fail).examples) == len(EXAMPLES)
    with pytest.raises(DataError, match="shows its vocabulary"):
        tokens_of(EXAMPLES, Hidden(), 20, cache=tmp_path, say=pytest.fail)


def test_the_sets_that_were_not_opened_for_long_are_removed(
    cached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "KEPT", 3)
    found: dict[int, TokenisedSet] = {}
    for age, length in enumerate((10, 11, 12)):
        known = set(sets(tmp_path)) if found else set()
        found[length] = cached(length=length)
        (new,) = set(sets(tmp_path)) - known
        os.utime(new, (age, age))
    cached(length=10)  # opened again: 11 is now the oldest

    cached(length=13)

    counted = {length: Letters() for length in (10, 11, 12, 13)}
    assert len(sets(tmp_path)) == 3
    # What is open stays readable when its files are gone.
    assert list(found[11].examples) == list(tokenise_all(EXAMPLES, Letters(), 11).examples)
    for length in (10, 12, 13):
        cached(letters=counted[length], length=length)
    assert [counted[length].calls for length in (10, 12, 13)] == [0, 0, 0]


def test_processes_that_want_the_same_tokens_at_once_all_get_them(tmp_path: Path) -> None:
    code = KILLED.replace("self.calls == 9", "False")
    command = [sys.executable, "-c", code + "\nprint('got them')", str(tmp_path / "tokens")]

    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]

    assert all(output.endswith("got them\n") for output in outputs)
    assert not any("cannot" in output for output in outputs)
    assert len(sets(tmp_path)) == 1


@pytest.mark.torch
def test_a_real_tokenizer_is_kept_and_mapped(tmp_path: Path, tiny_base: Path, said: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    examples = random.Random(0).sample(EXAMPLES, len(EXAMPLES))

    def made(**more: Any) -> TokenisedSet:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
        return tokens_of(examples, tokenizer, 24, cache=tmp_path / "tokens", say=said.append, vocab_size=512, **more)

    first = made()

    assert made() == first
    assert len(sets(tmp_path)) == 1
    expected = tokenise_all(examples, transformers.AutoTokenizer.from_pretrained(tiny_base), 24)
    assert list(first.examples) == list(expected.examples)
    assert said == []


@pytest.mark.model
def test_smollm2_tokens_are_kept_for_the_next_start(tmp_path: Path, said: list[str]) -> None:
    """Rebuilt from the GGUF file each time: the fingerprint must not depend on the process."""
    base = pytest.importorskip("edge_runtime.train.base")
    prepared = base.prepare("smollm2", cache=tmp_path / "bases")
    tokenizer = base.load(prepared, compute_dtype="bf16").tokenizer
    examples = load_examples("stdlib-docs:text", limit=40)

    first = tokens_of(examples, tokenizer, 128, cache=tmp_path / "tokens", say=said.append, vocab_size=49_152)

    transformers = pytest.importorskip("transformers")
    again = transformers.AutoTokenizer.from_pretrained(prepared.folder)
    assert check_vocabulary(again, 49_152, "smollm2") == ()
    assert tokens_of(examples, again, 128, cache=tmp_path / "tokens", say=said.append) == first
    assert list(first.examples) == list(tokenise_all(examples, tokenizer, 128).examples)
    assert len(sets(tmp_path)) == 1
    assert said == []


def test_keeping_tokens_needs_no_torch() -> None:
    code = "import sys, edge_runtime.train.token_cache, edge_runtime.train.packing; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False"]
