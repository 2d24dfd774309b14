"""JSON objects that somebody else wrote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import BaseModelError
from profiles.strict_json import json_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), VALUES))
def test_an_object_is_what_it_says(content: dict[str, object]) -> None:
    assert json_object(json.dumps(content).encode(), "file") == content


@given(st.binary(max_size=200))
def test_any_bytes_give_an_object_or_one_line(content: bytes) -> None:
    try:
        found: dict[str, object] | str = json_object(content, "file")
    except BaseModelError as error:
        found = str(error)

    assert isinstance(found, dict) or "\n" not in found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": {"b": 1, "b": 1}}', "'b' is there twice"),
        (b'{"a":' * 100_000, "nested"),
        (b"3", "found int"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_wrong_is_named(content: bytes, said: str) -> None:
    with pytest.raises(BaseModelError, match=said):
        json_object(content, "file")
