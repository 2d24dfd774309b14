"""A profile that is measured once and then remembered until hardware or libraries change.

What the system tells is read anew each time (a few milliseconds); what torch measured comes from a file, so a device
that was measured before starts without importing torch. The file's name is a digest of what the measurement depends on,
and the file repeats it in full: a file that is unreadable, cut off or somebody else's is measured anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError
from profiles import probe as probing
from profiles.device import DeviceProfile
from profiles.kernels import UNMEASURED
from profiles.machine import Machine, Reading, sentence
from profiles.measure import SMOLLM2_SHAPES, Shape

# Distribution → module. The file's time counts beside the version: a library built anew on the device, as the cure for
# a failing kernel says, has the version that it had.
LIBRARIES: Mapping[str, str] = {
    "edge-runtime": "profiles",
    "torch": "torch",
    "bitsandbytes": "bitsandbytes",
    "psutil": "psutil",
    "nvidia-ml-py": "pynvml",
}

# What the system tells and rates depend on.
HARDWARE = (
    "cpu_model",
    "architecture",
    "physical_cores",
    "usable_cores",
    "instruction_sets",
    "memory_total_bytes",
    "board",
    "l4t",
)

# Cards that this variable hides are not there for torch; it is CUDA's own, and no setting of ours.
VISIBLE = "CUDA_VISIBLE_DEVICES"

# A profile takes about 8 kB; what is larger is not one of ours.
LARGEST_FILE = 1_000_000

REMEMBERED = "remembered: "


def _say_nothing(_: str) -> None:
    return None


def remembered_probe(
    cache: Path,
    *,
    shapes: Sequence[Shape] = SMOLLM2_SHAPES,
    memory_limit: int | None = None,
    refresh: bool = False,
    root: Path = Path("/"),
    disk: Path = Path(),
    say: Callable[[str], None] = _say_nothing,
) -> DeviceProfile:
    """`profiles.probe.probe`, with measurements that are still true taken from a file.

    Args:
        cache: folder of the files, made when it is missing.
        shapes: (tokens, d_in, d_out) of the products that rates are measured at.
        memory_limit: bytes that this process may use, where somebody says so.
        refresh: measure in any case, and remember that.
        root: the folder that holds /proc, /sys and /etc.
        disk: a folder on the disk that models and updates will be kept on.
        say: is told, in a sentence, when a file is of no use or cannot be written; neither stops the probe.
    """
    here = Machine(root, disk, memory_limit)
    readings, unreadable = probing.read(here)
    key = _key(here, readings, shapes)
    file = cache / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    facts = None if refresh else _recalled(file, key, here, say)
    if facts is not None:
        return probing.assembled(readings, unreadable, facts)
    facts = probing.measured(here, readings, shapes)
    profile = probing.assembled(readings, unreadable, facts)
    if _lasting(facts):
        _keep(file, key, profile, say)
    return profile


def _key(here: Machine, readings: Mapping[str, Reading], shapes: Sequence[Shape]) -> dict[str, Any]:
    """All that the measurement depends on, as plain JSON types."""
    hardware = {field: readings[field].value if field in readings else None for field in HARDWARE}
    key = {
        **hardware,
        "gpus": probing.driver_names(here),
        "visible": os.environ.get(VISIBLE),
        "libraries": {name: _version(name, module) for name, module in LIBRARIES.items()},
        "shapes": shapes,
    }
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def _version(distribution: str, module: str) -> str:
    """Version and time of installation, without importing it; empty when it is not installed."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "unpackaged"
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    return f"{version} of {Path(spec.origin).stat().st_mtime_ns}"


def _recalled(
    file: Path, key: Mapping[str, Any], here: Machine, say: Callable[[str], None]
) -> dict[str, Reading | str] | None:
    """What was measured on this hardware with these libraries, or None when nobody knows."""
    try:
        profile = _profile_in(file, key)
    except FileNotFoundError:
        return None
    # RecursionError: brackets within brackets, as no profile has them.
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        say(f"the remembered profile {file} is of no use and is measured anew: {sentence(error)}")
        return None
    facts: dict[str, Reading | str] = {}
    for field in probing.MEASURED:
        if field in profile.unreadable:
            facts[field] = profile.unreadable[field]
        else:
            reason = profile.reasons[field].removeprefix(REMEMBERED)
            facts[field] = Reading(getattr(profile, field), f"{REMEMBERED}{reason}")
    cards = facts["gpus"]
    if isinstance(cards, Reading) and cards.value:
        facts["gpus"] = probing.driver_cards(cards, here)
    return facts


def _profile_in(file: Path, key: Mapping[str, Any]) -> DeviceProfile:
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"a profile has at most {LARGEST_FILE} bytes; found {file.stat().st_size}")
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or set(data) != {"key", "profile"}:
        raise ValueError("expected an object of 'key' and 'profile'")
    if data["key"] != key:
        raise ValueError("it was measured on other hardware or with other libraries")
    return DeviceProfile.from_json(data["profile"])


def _lasting(facts: Mapping[str, Reading | str]) -> bool:
    """Whether the measurement is worth remembering: torch ran, and nothing failed that may work the next time."""
    causes = [fact for fact in facts.values() if isinstance(fact, str)]
    return isinstance(facts["gemm_fp32_gflops"], Reading) and not any(cause.startswith(UNMEASURED) for cause in causes)


def _keep(file: Path, key: Mapping[str, Any], profile: DeviceProfile, say: Callable[[str], None]) -> None:
    """Writes the file whole or not at all."""
    text = json.dumps({"key": key, "profile": profile.to_json()}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
        part = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        say(f"the profile cannot be remembered in {file.parent} and will be measured again: {sentence(error)}")
