"""Rows to examples, examples to tokens, tokens to micro-batches."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.errors import DataError
from edge_runtime.train.data import (
    IGNORED,
    Example,
    Message,
    batch_at,
    cut,
    load_examples,
    split,
    tokenise,
    tokenise_all,
    tokenise_whole,
)
from tests.train.conftest import CHAT_TEMPLATE

# A busy machine is slow; these are laws, not races.
laws = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

USER, ASSISTANT = "user", "assistant"
EOS = "<|im_end|>"


def pair(prompt: str, completion: str) -> Example:
    return Example((Message(USER, prompt), Message(ASSISTANT, completion)))


def written(tmp_path: Path, *lines: str | bytes) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


class Letters:
    """One token per character: enough of a tokenizer to see every position."""

    def __init__(self, *, chat: bool) -> None:
        self.eos_token = chr(0)
        self.chat_template = "a template" if chat else None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        turns = "".join(f"<{turn['role'][0]}>{turn['content']}\x00\n" for turn in conversation)
        return turns + ("<a>" if add_generation_prompt else "")


def text_of(ids: tuple[int, ...]) -> str:
    return "".join(chr(token) for token in ids)


def learned_of(labels: tuple[int, ...]) -> str:
    return text_of(tuple(label for label in labels if label != IGNORED))


# --- reading ----------------------------------------


ROWS: list[tuple[dict[str, Any], Example]] = [
    ({"prompt": "p", "completion": "c"}, pair("p", "c")),
    ({"instruction": "do", "input": "this", "output": "done"}, pair("do\n\nthis", "done")),
    ({"instruction": "do", "input": "", "output": "done"}, pair("do", "done")),
    ({"instruction": "do", "output": "done"}, pair("do", "done")),
    ({"text": "plain"}, Example(text="plain")),
    (
        {"messages": [{"role": USER, "content": "p"}, {"role": ASSISTANT, "content": "c"}], "source": "elsewhere"},
        pair("p", "c"),
    ),
]


@pytest.mark.parametrize(("row", "expected"), ROWS)
def test_each_format_is_read(tmp_path: Path, row: dict[str, Any], expected: Example) -> None:
    assert load_examples(written(tmp_path, json.dumps(row))) == [expected]


def test_formats_may_be_mixed_and_blank_lines_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps(ROWS[0][0]).encode(), b"", *(json.dumps(row).encode() for row, _ in ROWS[1:])]

    assert load_examples(written(tmp_path, *lines)) == [expected for _, expected in ROWS]


BAD_ROWS: list[tuple[str | bytes, str]] = [
    ("{", "one JSON object per line"),
    ("[1]", r"expected a JSON object, found \[1\]"),
    ('{"question": "x"}', r"expected the keys of one format .*prompt\+completion.*found question"),
    ("{}", "found no keys"),
    ('{"prompt": "x"}', "found prompt"),
    ('{"prompt": "x", "completion": " "}', "'completion' to be a text that is not empty"),
    ('{"text": 3}', "'text' to be a text that is not empty, found 3"),
    ('{"messages": []}', "list that is not empty"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "'role' among system, user, assistant"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "last message to be an answer"),
    (b'{"text": "\xff"}', "expected UTF-8"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    spec = written(tmp_path, '{"text": "good"}', "", line)

    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{message}"):
        load_examples(spec)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="found no rows"):
        load_examples(written(tmp_path, content))


def test_what_is_no_file_is_an_error_that_says_what_data_can_be(tmp_path: Path) -> None:
    for spec, found in [("", "nothing"), (str(tmp_path), "a folder"), ("no/such.jsonl", "no file")]:
        with pytest.raises(DataError, match=rf"JSONL file or as stdlib-docs:NAME; found .*{found}"):
            load_examples(spec)


def test_stdlib_docs_are_prompts_with_answers() -> None:
    examples = load_examples("stdlib-docs:text")

    assert len(examples) >= 60
    assert all([message.role for message in example.messages] == [USER, ASSISTANT] for example in examples)
    with pytest.raises(DataError, match="networking"):
        load_examples("stdlib-docs:")


def test_limit_keeps_a_sample_in_the_order_of_the_source() -> None:
    everything = load_examples("stdlib-docs:text")

    some = load_examples("stdlib-docs:text", limit=40)

    assert len(some) == 40
    assert some == [example for example in everything if example in some]
    # A sample of the group, not its first modules.
    assert some[-1] not in everything[:80]


def test_an_example_is_a_conversation_or_a_text() -> None:
    with pytest.raises(ValueError, match="either"):
        Example()
    with pytest.raises(ValueError, match="either"):
        Example((Message(USER, "x"),), text="x")


# --- splitting ----------------------------------------


@laws
@given(st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=30, unique=True), st.integers(0, 3))
def test_the_split_depends_on_content_only_and_loses_nothing(texts: list[str], seed: int) -> None:
    examples = [Example(text=text) for text in texts]
    shuffled = random.Random(seed).sample(examples, len(examples))

    train, held_out = split(examples, fraction=0.2, seed=seed)

    assert split(shuffled, fraction=0.2, seed=seed) == (train, held_out)
    assert Counter(train + held_out) == Counter(examples)
    assert len(held_out) == max(1, round(0.2 * len(examples)))
    assert train


def test_equal_examples_are_on_one_side() -> None:
    examples = [Example(text=str(number // 5)) for number in range(50)]

    train, held_out = split(examples)

    assert set(train).isdisjoint(held_out)
    assert len(train) + len(held_out) == 50


def test_another_seed_holds_out_others() -> None:
    examples = [Example(text=str(number)) for number in range(100)]

    assert split(examples, seed=0)[1] != split(examples, seed=1)[1]


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(DataError, match="at least 2 examples that differ"):
        split([Example(text="only"), Example(text="only")])
    with pytest.raises(ValueError, match="above 0 and below 1"):
        split([Example(text="a"), Example(text="b")], fraction=0.0)


# --- tokens ----------------------------------------


def test_only_the_answer_and_its_end_are_learned() -> None:
    tokenised = tokenise(pair("ask", "say"), Letters(chat=True), 100)

    assert text_of(tokenised.input_ids) == "<u>ask\x00\n<a>say\x00"
    assert learned_of(tokenised.labels) == "say\x00"
    assert tokenised.learned == 4


def test_every_answer_of_a_conversation_is_learned() -> None:
    turns = [("system", "s"), (USER, "one"), (ASSISTANT, "two"), (USER, "three"), (ASSISTANT, "four")]
    example = Example(tuple(Message(role, content) for role, content in turns))

    chat, plain = (tokenise(example, Letters(chat=chat), 100) for chat in (True, False))

    assert text_of(chat.input_ids) == "<s>s\x00\n<u>one\x00\n<a>two\x00\n<u>three\x00\n<a>four\x00"
    assert text_of(plain.input_ids) == "s\none\ntwo\x00\nthree\nfour\x00"
    assert learned_of(chat.labels) == learned_of(plain.labels) == "two\x00four\x00"


def test_without_a_template_whitespace_that_is_there_is_enough() -> None:
    for prompt, completion in [("ask ", "say"), ("ask", " say")]:
        assert text_of(tokenise(pair(prompt, completion), Letters(chat=False), 100).input_ids) == "ask say\x00"


def test_a_plain_text_is_learned_whole() -> None:
    tokenised = tokenise(Example(text="abc"), Letters(chat=True), 100)

    assert text_of(tokenised.input_ids) == learned_of(tokenised.labels) == "abc\x00"
    # Nothing predicts the first token.
    assert tokenised.learned == 3


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end() -> None:
    letters = Letters(chat=False)

    long_prompt = tokenise(pair("p" * 30 + "END ", "answer"), letters, 20)
    long_answer = tokenise(pair("ask ", "answer" * 10), letters, 20)
    both = tokenise(pair("p" * 30 + "END ", "answer" * 10), letters, 20)

    assert text_of(long_prompt.input_ids) == "p" * 9 + "END answer\x00"
    assert text_of(long_answer.input_ids) == "ask " + ("answer" * 10)[:16]
    assert text_of(both.input_ids) == "p" * 6 + "END " + "answeransw"


@laws
@given(st.text(min_size=1), st.text(min_size=1), st.integers(2, 60), st.booleans())
def test_tokens_stay_within_the_limit_and_labels_repeat_them(prompt: str, answer: str, limit: int, chat: bool) -> None:
    tokenised = tokenise(pair(prompt, answer), Letters(chat=chat), limit)

    assert len(tokenised.input_ids) == len(tokenised.labels) <= limit
    assert all(label in {IGNORED, token} for token, label in zip(tokenised.input_ids, tokenised.labels, strict=True))
    assert tokenised.learned >= 1


def test_what_has_nothing_to_learn_is_dropped_and_counted() -> None:
    everything = tokenise_all([pair("ask", "say"), Example(text="t")], Letters(chat=True), 1)

    assert (everything.examples, everything.dropped) == ((), 2)
    assert tokenise_all([pair("ask", "say")], Letters(chat=True), 40).dropped == 0


def test_what_was_longer_is_counted_and_can_be_had_whole() -> None:
    letters, examples = Letters(chat=False), [pair("ask ", "answer" * 10), pair("ask ", "say")]

    found = tokenise_all(examples, letters, 20)

    assert (found.cut, found.dropped, found.refused) == (1, 0, 0)
    whole = tokenise_whole(examples[0], letters)
    assert text_of(whole.input_ids) == "ask " + "answer" * 10 + "\x00"
    assert cut(whole, 20) == found.examples[0]
    assert cut(whole, 1000) == whole


def test_a_template_that_rewrites_earlier_turns_is_an_error() -> None:
    letters = Letters(chat=True)
    letters.apply_chat_template = lambda turns, **_: f"{len(turns)} turns"  # type: ignore[method-assign]

    with pytest.raises(DataError, match="chat template that only appends"):
        tokenise(pair("ask", "say"), letters, 40)


@pytest.mark.torch
def test_a_real_tokenizer_gives_what_its_template_writes(tiny_base: Path) -> None:
    """The pieces together are the rendered conversation, and the prompt's ids are those of generation."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    example = pair("Write the docstring of f.", "Return the sum of a and b.")

    tokenised = tokenise(example, tokenizer, 400)

    turns = [{"role": message.role, "content": message.content} for message in example.messages]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert tokenizer.decode(tokenised.input_ids) == f"{prompt}Return the sum of a and b.{EOS}"
    assert list(tokenised.input_ids[: len(ids)]) == ids
    assert tokenised.labels == (IGNORED,) * len(ids) + tokenised.input_ids[len(ids) :]


# --- order ----------------------------------------


@laws
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_sees_every_example_once(count: int, micro_batch: int, seed: int) -> None:
    batches = [batch_at(step, count=count, micro_batch=micro_batch, seed=seed) for step in range(2 * count)]

    stream = [index for batch in batches for index in batch]
    assert all(len(batch) == micro_batch for batch in batches)
    for epoch in range(2):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_batch_does_not_depend_on_the_batches_before_it() -> None:
    first = [batch_at(step, count=17, micro_batch=4, seed=3) for step in range(30)]

    assert [batch_at(step, count=17, micro_batch=4, seed=3) for step in reversed(range(30))] == first[::-1]
    assert [batch_at(step, count=17, micro_batch=4, seed=4) for step in range(30)] != first
    assert first[:4] != first[4:8]


def test_the_order_is_the_same_for_ever() -> None:
    """A device that resumes under another Python must go on with the same examples."""
    assert [batch_at(step, count=6, micro_batch=2, seed=0) for step in range(3)] == [(4, 1), (5, 0), (2, 3)]


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="count=0"):
        batch_at(0, count=0, micro_batch=1, seed=0)


def test_reading_data_needs_no_torch() -> None:
    code = "import sys, edge_runtime.train.data; print('torch' in sys.modules, 'transformers' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "False"]
