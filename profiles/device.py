"""What a device is: one frozen value, every field with a unit and the sentence that explains it.

A field that could not be read holds its neutral value (0, False, empty) and is named in `unreadable` with the cause: a
probe never stops because one file of /proc is missing, and a reader of the profile always knows what is a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edge_runtime.errors import ConfigError, unknown_name
from profiles.records import checked

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
            "reasons": dict(self.reasons),
            "unreadable": dict(self.unreadable),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DeviceProfile:
        """The profile that `to_json` wrote.

        Raises:
            ConfigError: keys are missing or unknown.
        """
        values = dict(checked("device profile", data, (entry.name for entry in fields(cls))))
        gpu_keys = [entry.name for entry in fields(Gpu)]
        values["gpus"] = tuple(Gpu(**checked("GPU", gpu, gpu_keys)) for gpu in values["gpus"])
        values["instruction_sets"] = tuple(values["instruction_sets"])
        return cls(**values)


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
}


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
            name.removesuffix("_bytes").removesuffix("_gflops").replace("_", " "),
            "unreadable" if name in profile.unreadable else shown(getattr(profile, name), unit),
            profile.unreadable.get(name) or profile.reasons[name],
        )
        for name, unit in UNITS.items()
    )


def shown(value: Any, unit: str) -> str:
    """A value with its unit, as a person writes it: bytes as MiB, None as "none", a list with commas."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if unit == "bytes":
        return f"{value / MIB:,.0f} MiB"
    if isinstance(value, tuple):
        return ", ".join(_gpu(item) if isinstance(item, Gpu) else str(item) for item in value)
    number = f"{value:,.2f}" if isinstance(value, float) else f"{value}"
    return f"{number} {unit}".rstrip()


def _gpu(gpu: Gpu) -> str:
    capability = f", sm_{gpu.capability.replace('.', '')}" if gpu.capability else ""
    return f"{gpu.name} ({gpu.free_bytes / MIB:,.0f} of {gpu.total_bytes / MIB:,.0f} MiB free{capability})"
