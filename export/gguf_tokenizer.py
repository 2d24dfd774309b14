"""The tokenizer of a model as GGUF keeps it: byte-level BPE, whose ways of cutting text have names there.

GGUF has no pattern for how text is cut before the merges, only a name that the reader must know. So the cut of a
tokenizer is compared with those of `PRE_TOKENIZERS`, and one that is not among them is refused: under another name the
same text would give other tokens, and no error.

Source of the fields: ggml's `docs/gguf.md`; of padded vocabularies: llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import ExportError, missing_extra
from edge_runtime.train.gguf_names import CONTROL, NORMAL, ROLES, UNUSED, USER_DEFINED

try:
    import tokenizers

    from edge_runtime.train.gguf_file import PRE_TOKENIZERS
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "tokenizers", "client") from missing

_INSTEAD = "export it as merged, and convert that with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer.

    Attributes:
        pre: name of the way in which text is cut.
        tokens: by their numbers, as many as the embedding has rows.
        types: of the tokens, values of `tokenizer.ggml.token_type`.
        merges: pairs of tokens with a space between them, the most frequent first.
        special: role (a value of `ROLES`) → number of its token.
        add_bos: whether a beginning-of-sequence token is put before a text.
        chat_template: Jinja, or empty.
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    chat_template: str


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer in a Hugging Face folder.

    Args:
        folder: with tokenizer.json and, if there is one, tokenizer_config.json.
        rows: of the model's embedding; numbers without a token get one that nothing is encoded to.

    Raises:
        ExportError: no tokenizer.json, or a tokenizer that GGUF has no name for; says what works instead.
    """
    whole, about = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json")
    if not whole:
        raise ExportError(f"expected a tokenizer.json of the base model, found none; {_INSTEAD}")
    model = whole.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ExportError(
            f"GGUF files are written here with byte-level BPE tokenizers alone; found "
            f"{model.get('type')}{' with bytes as a fallback' if model.get('byte_fallback') else ''}; {_INSTEAD}"
        )
    numbers = {**model["vocab"], **{token["content"]: token["id"] for token in whole.get("added_tokens", ())}}
    if max(numbers.values()) >= rows:
        raise ExportError(f"the tokenizer has token {max(numbers.values())}, the embedding only {rows} rows")
    tokens, types = _numbered(numbers, whole.get("added_tokens", ()), rows)
    special = {role: numbers[text] for name, role in ROLES.items() if (text := _text(about.get(name))) in numbers}
    return Vocabulary(
        pre=_name_of_cut(whole.get("pre_tokenizer")),
        tokens=tokens,
        types=types,
        merges=tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]),
        special=special,
        add_bos=_begins_with(whole.get("post_processor"), special.get("bos"), numbers),
        chat_template=_template(folder, about),
    )


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _numbered(numbers: Mapping[str, int], added: Any, rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for token, number in numbers.items():
        tokens[number], types[number] = token, NORMAL
    for token in added:
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    return tuple(tokens), tuple(types)


def _text(token: Any) -> str:
    """A special token as tokenizer_config.json writes it: plain, or with its properties."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _name_of_cut(found: Any) -> str:
    wanted = _essential(found)
    for name, make in PRE_TOKENIZERS.items():
        plain = tokenizers.Tokenizer(tokenizers.models.BPE())
        plain.pre_tokenizer = make()
        if _essential(json.loads(plain.to_str())["pre_tokenizer"]) == wanted:
            return name
    raise ExportError(
        f"the base model's tokenizer cuts text in a way that is none of {', '.join(PRE_TOKENIZERS)}; {_INSTEAD}"
    )


def _essential(cut: Any) -> Any:
    """A pre-tokenizer without what changes only the offsets that it reports; a sequence as a list."""
    if not isinstance(cut, dict):
        return cut
    if cut.get("type") == "Sequence":
        return [_essential(part) for part in cut["pretokenizers"]]
    return {key: value for key, value in cut.items() if key != "trim_offsets"}


def _begins_with(processor: Any, bos: int | None, numbers: Mapping[str, int]) -> bool:
    """Whether what is done to the tokens of a text puts the beginning-of-sequence token first."""
    if not isinstance(processor, dict) or bos is None:
        return False
    if processor.get("type") == "Sequence":
        return any(_begins_with(part, bos, numbers) for part in processor["processors"])
    first: dict[str, Any] = next(iter(processor.get("single") or ()), {})
    return numbers.get(first.get("SpecialToken", {}).get("id")) == bos


def _template(folder: Path, about: Mapping[str, Any]) -> str:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    found = about.get("chat_template") or ""
    if isinstance(found, list):  # several, by name
        found = next((each["template"] for each in found if each.get("name") == "default"), "")
    return str(found)
