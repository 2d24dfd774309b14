"""`edge-runtime export`: a personal or global adapter in the format of an inference engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edge_runtime import config as settings
from edge_runtime.cli import shell
from edge_runtime.errors import ExportError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.files import read_peft_folder
from edge_runtime.lora.native import is_native_folder, read_native_folder
from export import get
from server.aggregators.beside import published
from server.aggregators.method import load_state
from server.store import Store


def run(
    out: Path,
    store: Path | None,
    version: int | None,
    state_dir: Path | None,
    name: str,
    base: str,
    file: Path | None,
    overrides: Sequence[str],
) -> int:
    """Write the adapter and say where it is."""
    chosen = get(name)
    config = settings.load(file, overrides)
    say = shell.logger("export", as_json=False)
    if (store is None) == (state_dir is None):
        raise ExportError("expected one of --store (a server's) and --state-dir (a device's); give exactly one")
    if store is not None:
        adapter, what = _of_server(store, version)
        base_name = base
    else:
        folder = Path(str(state_dir)) / "personal"
        adapter, base_name = _of_device(folder, base)
        what = f"the personal adapter in {folder}"
    written = chosen.write(adapter, out, base_name=base_name, scaling=config.adapter.scaling)
    say(f"{what} → {written}; read by {chosen.readers}")
    return 0


def _of_server(folder: Path, version: int | None) -> tuple[Adapter, str]:
    """A version of the global adapter.

    Raises:
        ExportError: the store has no such version.
    """
    if not (folder / "fleet.db").exists():
        raise ExportError(f"a server's store was expected in {folder}; found none; check --store")
    store = Store(folder)
    try:
        versions = store.versions()
        number = versions[-1] if version is None and versions else version
        stored = store.version(number) if number is not None else None
        if stored is None:
            raise ExportError(f"{folder} has versions {versions}; found no version {version}; choose one of them")
        found = published(load_state(stored.state))
        if any(name.endswith(".core") for name in found):
            raise ExportError(
                "this fleet trains cores between bases that only devices have; export a device's personal adapter: "
                "--state-dir"
            )
        return found, f"version {stored.version} of the global adapter"
    finally:
        store.close()


def _of_device(folder: Path, base: str) -> tuple[Adapter, str]:
    """The personal adapter, and the name of its base."""
    if is_native_folder(folder):
        found = read_native_folder(folder)
        return found.adapter, found.base_name or base
    return read_peft_folder(folder), _base_of(folder, base)


def _base_of(folder: Path, base: str) -> str:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return str(config.get("base_model_name_or_path") or base)
