"""Memory that ran out is one error, whoever says so, and what failed lets its memory go."""

from __future__ import annotations

import errno
import gc
import weakref

import numpy as np
import pytest

from edge_runtime.errors import BaseModelError, DataError, DeviceMemoryError

pytest.importorskip("torch")

import torch

from edge_runtime.train.exhaustion import bearing, is_exhaustion

pytestmark = pytest.mark.torch

EXABYTE = 1 << 60


def by_torch() -> None:
    torch.empty(EXABYTE, dtype=torch.uint8)


def by_numpy() -> None:
    np.empty(EXABYTE, dtype=np.uint8)


def by_python() -> None:
    bytearray(EXABYTE)


@pytest.mark.parametrize("allocate", [by_torch, by_numpy, by_python])
def test_an_allocation_that_really_fails_is_one_error_of_ours(allocate) -> None:
    with pytest.raises(DeviceMemoryError, match=r"^memory ran out while trying \(") as failure, bearing("trying"):
        allocate()
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_what_libraries_say_of_memory_is_understood(error: Exception) -> None:
    assert is_exhaustion(error)
    with pytest.raises(DeviceMemoryError), bearing("trying"):
        raise error


def test_an_error_of_ours_that_a_lack_of_memory_caused_is_one() -> None:
    def load() -> None:
        try:
            by_torch()
        except RuntimeError as error:
            raise BaseModelError("expected a folder to load") from error

    with pytest.raises(DeviceMemoryError), bearing("loading"):
        load()


@pytest.mark.parametrize("error", [ValueError("a shape"), DataError("an example"), KeyboardInterrupt()])
def test_any_other_error_stays_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as failure, bearing("trying"):
        raise error
    assert failure.value is error


def test_what_the_failed_work_held_is_freed_while_the_error_lives() -> None:
    kept: list[weakref.ref[object]] = []

    def work() -> None:
        activations = torch.ones(1000)
        kept.append(weakref.ref(activations))
        by_torch()

    with pytest.raises(DeviceMemoryError) as failure, bearing("trying"):
        work()
    gc.collect()
    assert failure.value is not None
    assert kept[0]() is None
