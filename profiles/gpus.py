"""The CUDA cards, as torch and the driver see them: torch says which can be trained on, the driver what is free.

Either may be missing. nvidia-ml-py knows every card and its free memory without creating a context on it, but does not
know a Jetson's GPU; torch knows what it was built for. The libraries are arguments: `profiles.probe` loads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from profiles.device import Gpu
from profiles.machine import Reading


@dataclass(frozen=True)
class Driver:
    """What nvidia-ml-py told.

    Attributes:
        cards: UUID → card, in the driver's order; compute capabilities where it tells them.
        said: one clause for the reason: the driver's version, or why it could not be asked.
    """

    cards: dict[str, Gpu]
    said: str


def gpus(torch: Any | None, nvml: Any | None, *, unified: bool) -> Reading:
    """The accelerators of this machine; those that torch can train on, where there is a torch that was asked.

    Args:
        torch: the library, or None when it is not to be asked.
        nvml: nvidia-ml-py's module `pynvml`, or None when it is not installed.
        unified: the board's GPU has no memory of its own, as on a Jetson.

    Raises:
        OSError: torch is not to be asked, and the driver tells nothing.
    """
    driver = by_driver(nvml, unified=unified)
    if torch is None:
        if not driver.cards:
            raise OSError(driver.said)
        return Reading(tuple(driver.cards.values()), f"{driver.said}; torch was not asked what it can use")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        seen = f", which cannot use the {len(driver.cards)} there" if driver.cards else ""
        return Reading(
            tuple(driver.cards.values()), f"torch {torch.__version__}, {built}, finds none{seen}; {driver.said}"
        )
    found = [_by_torch(torch, index, driver.cards, unified=unified) for index in range(torch.cuda.device_count())]
    source = "free memory as the driver tells it" if driver.cards else "free memory as torch tells it"
    return Reading(
        tuple(found), f"{len(found)} that CUDA in torch {torch.__version__} can use; {source}; {driver.said}"
    )


def by_driver(nvml: Any | None, *, unified: bool) -> Driver:
    """The cards that the driver knows.

    A driver that is missing or cannot be asked is no error: the clause says so, and torch is left to tell.
    """
    if nvml is None:
        return Driver({}, "the driver was not asked (nvidia-ml-py is not installed)")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Driver({}, f"the driver gave no answer to nvidia-ml-py ({error})")
    try:
        version = _text(nvml.nvmlSystemGetDriverVersion())
        cards = dict(
            _card(nvml, nvml.nvmlDeviceGetHandleByIndex(index), unified=unified)
            for index in range(nvml.nvmlDeviceGetCount())
        )
        return Driver(cards, f"driver {version} shows {len(cards)} to nvidia-ml-py")
    except nvml.NVMLError as error:
        # A Jetson's driver starts and then does not know how much memory is free: torch does.
        return Driver({}, f"the driver told nvidia-ml-py nothing of its cards ({error}), as on a Jetson")
    finally:
        nvml.nvmlShutdown()


def free_now(nvml: Any | None, cards: Sequence[Gpu], *, unified: bool) -> tuple[Gpu, ...]:
    """The same cards with what is free on them now, where the driver tells; no context is created.

    A card is found by its name; where several have one, in the order of the driver.
    """
    seen = list(by_driver(nvml, unified=unified).cards.values())
    fresh = []
    for card in cards:
        same = next((other for other in seen if other.name == card.name), None)
        if same is not None:
            seen.remove(same)
        fresh.append(card if same is None else replace(card, free_bytes=same.free_bytes))
    return tuple(fresh)


def names_in_proc(root: Path) -> tuple[str, ...]:
    """What NVIDIA's driver calls the cards in its own files, for when nvidia-ml-py is not installed."""
    lines = (
        line.partition(":")
        for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    return tuple(value.strip() for key, _, value in lines if key.strip() == "Model")


def _by_torch(torch: Any, index: int, known: dict[str, Gpu], *, unified: bool) -> Gpu:
    facts = torch.cuda.get_device_properties(index)
    capability = f"{facts.major}.{facts.minor}"
    shared = unified or bool(getattr(facts, "is_integrated", False))
    # The driver counts cards in another order than CUDA may; only the UUID says which is which.
    card = known.get(str(getattr(facts, "uuid", "")).removeprefix("GPU-"))
    if card is not None:
        return replace(card, capability=capability, unified=shared)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(facts.name, int(total), int(free), capability, shared)


def _card(nvml: Any, handle: Any, *, unified: bool) -> tuple[str, Gpu]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    gpu = Gpu(_text(nvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free), f"{major}.{minor}", unified)
    return _text(nvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-"), gpu


def _text(value: str | bytes) -> str:
    """Older versions of nvidia-ml-py return bytes."""
    return value.decode() if isinstance(value, bytes) else value
