"""Messages as devices and servers say them, with only what a test cares about left to say."""

from __future__ import annotations

from typing import Any

from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.trainer import AdapterSpec, Training
from edge_runtime.wire import blobs
from edge_runtime.wire.messages import Directive, Hello, Offer, Report, Sample, group
from edge_runtime.wire.sampling import number_of

SPEC = AdapterSpec(
    family="lora",
    target_modules=("q_proj",),
    scaling=2.0,
    max_rank=8,
    max_held=16,
    hold_more=True,
    max_length=128,
)
TRAINING = Training(
    max_steps=3, learning_rate=0.1, batch_size=4, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=0
)
BASE = "b" * 64


def slot(d_in: int = 16, rank: int = 2) -> Slot:
    """Two layers of one module."""
    return Slot({f"model.layers.{index}.self_attn.q_proj": LayerSlot(12, d_in, rank, rank) for index in range(2)})


def hello(client: str, **changes: Any) -> Hello:
    """An introduction."""
    facts: dict[str, Any] = {
        "base": BASE,
        "examples": 10,
        "groups": group(slot()),
        "device": "a device",
        "precision": "fp32",
        "plan": "a plan",
        "software": "python",
    }
    return Hello(client=client, **(facts | changes))


def offer(client: str, round_number: int = 1, *, payload: bytes | None = None, chunk_bytes: int = 4) -> Offer:
    """An update of a round, trained from the version that the round begins with."""
    found = payload if payload is not None else f"{client}'s update of round {round_number}".encode()
    return Offer(
        client=client,
        round=round_number,
        version=round_number - 1,
        blob=blobs.describe(found, chunk_bytes),
        examples=10,
        loss_first=2.0,
        loss_last=1.0,
    )


def report(client: str, state: Any, **facts: Any) -> Report:
    """What a device is doing."""
    return Report(client=client, state=state, round=1, **facts)


def sample(round_number: int, *asked: str, among: str = "abcdefgh") -> Sample:
    """A sample that asks these devices in that round, and no others of those with one letter."""
    for seed in range(100_000):
        order = sorted(among, key=lambda name: number_of(seed, round_number, name))
        if set(order[: len(asked)]) == set(asked):
            return Sample(seed=seed, below=number_of(seed, round_number, order[len(asked)]))
    raise AssertionError(asked)


def directive(phase: Any = "train", round_number: int = 1, *, asked: str | None = None, **changes: Any) -> Directive:
    """What a round asks for, from everybody or from those whose letters are given."""
    if asked is not None:
        changes["sample"] = sample(round_number, *asked)
    facts: dict[str, Any] = {
        "fleet": "fleet",
        "run": "one",
        "version": max(0, round_number - 1),
        "num_rounds": 3,
        "base": BASE,
        "adapter": SPEC,
        "training": TRAINING,
        "bands": (),
        "codec": "int8",
    }
    return Directive(phase=phase, round=round_number, **(facts | changes))
