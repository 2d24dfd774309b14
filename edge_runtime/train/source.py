"""Where a base model comes from, and its fingerprint: what `--base` may name.

An alias, a local Hugging Face folder, a GGUF file, or the id of a model on a hub. All become a path on this machine.
Weights are read from safetensors and GGUF only: nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge_runtime.errors import BaseModelError, UnknownBaseError, first_line, missing_extra
from edge_runtime.train import prepared
from profiles.packaged import ALIASES, packaged_file

try:
    import huggingface_hub
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "huggingface_hub", "client") from missing

Kind = Literal["folder", "gguf", "hub"]

CONFIG = "config.json"
WEIGHTS_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
# What a causal language model needs: no pickles, no copies of the weights in other formats. The card names its licence.
_HUB_FILES = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]


# Fields of config.json that change neither shapes nor arithmetic; a tool that re-saves a model rewrites some of them.
_NOT_ARCHITECTURE = frozenset(
    {
        "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
        "pad_token_id", "quantization_config", "task_specific_params", "torch_dtype", "transformers_version",
        "unk_token_id", "use_cache",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A base model on this machine.

    Attributes:
        kind: what `path` is; a hub model is a folder that was downloaded.
        path: the folder or the GGUF file.
        label: a name for people.
    """

    kind: Kind
    path: Path
    label: str


def resolve(spec: str) -> Source:
    """The base model that a person named; downloads a hub model that is not in the hub's cache.

    Args:
        spec: an alias (`ALIASES`), a folder, a `.gguf` file, or a hub id `owner/name`. A path wins over a hub id.

    Raises:
        UnknownBaseError: none of these; says what was tried.
    """
    if spec in ALIASES:
        return Source("gguf", packaged_file(spec), ALIASES[spec].label)
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return Source("folder", _usable_folder(path, spec), path.resolve().name)
    if path.suffix == ".gguf" and path.is_file():
        return Source("gguf", path, path.stem)
    if _HUB_ID.match(spec) and path.suffix != ".gguf":
        return Source("hub", _usable_folder(_download(spec), spec), spec)
    kind = "a file that is not a .gguf" if path.is_file() else "no such folder, file or alias"
    raise UnknownBaseError(
        f"expected a base model as an alias ({', '.join(sorted(ALIASES))}), a Hugging Face folder, a .gguf file or a "
        f"hub id owner/name; found '{spec}', {kind}; give another --base"
    )


def fingerprint(source: Source, *, memo: Path | None = None) -> str:
    """SHA-256 (hex) that names a base, whatever precision it is used at; all devices of a fleet must agree on it.

    A folder's covers the fields of its configuration that matter to the arithmetic and the digests of its weight files;
    a GGUF file's is its digest; a prepared folder's is that of the base it was converted from. Tokenizers don't count.

    Args:
        source: what to name.
        memo: a folder in which digests are kept by path, size and time of change, to spare a slow disk the reading.

    Raises:
        BaseModelError: a configuration that is no JSON object, or a weight file that is missing.
    """
    if source.kind == "gguf":
        return _remembered_digest(source.path, memo)
    if prepared.is_prepared(source.path):
        return prepared.read_manifest(source.path).fingerprint
    config = read_config(source.path)
    relevant = {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
    digests = [_remembered_digest(path, memo) for path in weight_files(source.path)]
    return hashlib.sha256(json.dumps([relevant, digests], sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        BaseModelError: it is missing or no JSON object.
    """
    return _read_object(folder / CONFIG)


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files, in the order of their names: those of its index, or `model.safetensors`.

    Raises:
        BaseModelError: none, or one that the index names is missing.
    """
    names = ["model.safetensors"]
    if (folder / WEIGHTS_INDEX).is_file():
        weight_map = _read_object(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise BaseModelError(f"expected a 'weight_map' in {folder / WEIGHTS_INDEX}; found none")
        names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise BaseModelError(f"expected the weights {folder / name}; found no such file; fetch the model again")
    return [folder / name for name in names]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BaseModelError(f"expected a JSON object in {path}; found: {error}") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"expected a JSON object in {path}; found {type(content).__name__}")
    return content


def _usable_folder(folder: Path, spec: str) -> Path:
    if prepared.is_prepared(folder):
        return folder
    if not (folder / CONFIG).is_file():
        raise UnknownBaseError(f"expected '{spec}' to hold {CONFIG}; found none in {folder}; give another --base")
    if not any(folder.glob("*.safetensors")):
        pickled = "pickled weights only, which are never opened" if any(folder.glob("*.bin")) else "no weights"
        raise UnknownBaseError(f"expected '{spec}' to hold *.safetensors; found {pickled}; give another --base")
    return folder


def _download(hub_id: str) -> Path:
    """The folder of a hub model; the network is asked only for what the hub's cache lacks."""
    cached = _cached(hub_id)
    if cached is not None:
        return cached
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:
        # Whichever transport the hub's library uses raises errors of a family of its own.
        reason = first_line(error)
        raise UnknownBaseError(
            f"expected the base model '{hub_id}'; tried the folder '{hub_id}', the hub's cache and the hub "
            f"({type(error).__name__}: {reason}); give a local folder or .gguf file, or 'smollm2', with --base"
        ) from error


def _cached(hub_id: str) -> Path | None:
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_HUB_FILES, local_files_only=True))
    except (huggingface_hub.errors.LocalEntryNotFoundError, ValueError):
        # Not there, or no possible id: what the hub says to it is for the person to read.
        return None
    # Another program may have fetched no more than the configuration.
    return folder if any(folder.glob("*.safetensors")) else None


def _remembered_digest(path: Path, memo: Path | None) -> str:
    if memo is None:
        return prepared.digest_of(path)
    found = path.resolve().stat()
    key = hashlib.sha256(f"{path.resolve()}\0{found.st_size}\0{found.st_mtime_ns}".encode()).hexdigest()
    note = memo / key
    if note.is_file() and re.fullmatch(r"[0-9a-f]{64}", kept := note.read_text(encoding="ascii", errors="replace")):
        return kept
    digest = prepared.digest_of(path)
    memo.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same note write the same bytes; a torn one is not 64 digits and is ignored.
    note.write_text(digest, encoding="ascii")
    return digest
