"""Plain values as TOML text that every reader of TOML reads back; the standard library only reads."""

from __future__ import annotations

import json
import re
from typing import Any


def value(found: Any) -> str:
    """A value on one line: a table is an inline table."""
    match found:
        case bool():
            return "true" if found else "false"
        case int() | float():
            return repr(found)
        case list() | tuple():
            return "[" + ", ".join(value(item) for item in found) + "]"
        case dict():
            return "{" + ", ".join(f"{key(name)} = {value(item)}" for name, item in found.items()) + "}"
        case _:
            # A TOML basic string escapes as JSON does, but knows no surrogate pairs and takes no raw DEL.
            return json.dumps(str(found), ensure_ascii=False).replace("\x7f", "\\u007f")


def key(name: str) -> str:
    """A key as TOML writes it: bare where it may be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else value(name)
