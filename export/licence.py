"""Under which licence a base model is, as far as its own files say."""

from __future__ import annotations

import re
from pathlib import Path

from edge_runtime.errors import BaseModelError
from edge_runtime.train.source import Source
from profiles.byte_source import local_file
from profiles.gguf_header import gguf_header

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)


def licence_of(source: Source) -> str:
    """The licence in the words of the base's publisher, such as apache-2.0; '' where its files do not say.

    A GGUF file has it among its settings, a folder in the front matter of its README.md.
    """
    try:
        if source.kind == "gguf":
            return str(gguf_header(local_file(source.path)).metadata.get("general.license", ""))
        return _of_card(source.path / "README.md")
    except (OSError, UnicodeDecodeError, BaseModelError):
        # The weights were read before, so this file only says less than others: a card can do without.
        return ""


def _of_card(path: Path) -> str:
    if not path.is_file():
        return ""
    front = _FRONT_MATTER.search(path.read_text(encoding="utf-8"))
    found = _LICENCE.search(front[1]) if front else None
    return found[1] if found else ""
