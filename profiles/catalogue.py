"""Known devices, from `devices/*.toml`: for simulation and for planning as if on another machine (`--as-device`).

Their figures are public ones or estimates from them, each with its source in `[reasons]`; none was measured by this
project. What nobody published is in `[unreadable]`. A file of one's own in the same form serves as well, and so does
the profile of a device that was measured.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError
from profiles.device import UNITS, DeviceProfile
from profiles.machine import Reading, with_reserve
from profiles.records import checked, typed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The same for every device of the catalogue, so no file says it.
SAME: Mapping[str, Reading] = {
    "memory_limit_bytes": Reading(None, "the whole machine is taken to be free for training"),
    "gemm_shapes": Reading((), "nothing was measured; the reasons of the rates say what they stand for"),
    "temperature_celsius": Reading(None, "a device of the catalogue has no sensors"),
    "battery_percent": Reading(None, "taken to run from the mains"),
    "on_battery": Reading(False, "taken to run from the mains"),
}
_COMPUTED = ("name", "memory_bearable_bytes")
_SENTENCES = ("reasons", "unreadable")
_KEYS = (*(field for field in UNITS if field not in SAME and field not in _COMPUTED), *_SENTENCES)

# What no device can be, whatever the type of each field: (is it so?, the sentence that says what is expected).
_RULES: tuple[tuple[Callable[[DeviceProfile], bool], str], ...] = (
    (lambda found: found.physical_cores > 0, "'physical_cores' of 1 or more"),
    (lambda found: found.usable_cores > 0, "'usable_cores' of 1 or more"),
    (lambda found: found.memory_total_bytes > 0, "'memory_total_bytes' above 0"),
    (
        lambda found: found.memory_available_bytes <= found.memory_total_bytes,
        "'memory_available_bytes' of at most 'memory_total_bytes'",
    ),
    (lambda found: found.kind != "cuda" or bool(found.gpus), "a table [[gpus]], its 'kind' being \"cuda\""),
    (
        lambda found: all(gpu.free_bytes <= gpu.total_bytes for gpu in found.gpus),
        "'free_bytes' of at most 'total_bytes' in [[gpus]]",
    ),
)


def known_devices() -> tuple[str, ...]:
    """The names of the catalogue, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.toml")))


def device(name: str) -> DeviceProfile:
    """The profile of a known device, with nothing else running and no limit on the process.

    Args:
        name: of the catalogue, or the path of a TOML file in the same form (it ends in .toml or holds a slash), or of
            what `edge-runtime profile --json` printed (it ends in .json): a device that was measured.

    Raises:
        ConfigError: no such device (lists those that there are, the nearest first), or its file is malformed: names
            the file, the field, and what was expected.
    """
    known = known_devices()
    if name in known:
        return _read(_folder() / f"{name}.toml")
    if name.endswith(".json"):
        return _measured(Path(name))
    if name.endswith(".toml") or "/" in name or "\\" in name:
        return _read(Path(name))
    likeness = {entry: difflib.SequenceMatcher(None, name.lower(), entry).ratio() for entry in known}
    nearest = sorted(known, key=lambda entry: (-likeness[entry], entry))
    raise ConfigError(
        f"unknown device '{name}'; expected the path of a .toml or .json file, or one of (nearest first): "
        f"{', '.join(nearest)}"
    )


def _read(path: Path) -> DeviceProfile:
    kind = f"device file {path}"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # what is no TOML, or no UTF-8, is a ValueError
        why = " ".join(str(error).split())
        raise ConfigError(
            f"the {kind} needs to be readable TOML; found: {why}; correct the file or the path"
        ) from error
    values = dict(checked(kind, {"unreadable": {}, **data}, _KEYS))
    typed(kind, values, dict.fromkeys(_SENTENCES, "Mapping[str, str]"))
    _explained(kind, values)
    values.update({field: reading.value for field, reading in SAME.items()}, name=path.stem, memory_bearable_bytes=0)
    values["reasons"] = {
        **values["reasons"],
        **{field: reading.reason for field, reading in SAME.items()},
        "name": "its name in the catalogue" if path.parent == _folder() else f"the name of {path}",
        "memory_bearable_bytes": "",
    }
    return _bearable(_possible(DeviceProfile.from_json(values, kind), kind))


def _measured(path: Path) -> DeviceProfile:
    kind = f"device file {path}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"the {kind} needs to be what 'edge-runtime profile --json' printed; found: {why}; make it anew"
        ) from error
    profile = data.get("profile", data) if isinstance(data, dict) else None
    if not isinstance(profile, dict):
        raise ConfigError(f"the {kind} needs to be the object that 'edge-runtime profile --json' printed; make it anew")
    return _possible(DeviceProfile.from_json(profile, kind), kind)


def _possible(found: DeviceProfile, kind: str) -> DeviceProfile:
    for holds, expected in _RULES:
        if not holds(found):
            raise ConfigError(f"the {kind} needs {expected}; correct it")
    return found


def _explained(kind: str, values: Mapping[str, Any]) -> None:
    """Each value of a file has either a reason or, where it is unknown, the cause; and nothing else has."""
    reasons, causes = set(values["reasons"]), set(values["unreadable"])
    wanted = set(_KEYS) - set(_SENTENCES)
    faults = (
        ("a sentence in [reasons] or [unreadable] for", wanted - reasons - causes),
        ("only one sentence, in [reasons] or in [unreadable], for", reasons & causes),
        ("no sentence for what is no field of it:", (reasons | causes) - wanted),
    )
    for expected, fields in faults:
        if fields:
            raise ConfigError(f"the {kind} needs {expected} {', '.join(sorted(fields))}; correct it")


def _bearable(found: DeviceProfile) -> DeviceProfile:
    """With what training may fill: the card's own memory where there is one, or else what is available."""
    on_card = found.pool == "gpu"
    free = found.gpus[0].free_bytes if on_card else found.memory_available_bytes
    bearable = with_reserve(free, "free on the card" if on_card else "what is available")
    reasons = {**found.reasons, "memory_bearable_bytes": bearable.reason}
    return replace(found, memory_bearable_bytes=bearable.value, reasons=reasons)


def _folder() -> Path:
    return Path(str(files("profiles"))) / "devices"
