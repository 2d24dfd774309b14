"""Known devices, from `devices/*.toml`: for simulation and for planning as if on another machine (`--as-device`).

Their figures are public ones, each with its source in `[reasons]`; none was measured by this project. What nobody
published is in `[unreadable]`.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from edge_runtime.errors import ConfigError, unknown_name
from profiles.device import DeviceProfile
from profiles.machine import with_reserve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def known_devices() -> tuple[str, ...]:
    """The names of the catalogue, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.toml")))


def device(name: str) -> DeviceProfile:
    """The profile of a known device, with nothing else running and no limit on the process.

    Raises:
        ConfigError: no such device (lists those that there are), or its file is malformed.
    """
    if name not in known_devices():
        raise ConfigError(unknown_name("device", name, known_devices()))
    try:
        data = tomllib.loads((_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the file of the device '{name}' is not TOML: {error}") from error
    cards = [gpu for gpu in data["gpus"] if not gpu["unified"]]
    free = cards[0]["free_bytes"] if cards else data["memory_available_bytes"]
    bearable = with_reserve(free, "free on the card" if cards else "what is available")
    data.update(name=name, memory_limit_bytes=None, memory_bearable_bytes=bearable.value)
    data["reasons"].update(
        name="its name in the catalogue",
        memory_limit_bytes="the whole machine is taken to be free for training",
        memory_bearable_bytes=bearable.reason,
    )
    return DeviceProfile.from_json(data)


def _folder() -> Path:
    return Path(str(files("profiles"))) / "devices"
