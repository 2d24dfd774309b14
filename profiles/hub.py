"""The files of a model on a hub: in the cache that the hub's own library keeps on this machine, or behind HTTP.

Source of the layout: huggingface_hub's guide to its cache, `models--owner--name/{refs,snapshots}`; the variables of the
environment are those that it documents.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path

from edge_runtime.errors import BaseModelError, UnknownBaseError
from profiles.byte_source import ByteSource, Files, whole
from profiles.http_ranges import remote_file
from profiles.strict_json import json_object

PUBLIC_HUB = "https://huggingface.co"
REVISION = "main"
LISTING_LIMIT = 8 << 20
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})


def is_offline() -> bool:
    """Whether the person forbade the network by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    return (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _TRUE


def cache_folder() -> Path:
    """Where the hub's library keeps what it downloaded."""
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{general}/huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(hub)).expanduser()


def snapshot(hub_id: str, cache: Path | None = None) -> Path | None:
    """The folder of a model in the cache: the revision `main`, else the newest; None if there is none.

    Args:
        hub_id: owner/name.
        cache: the hub's cache; `cache_folder` by default.
    """
    model = (cache or cache_folder()) / f"models--{hub_id.replace('/', '--')}"
    reference = model / "refs" / REVISION
    if reference.is_file():
        commit = reference.read_text(encoding="ascii", errors="replace").strip()
        if re.fullmatch(r"[0-9a-zA-Z]+", commit) and (model / "snapshots" / commit).is_dir():
            return model / "snapshots" / commit
    found = [folder for folder in model.glob("snapshots/*") if folder.is_dir()]
    return max(found, key=lambda folder: (folder.stat().st_mtime_ns, folder.name), default=None)


def remote_files(hub_id: str) -> Files:
    """The files of a model behind HF_ENDPOINT, with HF_TOKEN where it is set.

    Raises:
        UnknownBaseError: either variable cannot be used; reading may raise what `remote_file` does.
    """
    endpoint, token = _endpoint(), _token()

    def open_(name: str, first: int) -> ByteSource | None:
        return remote_file(f"{endpoint}/{hub_id}/resolve/{REVISION}/{urllib.parse.quote(name)}", token, first)

    def names() -> list[str]:
        listing = remote_file(f"{endpoint}/api/models/{hub_id}", token, LISTING_LIMIT + 1)
        if listing is None:
            raise UnknownBaseError(
                f"expected the model '{hub_id}' on {endpoint}; found none of that name; check the name"
            )
        entries = json_object(whole(listing, LISTING_LIMIT), listing.name).get("siblings")
        if not isinstance(entries, list):
            raise BaseModelError(f"expected a list 'siblings' from {listing.name}; found none; check HF_ENDPOINT")
        named = [entry.get("rfilename") for entry in entries if isinstance(entry, dict)]
        return sorted(name for name in named if isinstance(name, str))

    return Files(f"{endpoint}/{hub_id}", open_, names)


def _endpoint() -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
    if not re.match(r"https?://[^/\s]+(/\S*)?$", endpoint):
        raise UnknownBaseError(f"expected HF_ENDPOINT as https://host; found {endpoint!r}; correct or unset it")
    return endpoint


def _token() -> str:
    token = (os.environ.get("HF_TOKEN") or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        # The token itself belongs into no message.
        raise UnknownBaseError("expected HF_TOKEN as one word of ASCII letters; found something else; set it again")
    return token
