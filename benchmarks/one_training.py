"""One training in a process of its own, and what it took: peak memory, what held it, and the time of each step.

`python -m benchmarks.one_training '{"base": "smollm2", …}'` prints one JSON object. It takes the client's own path: the
same imports, loading, loop and allocator, on real examples of unequal length up to `max_length`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import resident
from profiles.memory import Setting


@dataclass(frozen=True)
class Job:
    """What one process is asked to do.

    Attributes:
        base: as a person names it.
        setting: how to train.
        steps: optimiser steps.
        accumulation: micro-batches of one optimiser step.
        threads: of torch.
        cache: folder of converted bases.
        device: cpu or cuda.
        equal: examples all of full length, as the speed model predicts them; unequal ones otherwise.
    """

    base: str
    setting: Setting
    steps: int
    accumulation: int
    threads: int
    cache: str
    device: str = "cpu"
    equal: bool = False

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `to_json` wrote."""
        data = json.loads(text)
        setting = data.pop("setting")
        return cls(setting=Setting(**{**setting, "target_modules": tuple(setting["target_modules"])}), **data)


def main(argument: str) -> None:
    """Train, and print what it took."""
    job = Job.from_json(argument)
    found = _on_card(job) if job.device == "cuda" else _on_host(job)
    print(json.dumps(found), flush=True)


def _on_host(job: Job) -> dict[str, Any]:
    loaded, seconds = _train(job)
    return {"peak": resident.peak_bytes(), "file": resident.resident("RssFile"), "loaded": loaded, "seconds": seconds}


def _on_card(job: Job) -> dict[str, Any]:
    import torch  # noqa: PLC0415 - nothing may come before the client's own order of imports

    loaded, seconds = _train(job)
    free, total = torch.cuda.mem_get_info()
    return {
        "peak": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated(),
        "used": total - free, "loaded": loaded, "seconds": seconds,
    }  # fmt: skip


def _train(job: Job) -> tuple[int, list[float]]:
    """(resident bytes after loading, seconds of each step)."""
    from edge_runtime.train import heap  # noqa: PLC0415 - as the client imports, inside what is measured
    from edge_runtime.train.bounds import bound_primitive_cache  # noqa: PLC0415 - as above

    bound_primitive_cache(os.environ)
    heap.steady()
    import torch  # noqa: PLC0415 - as above

    import edge_runtime.client  # noqa: PLC0415 - as above
    import edge_runtime.wire.mqtt  # noqa: F401, PLC0415 - as above
    from edge_runtime.lora.adapter import LayerSlot, Slot  # noqa: PLC0415 - as above
    from edge_runtime.train import data, loop  # noqa: PLC0415 - as above
    from edge_runtime.train.base import load, prepare  # noqa: PLC0415 - as above
    from edge_runtime.train.families import get  # noqa: PLC0415 - as above
    from profiles.card import card_from_config  # noqa: PLC0415 - as above
    from profiles.plan import layers  # noqa: PLC0415 - as above

    setting = job.setting
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    prepared = prepare(job.base, precision=setting.precision, cache=Path(job.cache))
    base = load(prepared, compute_dtype=setting.compute_dtype, product_dtype=setting.product_dtype, device=job.device)
    rows = [data.Example(messages=tuple(turns)) for turns in _conversations(setting.max_length, equal=job.equal)]
    tokens = data.tokenise_all(rows, base.tokenizer, setting.max_length).examples
    slot = Slot({name: LayerSlot(*layer) for name, layer in layers(setting, card_from_config(prepared.folder)).items()})
    live = get("lora").attach(base.model, slot, scaling=2.0)
    received = _received(live)  # kept by the client until the round ends
    loaded = resident.resident("VmRSS")
    task = loop.LocalTask(
        steps=job.steps, learning_rate=1e-3, micro_batch=setting.micro_batch,
        gradient_accumulation_steps=job.accumulation, gradient_checkpointing=setting.gradient_checkpointing,
        recomputed_layers=setting.recomputed_layers, optimizer=setting.optimizer, pack_tokens=setting.tokens,
    )  # fmt: skip
    times = [time.perf_counter()]
    loop.train_round(live, tokens, task, on_step=lambda _: times.append(time.perf_counter()))
    del received
    return loaded, [after - before for before, after in pairwise(times)]


def _received(live: Any) -> Any:
    """Put a global adapter into the model; what the client keeps of it is the slice that it trains."""
    import numpy as np  # noqa: PLC0415 - as the client imports, inside what is measured

    from edge_runtime.lora.adapter import Adapter, Pair  # noqa: PLC0415 - as above
    from edge_runtime.lora.algebra import take  # noqa: PLC0415 - as above
    from edge_runtime.train.families import get  # noqa: PLC0415 - as above

    draw = np.random.default_rng(0)
    adapter = Adapter({
        name: Pair(
            draw.standard_normal((layer.held, layer.d_in)).astype(np.float32),
            np.zeros((layer.d_out, layer.held), np.float32),
        )
        for name, layer in live.slot.layers.items()
    })  # fmt: skip
    get("lora").load(live, adapter)
    return {name: take(adapter[name], rows) for name, rows in live.directions.items()}


def _conversations(max_length: int, *, equal: bool) -> Iterator[list[Any]]:
    """Conversations about Python's library; two thirds reach `max_length` tokens, where they are cut, unless all do."""
    from edge_runtime.train import stdlib_docs  # noqa: PLC0415 - as the client imports, inside what is measured
    from edge_runtime.train.data import Message  # noqa: PLC0415 - as above

    draw = random.Random(0)
    pairs = [pair for group in sorted(stdlib_docs.GROUPS) for pair in stdlib_docs.doc_pairs(group)]
    draw.shuffle(pairs)
    turns: list[Any] = []
    size, wanted = 0, 0.0
    for pair in pairs:
        turns += [Message("user", pair.prompt), Message("assistant", pair.completion)]
        size += len(pair.prompt) + len(pair.completion)
        if size >= (wanted or 6 * max_length):  # five characters a token, at most: the first is cut at max_length
            yield turns
            wanted = 6 * max_length if equal else max_length * draw.uniform(2.5, 8.0)
            turns, size = [], 0


if __name__ == "__main__":
    main(sys.argv[1])
