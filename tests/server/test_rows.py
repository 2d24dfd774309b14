"""A mapping that is a value, against a dict."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.rows import Rows

names = st.text("abcdefgh0123456789", min_size=1, max_size=5)
changes = st.lists(st.tuples(names, st.integers(0, 3)), max_size=40)


@given(st.dictionaries(names, st.integers(0, 3)), changes)
def test_rows_are_what_a_dict_would_be_and_never_change(
    start: dict[str, int], following: list[tuple[str, int]]
) -> None:
    rows, plain = Rows(start), dict(start)
    for name, value in following:
        before, copy = rows, dict(plain)
        rows = rows.put(name, value)
        plain[name] = value
        assert dict(before) == copy
    assert dict(rows) == plain
    assert len(rows) == len(plain)
    assert rows == plain
    assert rows == Rows(plain)
    assert all(rows[name] == value for name, value in plain.items())
    assert rows.get("never") is None


@given(st.dictionaries(names, st.integers(0, 3)), changes)
def test_what_differs_is_what_was_put(start: dict[str, int], following: list[tuple[str, int]]) -> None:
    before = rows = Rows(start)
    for name, value in following:
        rows = rows.put(name, value)
    assert rows.since(before) == {name: value for name, value in rows.items() if start.get(name) != value}
    assert (rows == before) == (not rows.since(before))
