"""CUDA cards, told by libraries that stand in for torch and the driver: no card is needed to run these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from profiles import gpus
from profiles.device import Gpu
from profiles.machine import Reading
from profiles.probe import assembled, probe
from tests.profiles.trees import machine, write

GIB = 2**30
BIG = ("uuid-big", "RTX 4090", 24 * GIB, 20 * GIB, (8, 9))
SMALL = ("uuid-small", "RTX 3050", 8 * GIB, 7 * GIB, (8, 6))
Card = tuple[str, str, int, int, tuple[int, int]]


class DriverError(Exception):
    """What the driver raises."""


@dataclass
class Driver:
    """nvidia-ml-py, as far as it is asked."""

    cards: tuple[Card, ...] = ()
    broken: str = ""
    silent: str = ""
    NVMLError: type[Exception] = DriverError
    open: int = field(default=0)

    def nvmlInit(self) -> None:  # noqa: N802  the library's own name
        if self.broken:
            raise DriverError(self.broken)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802  as above
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802  as above
        return b"580.65.06"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802  as above
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:  # noqa: N802  as above
        return self.cards[index]

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:  # noqa: N802  as above
        if self.silent:
            raise DriverError(self.silent)
        return SimpleNamespace(total=card[2], free=card[3])

    def nvmlDeviceGetName(self, card: Card) -> str:  # noqa: N802  as above
        return card[1]

    def nvmlDeviceGetUUID(self, card: Card) -> str:  # noqa: N802  as above
        return f"GPU-{card[0]}"

    def nvmlDeviceGetCudaComputeCapability(self, card: Card) -> tuple[int, int]:  # noqa: N802  as above
        return card[4]


def torch_of(*cards: Card, integrated: bool = False) -> Any:
    """Torch with CUDA that sees these cards, with a GiB less free than the driver says."""

    def properties(index: int) -> Any:
        uuid, name, _, _, (major, minor) = cards[index]
        return SimpleNamespace(name=name, major=major, minor=minor, uuid=uuid, is_integrated=integrated)

    cuda = SimpleNamespace(
        is_available=lambda: bool(cards),
        device_count=lambda: len(cards),
        get_device_properties=properties,
        mem_get_info=lambda index: (cards[index][3] - GIB, cards[index][2]),
    )
    return SimpleNamespace(cuda=cuda, __version__="2.13.0", version=SimpleNamespace(cuda="13.0" if cards else None))


def test_torch_says_which_cards_and_the_driver_what_is_free() -> None:
    """They count in different orders, and CUDA may see fewer."""
    driver = Driver((SMALL, BIG))

    found = gpus.gpus(torch_of(BIG), driver, unified=False)

    assert found.value == (Gpu("RTX 4090", 24 * GIB, 20 * GIB, "8.9"),)
    assert "as the driver tells it" in found.reason
    assert "580.65.06" in found.reason
    assert driver.open == 0


@pytest.mark.parametrize("driver", [None, Driver(broken="Driver Not Loaded"), Driver((BIG,), silent="Not Supported")])
def test_torch_alone_suffices(driver: Driver | None) -> None:
    found = gpus.gpus(torch_of(BIG), driver, unified=False)

    assert found.value == (Gpu("RTX 4090", 24 * GIB, 19 * GIB, "8.9"),)
    assert "as torch tells it" in found.reason
    assert (driver.silent or driver.broken if driver else "nvidia-ml-py is not installed") in found.reason


def test_the_driver_alone_shows_cards_that_nothing_trains_on(tmp_path: Path) -> None:
    found = gpus.gpus(torch_of(), Driver((BIG,)), unified=False)
    profile = probe(measure=False, root=machine(tmp_path), disk=tmp_path)
    with_card = assembled(
        {name: Reading(getattr(profile, name), why) for name, why in profile.reasons.items()},
        profile.unreadable,
        {"gpus": found},
    )

    assert found.value[0].free_bytes == 20 * GIB
    assert "built without CUDA" in found.reason
    assert "cannot use the 1 there" in found.reason
    assert with_card.pool == "host"
    assert with_card.memory_bearable_bytes == profile.memory_bearable_bytes


def test_a_jetsons_gpu_adds_no_memory() -> None:
    orin = ("uuid", "Orin", 7 * GIB, 5 * GIB, (8, 7))

    by_board = gpus.gpus(torch_of(orin), Driver(broken="Not Found"), unified=True)
    by_torch = gpus.gpus(torch_of(orin, integrated=True), None, unified=False)

    assert by_board.value == by_torch.value == (Gpu("Orin", 7 * GIB, 4 * GIB, "8.7", unified=True),)


def test_neither_is_a_cause() -> None:
    with pytest.raises(OSError, match="not installed"):
        gpus.gpus(None, None, unified=False)
    with pytest.raises(OSError, match="Driver Not Loaded"):
        gpus.gpus(None, Driver(broken="Driver Not Loaded"), unified=False)


def test_what_is_free_is_asked_again_without_torch() -> None:
    cards = (Gpu("RTX 4090", 24 * GIB, 1, "8.9"), Gpu("RTX 4090", 24 * GIB, 2, "8.9"), Gpu("gone", GIB, 3))
    twin = ("uuid-twin", *BIG[1:3], 6 * GIB, BIG[4])

    found = gpus.free_now(Driver((BIG, twin)), cards, unified=False)

    assert [card.free_bytes for card in found] == [20 * GIB, 6 * GIB, 3]
    assert gpus.free_now(None, cards, unified=False) == cards


def test_the_drivers_own_files_name_the_cards(tmp_path: Path) -> None:
    text = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 1\nGPU UUID: \t GPU-1"
    root = write(tmp_path, {f"proc/driver/nvidia/gpus/0000:0{n}:00.0/information": text for n in (1, 2)})

    assert gpus.names_in_proc(root) == ("NVIDIA H200", "NVIDIA H200")
    assert gpus.names_in_proc(tmp_path / "nowhere") == ()
