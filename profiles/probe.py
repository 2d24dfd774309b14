"""Read and measure the machine: every field of the profile gets a value and a reason, or a cause why it has none.

What the system tells comes from `machine`, `boards` and `sensors`; what only a run can tell from `gpus`, `measure` and
`kernels`, which are handed the libraries that this module alone loads, by name and inside functions.
`remembered.remembered_probe` does the same and measures only when hardware or libraries have changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from profiles import boards, kernels, machine, measure, sensors
from profiles import gpus as cards
from profiles.device import MIB, NEUTRAL, UNITS, DeviceProfile
from profiles.light_import import light_import
from profiles.machine import FAILURES, Machine, Reading, sentence, with_reserve
from profiles.measure import SMOLLM2_SHAPES, Shape
from profiles.records import typed

# What the system tells. All of it is read anew each time: together it takes a few milliseconds.
READERS: Mapping[str, Callable[[Machine], Reading]] = {
    **machine.READERS,
    "board": boards.board,
    "l4t": boards.l4t,
    "temperature_celsius": sensors.temperature,
    "battery_percent": sensors.battery_percent,
    "on_battery": sensors.on_battery,
}

# What changes while a device runs.
CHANGING = (
    "memory_available_bytes",
    "memory_limit_bytes",
    "memory_bearable_bytes",
    "swap_bytes",
    "disk_free_bytes",
    "temperature_celsius",
    "battery_percent",
    "on_battery",
)

# What torch measures, step by step; a step that fails costs its own fields and no others.
STEPS: Mapping[str, tuple[str, ...]] = {
    "gpus": ("gpus",),
    "gemm": ("gemm_fp32_gflops", "gemm_bf16_gflops", "bf16_rate_ratio", "bf16_is_fast", "gemm_shapes"),
    "bandwidth": ("memory_bandwidth_gb_s",),
    "calls": ("op_overhead_us",),
    "kernels": kernels.FIELDS,
}
MEASURED = ("kind", *(field for step in STEPS.values() for field in step))

# What this machine cannot tell by itself.
ELSEWHERE: Mapping[str, str] = {
    "link_up_mbit_s": "not measured: only a test against the broker can tell",
    "link_down_mbit_s": "not measured: only a test against the broker can tell",
    "link_latency_ms": "not measured: only a test against the broker can tell",
    "power_watts": "no sensor tells what the whole device draws; the catalogue knows it of some devices",
}

# Without a measurement: instruction sets that multiply bf16 natively.
BF16_SETS = ("avx512_bf16", "amx_bf16", "bf16")

# Importing torch and bitsandbytes, and measuring, was survived under a limit of 300 MiB and not of 260 (Linux, x86-64).
LEAST_TO_MEASURE = 280 * MIB

_TYPES = {entry.name: str(entry.type) for entry in fields(DeviceProfile)}


def probe(
    *,
    memory_limit: int | None = None,
    measure: bool = True,
    root: Path = Path("/"),
    disk: Path = Path(),
    shapes: Sequence[Shape] = SMOLLM2_SHAPES,
) -> DeviceProfile:
    """Reads this machine; never stops for a field that cannot be read, which `unreadable` then explains.

    Args:
        memory_limit: bytes that this process may use, where somebody says so; a tighter control group still counts.
        measure: run torch (a few seconds, most of them for importing it and bitsandbytes, which training needs
            anyway). Without it bf16 and quantised layers are judged by the instruction sets, and rates stay unknown.
        root: the folder that holds /proc, /sys and /etc.
        disk: a folder on the disk that models and updates will be kept on.
        shapes: (tokens, d_in, d_out) of the products that rates are measured at; the model's own, if it is known.
    """
    here = Machine(root, disk, memory_limit)
    readings, unreadable = read(here)
    facts = measured(here, readings, shapes) if measure else _assumed(here, readings)
    return assembled(readings, unreadable, facts)


def refresh(
    profile: DeviceProfile,
    *,
    memory_limit: int | None = None,
    root: Path = Path("/"),
    disk: Path = Path(),
) -> DeviceProfile:
    """The same device now: memory, swap, disk and sensors are read again, what was measured is kept.

    A card's own memory is left as it was: this process may be what fills it.
    """
    changing = [field for field in CHANGING if field != "memory_bearable_bytes" or profile.pool != "gpu"]
    readings, unreadable = read(Machine(root, disk, memory_limit), changing)
    kept = {field: cause for field, cause in profile.unreadable.items() if field not in changing}
    reasons = {field: reason for field, reason in profile.reasons.items() if field not in changing}
    values = {field: readings[field].value if field in readings else NEUTRAL[field] for field in changing}
    return replace(
        profile,
        **values,
        reasons={**reasons, **{field: reading.reason for field, reading in readings.items()}},
        unreadable={**kept, **unreadable},
    )


def read(here: Machine, only: Sequence[str] = tuple(READERS)) -> tuple[dict[str, Reading], dict[str, str]]:
    """(readings, causes) of what the system tells; a value that cannot be, such as a negative size, is a cause too."""
    readings: dict[str, Reading] = {}
    unreadable: dict[str, str] = {}
    for field in only:
        try:
            reading = READERS[field](here)
            typed("reading", {field: reading.value}, {field: _TYPES[field]}, signed=("temperature_celsius",))
            readings[field] = reading
        except FAILURES as error:
            unreadable[field] = f"could not be read: {sentence(error)}"
    return readings, unreadable


def measured(here: Machine, readings: Mapping[str, Reading], shapes: Sequence[Shape]) -> dict[str, Reading | str]:
    """What only running torch can tell: a reading or a cause for each field of `MEASURED`.

    Where importing torch would get this process killed, nothing is measured; no plan fits there either.
    """
    bearable = readings.get("memory_bearable_bytes")
    if bearable is not None and bearable.value < LEAST_TO_MEASURE and "torch" not in sys.modules:
        needed = f"measuring needs about {LEAST_TO_MEASURE / MIB:.0f} MiB, found {bearable.value / MIB:.0f} MiB"
        return _assumed(here, readings, f"not measured: {needed} bearable; free some memory or raise the limit")
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        cause = f"torch cannot be imported ({sentence(error)}); run: pip install 'edge-runtime[client]'"
        return _assumed(here, readings, cause) | dict.fromkeys(("four_bit", "eight_bit"), cause)
    kind = _kind(torch)
    where = "cuda" if kind.value == "cuda" else "cpu"
    threads = _threads(readings) or torch.get_num_threads()
    how = f"on {where}" if where == "cuda" else f"on {where}, {threads} threads"
    facts: dict[str, Reading | str] = {"kind": kind}
    steps: Mapping[str, Callable[[], Mapping[str, Reading | str]]] = {
        "gpus": lambda: {"gpus": cards.gpus(torch, _optional("pynvml"), unified=_unified(here))},
        "gemm": lambda: measure.gemm(torch, where, shapes, how),
        "bandwidth": lambda: {
            "memory_bandwidth_gb_s": measure.bandwidth(torch, where, own_memory=_own_memory(facts), how=how)
        },
        "calls": lambda: {"op_overhead_us": measure.op_overhead(torch, where)},
        "kernels": lambda: _kernels(where, shapes, facts),
    }
    with measure.threads_of(torch, threads):
        for step, run in steps.items():
            try:
                facts.update(run())
            except FAILURES as error:
                facts.update(dict.fromkeys(STEPS[step], f"{kernels.UNMEASURED}: {sentence(error)}"))
    return facts


def assembled(
    readings: Mapping[str, Reading], unreadable: Mapping[str, str], facts: Mapping[str, Reading | str]
) -> DeviceProfile:
    """The profile of what was read and what was measured."""
    known = {**readings, **{field: fact for field, fact in facts.items() if isinstance(fact, Reading)}}
    known.update(_on_card(known))
    causes = {**ELSEWHERE, **unreadable, **{field: fact for field, fact in facts.items() if isinstance(fact, str)}}
    return DeviceProfile(
        **{field: known[field].value if field in known else NEUTRAL[field] for field in UNITS},
        reasons={field: reading.reason for field, reading in known.items()},
        unreadable={field: cause for field, cause in causes.items() if field not in known},
    )


def report_trials(where: str, shape: Shape, dtype: str) -> None:
    """Prints the outcome of each trial of quantised layers as soon as it is known; run in a process of its own."""
    for outcome in kernels.trials(light_import, where, shape, dtype):
        print(kernels.written(outcome), flush=True)  # noqa: T201  the parent process reads it


def driver_cards(gpus: Reading, here: Machine) -> Reading:
    """A reading of cards with what the driver says is free on them now, where nvidia-ml-py can ask it; no torch."""
    fresh = cards.free_now(_optional("pynvml"), gpus.value, unified=_unified(here))
    return Reading(fresh, gpus.reason)


def driver_names(here: Machine) -> tuple[str, ...]:
    """What the driver calls the cards, without torch: by nvidia-ml-py, or else by its files in /proc."""
    told = cards.by_driver(_optional("pynvml"), unified=_unified(here)).cards
    return tuple(card.name for card in told.values()) or cards.names_in_proc(here.root)


def _assumed(
    here: Machine,
    readings: Mapping[str, Reading],
    cause: str = "not measured: the probe was asked not to run torch",
) -> dict[str, Reading | str]:
    """What can be said of kernels without running one."""
    sets = readings["instruction_sets"].value if "instruction_sets" in readings else ()
    native = [name for name in BF16_SETS if name in sets]
    why = f"has {', '.join(native)}" if native else f"has none of {', '.join(BF16_SETS)}"
    facts: dict[str, Reading | str] = dict.fromkeys(MEASURED, cause)
    try:
        facts["gpus"] = cards.gpus(None, _optional("pynvml"), unified=_unified(here))
    except FAILURES as error:
        facts["gpus"] = f"not looked for by torch, and {sentence(error)}"
    return facts | {
        "kind": Reading("apple" if _is_apple() else "cpu", "by the platform; torch was not asked for GPUs"),
        "bf16_is_fast": Reading(bool(native), f"not measured; the processor {why}"),
        "four_bit": Reading(
            "avx2" in sets or "neon" in sets, "not tried; bitsandbytes trains on x86 with AVX2 and on 64-bit ARM"
        ),
        "eight_bit": Reading(True, "not tried; 8-bit layers need torch alone"),
    }


def _kind(torch: Any) -> Reading:
    """Where training runs: on a card only if a first kernel there gives the right number."""
    otherwise = "apple" if _is_apple() else "cpu"
    if not torch.cuda.is_available():
        return Reading(otherwise, f"torch {torch.__version__} trains on cpu here")
    try:
        found = float((torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")).sum())
    except FAILURES as error:
        return Reading(
            otherwise, f"torch {torch.__version__} sees CUDA, but its first kernel failed: {sentence(error)}"
        )
    if found != 8.0:
        return Reading(otherwise, f"the first product on CUDA gave {found} where 8.0 is right; trains on cpu")
    return Reading("cuda", f"torch {torch.__version__} trains on cuda here")


def _kernels(where: str, shapes: Sequence[Shape], facts: Mapping[str, Reading | str]) -> dict[str, Reading | str]:
    fast = facts["bf16_is_fast"]
    dtype = "bfloat16" if isinstance(fast, Reading) and fast.value else "float32"
    largest = max(shapes, key=lambda shape: shape[1] * shape[2])
    if where == "cuda":
        outcomes = kernels.trials_in_child(where, largest, dtype)
    else:
        outcomes = kernels.trials(light_import, where, largest, dtype)
    return kernels.verdicts(outcomes, where, dtype, installed=_installed("bitsandbytes"))


def _on_card(known: Mapping[str, Reading]) -> dict[str, Reading]:
    """The bearable memory of a GPU with memory of its own: there training fills the card, not the host."""
    gpus = known["gpus"].value if "gpus" in known else ()
    if known["kind"].value != "cuda" or not gpus or gpus[0].unified:
        return {}
    return {"memory_bearable_bytes": with_reserve(gpus[0].free_bytes, f"free on {gpus[0].name}, where training runs")}


def _own_memory(facts: Mapping[str, Reading | str]) -> bool:
    gpus, kind = facts["gpus"], facts["kind"]
    on_card = isinstance(kind, Reading) and kind.value == "cuda"
    return on_card and isinstance(gpus, Reading) and bool(gpus.value) and not gpus.value[0].unified


def _threads(readings: Mapping[str, Reading]) -> int | None:
    """One for each usable core; hardware threads add nothing to products."""
    counts = [readings[field].value for field in ("usable_cores", "physical_cores") if field in readings]
    return min(counts) if counts else None


def _unified(here: Machine) -> bool:
    return boards.is_jetson(here)


def _optional(library: str) -> Any | None:
    """A library that may be missing."""
    try:
        return importlib.import_module(library)
    except ImportError:
        return None


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _is_apple() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"
