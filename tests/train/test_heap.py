"""The heap gives back what training does not need, and training computes the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from edge_runtime.train import heap  # noqa: E402 - after the skip where torch is missing

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is what this is about")

# Blocks of 256 KiB that live on between blocks that do not: as activations lie between temporaries.
HOLES = """
import json, sys
import torch
from edge_runtime.train import heap
assert heap.steady()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def allocate():
    kept = []
    for _ in range(200):
        passing = torch.ones(64 * 1024)
        kept.append(torch.ones(16 * 1024))
        del passing
        kept.append(torch.ones(32 * 1024))
    return kept

kept = allocate()
del kept[::2]
before = resident()
heap.release()
print(json.dumps([before, resident()]))
"""


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(7)))


def gradients(model):
    model.zero_grad()
    model(torch.ones(3, 16)).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_training_computes_the_same_to_the_last_bit() -> None:
    model = network()
    plain = gradients(model)
    with heap.releasing(list(model), 2):
        released = gradients(model)

    assert len(plain) == 14
    for one, other in zip(plain, released, strict=True):
        assert torch.equal(one, other)


def test_the_heap_is_released_in_both_directions_and_only_within(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = network(), []
    monkeypatch.setattr(heap, "release", lambda: calls.append(1))
    with heap.releasing(list(model), 2):
        gradients(model)
    within = len(calls)
    gradients(model)

    # Layers 7, 5, 3 and 1, forward and backward.
    assert within == len(calls) == 8


def test_an_evaluation_without_gradients_is_released_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = network(), []
    monkeypatch.setattr(heap, "release", lambda: calls.append(1))
    with heap.releasing(list(model), 2), torch.no_grad():
        model(torch.ones(3, 16))

    assert len(calls) == 4


@ON_LINUX
def test_pages_between_live_blocks_go_back_to_the_system() -> None:
    ended = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    before, after = json.loads(ended.stdout)

    assert after < before - 5 * 2**20
