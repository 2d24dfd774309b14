"""The adapter that `edge-runtime export` takes: a server's, a device's or a folder's, and what is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from edge_runtime.config import Config
from edge_runtime.errors import ExportError
from edge_runtime.lora.adapter import Adapter
from export.origin import Origin
from export.reading import Leaving, family_of, read
from server import standing
from server.aggregators.beside import published
from server.aggregators.method import load_state
from server.fleet import Member
from server.store import Store, StoredVersion


def of_server(folder: Path, version: int | None, config: Config, *, given: bool) -> tuple[Leaving, str]:
    """A version of the global adapter.

    Args:
        folder: a server's store.
        version: its number; the newest when None.
        config: of the fleet.
        given: whether that is the fleet's own, and not only defaults.

    Raises:
        ExportError: the store has no such version.
    """
    if not (folder / "fleet.db").exists():
        raise ExportError(f"a server's store was expected in {folder}; found none; check --store")
    store = Store(folder)
    try:
        stored, newest = _stored(store, folder, version)
        text = store.rounds()
        state = standing.load(text, store.members()) if text is not None else None
    finally:
        store.close()
    found = _published(stored)
    members = list(state.members.values()) if state is not None else []
    about = Origin(
        base="",
        fingerprint=(state.base if state is not None else None) or "",
        kind="global",
        family=family_of(found),
        fleet=config.fleet.name if given else "",
        run=state.run if state is not None else "",
        version=stored.version,
        rounds=state.round if state is not None and newest else None,
        method=config.aggregator.method if given else "",
        devices=len(members) or None,
        data=_data(members),
        losses=_losses(members) if newest else {},
    )
    return Leaving(found, config.adapter.scaling, "", about), f"version {stored.version} of the global adapter"


def _stored(store: Store, folder: Path, version: int | None) -> tuple[StoredVersion, bool]:
    """A version, and whether it is the newest."""
    versions = store.versions()
    number = versions[-1] if version is None and versions else version
    stored = store.version(number) if number is not None else None
    if stored is None:
        raise ExportError(f"{folder} has versions {versions}; found no version {version}; choose one of them")
    return stored, stored.version == versions[-1]


def _published(stored: StoredVersion) -> Adapter:
    found = published(load_state(stored.state))
    if any(name.endswith(".core") for name in found):
        raise ExportError(
            "this fleet trains cores between bases that only devices have; export a device's personal adapter: "
            "--state-dir"
        )
    return found


def of_device(folder: Path) -> tuple[Leaving, str]:
    """The personal adapter that a device made when its fleet had finished.

    Raises:
        ExportError: there is none.
    """
    personal = folder / "personal"
    if not personal.is_dir():
        raise ExportError(
            f"a device's personal adapter was expected in {personal}; found none; it is made when its fleet ends"
        )
    return read(personal), f"the personal adapter in {personal}"


def of_folder(folder: Path) -> tuple[Leaving, str]:
    """The adapter of any folder, PEFT's or ours.

    Raises:
        ExportError: there is none, or one that is more than LoRA.
    """
    return read(folder), f"the adapter in {folder}"


def _data(members: Sequence[Member]) -> str:
    """What they trained on, as far as a server knows."""
    if not members:
        return ""
    return f"{sum(member.hello.examples for member in members)} examples of {len(members)} devices, which kept them"


def _losses(members: Sequence[Member]) -> dict[str, float]:
    """The mean of what the devices reported at their end."""
    ends = [member.ended.held_out for member in members if member.ended is not None]
    found = {
        "base": [end.base for end in ends if end.base is not None],
        "global": [end.merged for end in ends if end.merged is not None],
    }
    return {name: fmean(losses) for name, losses in found.items() if losses}
