"""A JSON object that somebody else wrote: whatever is wrong with it, one line says so."""

from __future__ import annotations

import json
from typing import Any

from edge_runtime.errors import BaseModelError
from profiles.brief import brief


def json_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object from a model's files.

    Args:
        content: the file's bytes.
        where: how messages call the file.

    Raises:
        BaseModelError: not JSON, not an object, or a name that is there twice.
    """
    try:
        data = json.loads(content, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise BaseModelError(f"{where} is not JSON ({reason}); download the model again") from error
    if not isinstance(data, dict):
        raise BaseModelError(f"{where} should hold one JSON object; found {type(data).__name__}")
    return data


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {brief(name)} is there twice")
        found[name] = value
    return found
