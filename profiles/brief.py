"""A value that somebody else wrote, short enough for a message and on one line."""

from __future__ import annotations

import reprlib


def brief(value: object) -> str:
    """Like `repr`, cut in the middle: 120 characters of a text (a tensor's name fits), a few entries of a list."""
    short = reprlib.Repr()
    short.maxstring = 120
    return short.repr(value)
