"""JSON objects of known shape: the check that a stored profile or plan has exactly the keys of its dataclass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edge_runtime.errors import ConfigError


def checked(kind: str, data: Mapping[str, Any], keys: Iterable[str]) -> Mapping[str, Any]:
    """Returns `data` if it has exactly `keys`.

    Raises:
        ConfigError: a key is missing or unknown; names all of them and the kind of object.
    """
    expected = set(keys)
    missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
    if missing or unknown:
        raise ConfigError(
            f"a {kind} needs exactly the keys {', '.join(sorted(expected))}; found missing: {missing}, "
            f"unknown: {unknown}; write it again with this version of edge-runtime"
        )
    return data
