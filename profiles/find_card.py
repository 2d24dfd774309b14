"""The card of whatever `--base` may name, without loading weights and without torch.

An alias, a folder, a .gguf file, a hub id (from the hub's cache on this machine, else some kB over HTTP), or the name
of a well-known base, whose sizes need no file at all.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edge_runtime.errors import BaseModelError, UnknownBaseError
from profiles import hub
from profiles.byte_source import Files, local_file, local_files
from profiles.card import ModelCard
from profiles.checkpoint_card import CONFIG, checkpoint_card, weight_files
from profiles.gguf_card import gguf_card
from profiles.gguf_header import FIRST_WINDOW
from profiles.known_bases import KNOWN, is_known, known_card
from profiles.packaged import ALIASES, packaged_file

GGUF = ".gguf"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:/({_PART}\.gguf))?")
_NEAREST = 5
_SIBLINGS_LIMIT = 5000
"""Entries of a folder that are looked at for a near name."""


def find_card(spec: str, *, cache: Path | None = None, online: bool = True) -> ModelCard:
    """The card of a base model.

    Args:
        spec: an alias (`packaged.ALIASES`), a folder, a .gguf file, a hub id `owner/name` or `owner/name/FILE.gguf`, or
            a name in `known_bases.KNOWN`. A path wins over a hub id, and files win over the table.
        cache: the hub's cache on this machine; by default where the hub's own library keeps it.
        online: whether the hub may be asked; HF_HUB_OFFLINE forbids it as well.

    Raises:
        UnknownBaseError: none of these (says which names are near), or the hub has none, refuses or does not answer.
        BaseModelError: headers or a configuration that cannot be, or that disagree; one line says where.
    """
    try:
        return _find(spec, cache, online=online)
    except OSError as error:
        # Folders that may not be entered, names that are too long: any step may be the first to find out.
        raise BaseModelError(
            f"expected to read the base '{_shown(spec)}'; found: {error.strerror}; check its permissions"
        ) from error


def _find(spec: str, cache: Path | None, *, online: bool) -> ModelCard:
    if spec in ALIASES:
        return gguf_card(local_file(packaged_file(spec)), ALIASES[spec].label)
    path = _existing(spec)
    if path is not None and path.is_dir():
        card = checkpoint_card(local_files(path), path.resolve().name)
        if card is None:
            raise _unknown(spec, f"a folder without {CONFIG}", _siblings(path))
        return card
    if path is not None and path.suffix == GGUF:
        return gguf_card(local_file(path), path.stem)
    named = _HUB_ID.fullmatch(spec)
    if path is None and named and (named[2] or not spec.endswith(GGUF)):
        return _hub_card(named[1], named[2], cache, online=online and not hub.is_offline())
    if path is None and is_known(spec):
        return known_card(spec)
    kind = "a file that is not a .gguf" if path is not None else "none of these"
    raise _unknown(spec, kind, _siblings(_parent(spec)))


def _existing(spec: str) -> Path | None:
    """The path, if there is a file or folder; also None for what cannot be a path."""
    try:
        path = Path(spec).expanduser()
        return path if spec and (path.is_dir() or path.is_file()) else None
    except (OSError, RuntimeError):
        # Too long a name, or ~ of nobody: whatever it is, no path.
        return None


def _hub_card(hub_id: str, file: str | None, cache: Path | None, *, online: bool) -> ModelCard:
    try:
        return _card_of(_files(hub_id, file, cache, online=online), hub_id, file)
    except UnknownBaseError as error:
        if file is None and is_known(hub_id):
            card = known_card(hub_id)
            return replace(card, name=hub_id, origin=f"{card.origin}, for the model itself could not be read")
        raise UnknownBaseError(f"{error}{_near(hub_id, iter(()))}") from error


def _files(hub_id: str, file: str | None, cache: Path | None, *, online: bool) -> Files:
    """Where a hub model is read from: the cache, unless the hub may be asked for what the cache lacks."""
    folder = hub.snapshot(hub_id, cache)
    if folder is not None and (not online or _is_complete(folder, file)):
        return local_files(folder)
    if online:
        return hub.remote_files(hub_id)
    raise UnknownBaseError(
        f"expected '{hub_id}' in the hub's cache {cache or hub.cache_folder()}; found none there, and the hub may not "
        f"be asked; go online, or give a local folder or .gguf file"
    )


def _is_complete(folder: Path, file: str | None) -> bool:
    """Whether the weights are there: another program may have fetched no more than the configuration."""
    if file is not None:
        return (folder / file).is_file()
    if not (folder / CONFIG).is_file():
        return any(folder.glob(f"*{GGUF}"))
    placed = weight_files(local_files(folder))
    return bool(placed) and all((folder / name).is_file() for name in placed)


def _card_of(files: Files, hub_id: str, file: str | None) -> ModelCard:
    """The card of a hub model: of its safetensors, else of its only GGUF file, or of the one that was named."""
    card = checkpoint_card(files, hub_id) if file is None else None
    if card is not None and card.stored:
        return card
    found = [file] if file is not None else [name for name in files.names() if name.endswith(GGUF)]
    if card is not None and len(found) != 1:
        return card
    if not found:
        raise UnknownBaseError(
            f"expected {CONFIG} and *.safetensors, or a .gguf file, in {files.name}; found none; give another base"
        )
    if len(found) > 1:
        raise UnknownBaseError(
            f"expected one .gguf file in {files.name}; found {len(found)}: {', '.join(found[:_NEAREST])}; name one as "
            f"{hub_id}/{found[0]}"
        )
    source = files.open(found[0], FIRST_WINDOW)
    if source is None:
        raise UnknownBaseError(f"expected {found[0]} in {files.name}; found no such file; check the name")
    return gguf_card(source, f"{hub_id}/{found[0]}")


def _unknown(spec: str, kind: str, siblings: Iterator[str]) -> UnknownBaseError:
    shown = _shown(spec)
    near = _near(shown, siblings) or f"; well-known: {', '.join([*sorted(ALIASES), *KNOWN])}"
    return UnknownBaseError(
        f"expected a base model as an alias ({', '.join(sorted(ALIASES))}), a folder with {CONFIG}, a .gguf file, a "
        f"hub id owner/name or a well-known name; found '{shown}', {kind}{near}"
    )


def _shown(spec: str) -> str:
    """What was typed, so that the message stays one line."""
    return " ".join(spec.split())[:200]


def _near(spec: str, siblings: Iterator[str]) -> str:
    """The names that are near, as the end of a message; empty where none is."""
    candidates = {name.rpartition("/")[2].lower(): name for name in itertools.chain(KNOWN, ALIASES, siblings)}
    last = spec.rstrip("/").rpartition("/")[2].lower()
    near = difflib.get_close_matches(last, candidates, n=_NEAREST, cutoff=0.6)
    return f"; nearest: {', '.join(candidates[name] for name in near)}" if near else ""


def _parent(spec: str) -> Path | None:
    """The folder that a path which does not exist would lie in."""
    try:
        parent = Path(spec).expanduser().parent
        return parent if spec and parent.is_dir() else None
    except (OSError, RuntimeError):
        return None


def _siblings(folder: Path | None) -> Iterator[str]:
    """Base models in a folder, written as a person would name them."""
    if folder is None:
        return
    try:
        for path in itertools.islice(folder.iterdir(), _SIBLINGS_LIMIT):
            if path.suffix == GGUF or (path / CONFIG).is_file():
                yield str(path)
    except OSError:
        # A folder that may not be read has nothing to offer.
        return
