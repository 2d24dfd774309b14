"""What a device is: one frozen value, every field with a unit and the sentence that explains it.

A field that could not be read holds its neutral value (0, False, empty) and is named in `unreadable` with the cause: a
probe never stops because one file of /proc is missing, and a reader of the profile always knows what is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from edge_runtime.errors import ConfigError, unknown_name
from profiles.records import checked, typed

KINDS = ("cpu", "cuda", "apple")

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: as its driver calls it.
        total_bytes: its memory.
        free_bytes: what was free when it was read.
        capability: CUDA compute capability such as "8.7"; empty elsewhere.
        unified: True when it shares the memory of the CPU, as on a Jetson.
    """

    name: str
    total_bytes: int
    free_bytes: int
    capability: str = ""
    unified: bool = False


@dataclass(frozen=True)
class DeviceProfile:
    """What one device has and can do; `UNITS` gives the unit of each field, `reasons` where its value comes from.

    Attributes:
        name: what people call it: host name, or the name in the catalogue.
        kind: where training runs: "cpu", "cuda" or "apple".
        cpu_model: as the kernel reports it.
        architecture: x86_64, aarch64, arm64 …
        physical_cores: cores of the machine, without hardware threads.
        usable_cores: what affinity and CPU quota leave to this process.
        instruction_sets: those that change how fast training runs: avx2, avx512f, avx512_bf16, amx_bf16, neon, sve …
        memory_total_bytes: RAM of the machine.
        memory_available_bytes: RAM that the kernel could hand out now without swapping.
        memory_limit_bytes: the tightest limit on this process (cgroup or declared), None when there is none.
        memory_bearable_bytes: what the training process, all it holds included, may use at its peak.
        swap_bytes: swap of the machine; never counted as bearable.
        disk_free_bytes: free space where the probe looked.
        gpus: accelerators that torch can use.
        gemm_fp32_gflops: measured rate of float32 matrix products, all usable cores.
        gemm_bf16_gflops: the same in bfloat16.
        bf16_rate_ratio: bf16 rate / fp32 rate.
        bf16_is_fast: True when computing in bf16 costs no speed.
        four_bit: True when a 4-bit layer's forward and backward gave right numbers here.
        board: the board's name, such as "NVIDIA Jetson Orin Nano Developer Kit"; empty where there is none.
        l4t: release of L4T, the Linux of a Jetson; empty elsewhere.
        eight_bit: as `four_bit`, for a layer whose weights are kept as int8 with a scale for each row.
        memory_bandwidth_gb_s: measured rate of a large copy; what is read and what is written both count.
        nf4_gweights_s: billions of 4-bit weights opened per second, measured.
        int8_gweights_s: the same for int8 weights.
        op_overhead_us: microseconds that one small torch call costs, measured on a product of 64 pairs of numbers.
        gemm_shapes: (tokens, d_in, d_out) of the products that the GEMM rates were measured at.
        temperature_celsius: the hottest sensor of processor and board; None where there is none.
        battery_percent: charge of the battery; None where there is none.
        on_battery: True when there is a battery and nothing charges it.
        link_up_mbit_s: measured rate towards the broker; 0 while nobody measured it.
        link_down_mbit_s: the same from the broker.
        link_latency_ms: milliseconds of a small message to the broker and back; 0 while nobody measured it.
        power_watts: of the whole device under load, from the catalogue; 0 where nobody knows.
        reasons: field → one sentence: where the value comes from.
        unreadable: field → one sentence: why it could not be read, and what to do.
    """

    name: str
    kind: str
    cpu_model: str
    architecture: str
    physical_cores: int
    usable_cores: int
    instruction_sets: tuple[str, ...]
    memory_total_bytes: int
    memory_available_bytes: int
    memory_limit_bytes: int | None
    memory_bearable_bytes: int
    swap_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]
    gemm_fp32_gflops: float
    gemm_bf16_gflops: float
    bf16_rate_ratio: float
    bf16_is_fast: bool
    four_bit: bool
    board: str
    l4t: str
    eight_bit: bool
    memory_bandwidth_gb_s: float
    nf4_gweights_s: float
    int8_gweights_s: float
    op_overhead_us: float
    gemm_shapes: tuple[tuple[int, int, int], ...]
    temperature_celsius: float | None
    battery_percent: float | None
    on_battery: bool
    link_up_mbit_s: float
    link_down_mbit_s: float
    link_latency_ms: float
    power_watts: float
    reasons: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(unknown_name("kind of device", self.kind, KINDS))
        silent = sorted(set(UNITS) - set(self.reasons) - set(self.unreadable))
        if silent:
            raise ConfigError(
                f"every field of a profile needs a reason or a cause; found none for: {', '.join(silent)}"
            )

    @property
    def pool(self) -> str:
        """Which memory training fills: "host", "gpu" (a card's own) or "shared" (a GPU on the host's memory)."""
        if self.kind != "cuda" or not self.gpus:
            return "host"
        return "shared" if self.gpus[0].unified else "gpu"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal profile."""
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("reasons", "unreadable")},
            "instruction_sets": list(self.instruction_sets),
            "gpus": [asdict(gpu) for gpu in self.gpus],
            "gemm_shapes": [list(shape) for shape in self.gemm_shapes],
            "reasons": dict(self.reasons),
            "unreadable": dict(self.unreadable),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], kind: str = "device profile") -> DeviceProfile:
        """The profile that `to_json` wrote.

        Args:
            data: the object.
            kind: what it is called when it is wrong; names the file, where there is one.

        Raises:
            ConfigError: keys are missing or unknown, or a value is not of its field's type, or negative.
        """
        values = dict(checked(kind, data, (entry.name for entry in fields(cls))))
        typed(kind, values, {entry.name: str(entry.type) for entry in fields(cls)}, signed=("temperature_celsius",))
        gpu_types = {entry.name: str(entry.type) for entry in fields(Gpu)}
        for gpu in values["gpus"]:
            typed(f"GPU of the {kind}", checked(f"GPU of the {kind}", gpu, gpu_types), gpu_types)
        values["gpus"] = tuple(Gpu(**gpu) for gpu in values["gpus"])
        values["instruction_sets"] = tuple(values["instruction_sets"])
        values["gemm_shapes"] = tuple(tuple(shape) for shape in values["gemm_shapes"])
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{error} (in the {kind})") from error


UNITS: Mapping[str, str] = {
    "name": "",
    "kind": "",
    "cpu_model": "",
    "architecture": "",
    "physical_cores": "cores",
    "usable_cores": "cores",
    "instruction_sets": "",
    "memory_total_bytes": "bytes",
    "memory_available_bytes": "bytes",
    "memory_limit_bytes": "bytes",
    "memory_bearable_bytes": "bytes",
    "swap_bytes": "bytes",
    "disk_free_bytes": "bytes",
    "gpus": "",
    "gemm_fp32_gflops": "GFLOP/s",
    "gemm_bf16_gflops": "GFLOP/s",
    "bf16_rate_ratio": "times fp32",
    "bf16_is_fast": "",
    "four_bit": "",
    "board": "",
    "l4t": "",
    "eight_bit": "",
    "memory_bandwidth_gb_s": "GB/s",
    "nf4_gweights_s": "billion weights/s",
    "int8_gweights_s": "billion weights/s",
    "op_overhead_us": "µs",
    "gemm_shapes": "tokens x inputs x outputs",
    "temperature_celsius": "°C",
    "battery_percent": "%",
    "on_battery": "",
    "link_up_mbit_s": "Mbit/s",
    "link_down_mbit_s": "Mbit/s",
    "link_latency_ms": "ms",
    "power_watts": "W",
}

# What stands where nobody could tell; `reasons` or `unreadable` says so.
NEUTRAL: Mapping[str, Any] = {
    "name": "unnamed",
    "kind": "cpu",
    "cpu_model": "",
    "architecture": "",
    "physical_cores": 1,
    "usable_cores": 1,
    "instruction_sets": (),
    "memory_total_bytes": 0,
    "memory_available_bytes": 0,
    "memory_limit_bytes": None,
    "memory_bearable_bytes": 0,
    "swap_bytes": 0,
    "disk_free_bytes": 0,
    "gpus": (),
    "gemm_fp32_gflops": 0.0,
    "gemm_bf16_gflops": 0.0,
    "bf16_rate_ratio": 0.0,
    "bf16_is_fast": False,
    "four_bit": False,
    "board": "",
    "l4t": "",
    "eight_bit": False,
    "memory_bandwidth_gb_s": 0.0,
    "nf4_gweights_s": 0.0,
    "int8_gweights_s": 0.0,
    "op_overhead_us": 0.0,
    "gemm_shapes": (),
    "temperature_celsius": None,
    "battery_percent": None,
    "on_battery": False,
    "link_up_mbit_s": 0.0,
    "link_down_mbit_s": 0.0,
    "link_latency_ms": 0.0,
    "power_watts": 0.0,
}

# What a field's name ends in because of its unit; people read the unit beside the value.
_SUFFIXES = ("_bytes", "_gflops", "_gb_s", "_gweights_s", "_us", "_celsius", "_percent", "_mbit_s", "_ms", "_watts")


def with_link(
    profile: DeviceProfile, *, up_mbit_s: float, down_mbit_s: float, latency_ms: float, reason: str
) -> DeviceProfile:
    """The profile with what a test of its link found.

    Args:
        profile: any profile.
        up_mbit_s: rate towards the broker, Mbit/s.
        down_mbit_s: rate from the broker, Mbit/s.
        latency_ms: of a small message to the broker and back, in milliseconds.
        reason: one sentence: how it was measured.
    """
    found = {"link_up_mbit_s": up_mbit_s, "link_down_mbit_s": down_mbit_s, "link_latency_ms": latency_ms}
    return replace(
        profile,
        link_up_mbit_s=up_mbit_s,
        link_down_mbit_s=down_mbit_s,
        link_latency_ms=latency_ms,
        reasons={**profile.reasons, **dict.fromkeys(found, reason)},
        unreadable={name: cause for name, cause in profile.unreadable.items() if name not in found},
    )


@dataclass(frozen=True)
class Row:
    """One line of a table about a device or a plan: what, how much (with its unit), and why."""

    field: str
    value: str
    reason: str


def rows(profile: DeviceProfile) -> tuple[Row, ...]:
    """The profile as lines for people, in the order of its fields."""
    return tuple(
        Row(
            _title(name),
            "unreadable" if name in profile.unreadable else shown(getattr(profile, name), unit),
            profile.unreadable.get(name) or profile.reasons[name],
        )
        for name, unit in UNITS.items()
    )


def shown(value: Any, unit: str) -> str:
    """A value with its unit, as a person writes it: bytes as MiB, None as "none", a list with commas."""
    if value is None or value in ((), ""):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if unit == "bytes":
        return f"{value / MIB:,.0f} MiB"
    if isinstance(value, tuple):
        return ", ".join(_item(item) for item in value)
    number = _digits(value) if isinstance(value, float) else f"{value}"
    return f"{number} {unit}".rstrip()


def _title(name: str) -> str:
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix).replace("_", " ")


def _digits(value: float) -> str:
    """Three digits that count: 0.0123, 1.50, 23.4, 1,280."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def _item(item: object) -> str:
    if isinstance(item, Gpu):
        capability = f", sm_{item.capability.replace('.', '')}" if item.capability else ""
        return f"{item.name} ({item.free_bytes / MIB:,.0f} of {item.total_bytes / MIB:,.0f} MiB free{capability})"
    return " x ".join(str(size) for size in item) if isinstance(item, tuple) else str(item)
