"""JSON objects of known shape: the check that a stored profile or plan has exactly the keys of its dataclass."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from edge_runtime.errors import ConfigError


def checked(kind: str, data: Mapping[str, Any], keys: Iterable[str]) -> Mapping[str, Any]:
    """Returns `data` if it has exactly `keys`.

    Raises:
        ConfigError: a key is missing or unknown; names all of them and the kind of object.
    """
    expected = set(keys)
    if not isinstance(data, Mapping):
        raise ConfigError(f"a {kind} needs a table of {len(expected)} keys; found {data!r}; correct it")
    missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
    if missing or unknown:
        lacks = f"lacks {', '.join(missing)}" if missing else ""
        holds = f"holds the unknown {', '.join(map(_with_nearest(expected), unknown))}" if unknown else ""
        faults = " and ".join(fault for fault in (lacks, holds) if fault)
        raise ConfigError(f"a {kind} needs exactly its {len(expected)} keys; this one {faults}; correct it")
    return data


def typed(kind: str, values: Mapping[str, Any], types: Mapping[str, str], signed: Collection[str] = ()) -> None:
    """Refuses a value that is not of its field's type, and a number that is negative without being `signed`.

    Args:
        kind: what the object is; names the file, where there is one.
        values: the object, with exactly the keys of `types`.
        types: field → its annotation, as written in a dataclass; see `_EXPECTED` for those known.
        signed: fields whose numbers may be negative.

    Raises:
        ConfigError: names the first field that is wrong, what was expected and what was found.
    """
    for name, annotation in types.items():
        expected, fits = _EXPECTED[annotation]
        value = values[name]
        negative = _is_number(value) and value < 0 and name not in signed
        if negative or not fits(value):
            raise ConfigError(f"'{name}' of the {kind} needs {expected}; found {value!r}; correct it")


def _with_nearest(known: Collection[str]) -> Callable[[str], str]:
    def described(key: str) -> str:
        near = difflib.get_close_matches(key, known, n=1)
        return f"'{key}' (did you mean '{near[0]}'?)" if near else f"'{key}'"

    return described


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _are(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(fits(item) for item in value)


def _is_shape(value: Any) -> bool:
    return _are(value, lambda size: _is_int(size) and size > 0) and len(value) == 3


def _is_sentences(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(part, str) for pair in value.items() for part in pair)


_EXPECTED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a text", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number of 0 or more", _is_int),
    "int | None": ("a whole number of 0 or more, or none", lambda value: value is None or _is_int(value)),
    "float": ("a finite number of 0 or more", _is_float),
    "float | None": ("a finite number, or none", lambda value: value is None or _is_float(value)),
    "tuple[str, ...]": ("a list of texts", lambda value: _are(value, lambda item: isinstance(item, str))),
    "tuple[Gpu, ...]": ("a list of tables", lambda value: _are(value, lambda item: isinstance(item, Mapping))),
    "tuple[tuple[int, int, int], ...]": (
        "a list of (tokens, inputs, outputs), whole numbers above 0",
        lambda value: _are(value, _is_shape),
    ),
    "Mapping[str, str]": ("a table of sentences", _is_sentences),
}
