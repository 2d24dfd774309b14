"""The processes of benchmarks/training.py: the same examples through the stock stack and through this runtime.

`python -m benchmarks.training_runs '{"who": "ours", …}'` prints one JSON object. Each kind takes only what it needs
into its process: a peak is a process's.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.resident import peak_bytes

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALING = 2.0
RATE = 2e-4


@dataclass(frozen=True)
class Run:
    """What one process is asked to do.

    Attributes:
        who: a key of `KINDS`.
        cache: folder of converted bases.
        data: folder with JSONL files of instruction, input and output, or a source such as stdlib-docs:numbers.
        steps: optimiser steps; the first one is not timed.
        batch: examples of one step.
        rank: of every adapted layer.
        length: tokens of an example, at most.
        micro_batch: examples that the stock stack passes at once.
        pack_tokens: tokens that this runtime passes at once.
        threads: of torch.
        products: type in which linear layers multiply: of ours, over bfloat16 activations; of the stock stack, whose
            activations then have it too.
        evaluate: held-out examples whose loss is taken afterwards, after memory and time were.
        optimizer: of ours.
        recomputed_layers: of ours, in the backward pass; the others keep their activations. None for all of them.
        full: examples of exactly `length` tokens, each a cut of several; unequal ones otherwise.
    """

    who: str
    cache: str
    data: str
    steps: int = 4
    batch: int = 8
    rank: int = 16
    length: int = 512
    micro_batch: int = 1
    pack_tokens: int = 512
    threads: int = 2
    products: str = "bf16"
    evaluate: int = 0
    full: bool = False
    optimizer: str = "adamw"
    recomputed_layers: int | None = None

    def to_json(self) -> str:
        """What `main` reads."""
        return json.dumps(asdict(self))


def main(argument: str) -> None:
    """Do what one run asks for, and print what it took."""
    run = Run(**json.loads(argument))
    print(json.dumps(KINDS[run.who](run)), flush=True)


def _floor(_: Run) -> dict[str, Any]:
    """Memory of a process that has imported what everybody needs, and nothing else."""
    import peft  # noqa: F401, PLC0415 - what is measured
    import torch  # noqa: F401, PLC0415 - as above
    import transformers  # noqa: PLC0415 - as above

    # These two are what a training imports of transformers, which loads its parts when they are asked for.
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)
    return {"peak": peak_bytes()}


def _ours(run: Run) -> dict[str, Any]:
    """One local round by this runtime's loop."""
    from edge_runtime.train import heap  # noqa: PLC0415 - inside what is measured
    from edge_runtime.train.bounds import bound_primitive_cache  # noqa: PLC0415 - as above

    bound_primitive_cache(os.environ)
    heap.steady()
    import torch  # noqa: PLC0415 - as above

    from edge_runtime.train import evaluating, loop  # noqa: PLC0415 - as above
    from edge_runtime.train.live import attach, load_adapter  # noqa: PLC0415 - as above

    torch.set_num_threads(run.threads)
    base = _loaded(run)
    examples, held_out = _examples(run, base.tokenizer)
    live = attach(base.model, _slot(base.model, run.rank), scaling=SCALING)
    load_adapter(live, _start(live.slot, run))
    task = loop.LocalTask(
        steps=run.steps, learning_rate=RATE, gradient_accumulation_steps=run.batch, schedule="constant",
        gradient_checkpointing=True, pack_tokens=run.pack_tokens, optimizer=run.optimizer,
        recomputed_layers=run.recomputed_layers,
    )  # fmt: skip
    times, losses = [time.perf_counter()], []

    def stepped(report: Any) -> None:
        times.append(time.perf_counter())
        losses.append(report.loss)

    loop.train_round(live, examples, task, on_step=stepped)
    order = _order(len(examples), run)
    found = _found(run, [[len(examples[index].input_ids) for index in step] for step in order], times, losses)
    if run.evaluate:
        found["held_out"] = evaluating.evaluate(live, held_out).loss
    return found


def _stock(run: Run) -> dict[str, Any]:
    """The same by Hugging Face's Trainer, PEFT and bitsandbytes, as their documentation puts them together."""
    import torch  # noqa: PLC0415 - inside what is measured
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: PLC0415 - as above
    from transformers import (  # noqa: PLC0415 - as above
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )  # fmt: skip

    from edge_runtime.train.base import prepare  # noqa: PLC0415 - the 4-bit weights, made before and read only

    torch.set_num_threads(run.threads)
    folder = prepare("smollm2", precision="nf4", cache=Path(run.cache)).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = torch.bfloat16 if run.products == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, device_map="cpu")
    for layer in base.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False  # or bitsandbytes loses the gradients on some processors
            layer.compute_dtype, layer.compute_type_is_set = kind, True
            layer.weight.quant_state.dtype = kind
    base.config.use_cache = False
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    config = LoraConfig(r=run.rank, lora_alpha=SCALING * run.rank, target_modules=list(EVERY), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    examples, held_out = _examples(run, tokenizer)
    _begin_alike(model, run)
    order = _order(len(examples), run)
    rows = [_row(examples[index]) for step in order for index in step]
    times = [time.perf_counter()]

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers offers no other way to be told
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]  # in this order, as ours
        def __iter__(self) -> Iterator[dict[str, list[int]]]:
            return iter(rows)

    arguments = TrainingArguments(
        output_dir=str(Path(run.cache) / "stock"), max_steps=run.steps, per_device_train_batch_size=run.micro_batch,
        gradient_accumulation_steps=run.batch // run.micro_batch, learning_rate=RATE, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, bf16=run.products == "bf16", gradient_checkpointing=True, disable_tqdm=True, seed=0,
        gradient_checkpointing_kwargs={"use_reentrant": False}, dataloader_pin_memory=False,
        remove_unused_columns=False,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Stream(), data_collator=collator, callbacks=[Clock()]
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = _found(run, [[len(examples[index].input_ids) for index in step] for step in order], times, losses)
    if run.evaluate:
        found["held_out"] = _stock_loss(model, held_out, run)
    return found


def _profile(run: Run) -> dict[str, Any]:
    """Where the time of one step of ours goes, by operation."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415 - only here

    from edge_runtime.train import loop  # noqa: PLC0415 - as above

    whole, calls = loop.train_round, 0
    rows: dict[str, float] = {}
    wall = 0.0

    def profiled(live: Any, examples: Any, task: Any, **rest: Any) -> Any:
        nonlocal wall, calls
        calls += 1
        done = whole(live, examples, task, **rest)
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            whole(live, examples, task)
        wall = time.perf_counter() - began
        rows.update({event.key: event.self_cpu_time_total / 1e6 for event in recorded.key_averages()})
        return done

    loop.train_round = profiled
    found = _ours(run)
    return {**found, "operations": rows, "wall": wall}


def _prepare(run: Run) -> dict[str, Any]:
    """The 4-bit weights on disk, so that no measured process converts them."""
    from edge_runtime.train.base import prepare  # noqa: PLC0415 - only here

    return {"folder": str(prepare("smollm2", precision="nf4", cache=Path(run.cache)).folder)}


def _rate(run: Run) -> dict[str, Any]:
    """GFLOP/s of products of both types at the model's own shapes, as many tokens as pass at once."""
    import torch  # noqa: PLC0415 - only here

    from profiles.find_card import find_card  # noqa: PLC0415 - as above
    from profiles.measure import gemm  # noqa: PLC0415 - as above
    from profiles.speed import shapes  # noqa: PLC0415 - as above

    torch.set_num_threads(run.threads)
    rates = gemm(torch, "cpu", shapes(find_card("smollm2"), run.pack_tokens), "")
    return {kind: rates[f"gemm_{kind}_gflops"].value for kind in ("bf16", "fp32")}


KINDS: Mapping[str, Callable[[Run], dict[str, Any]]] = {
    "floor": _floor,
    "prepare": _prepare,
    "rate": _rate,
    "ours": _ours,
    "stock": _stock,
    "profile": _profile,
}


def _loaded(run: Run) -> Any:
    from edge_runtime.train.base import load, prepare  # noqa: PLC0415 - inside what is measured

    found = prepare("smollm2", precision="nf4", cache=Path(run.cache))
    return load(found, compute_dtype="bf16", product_dtype=run.products)


def _slot(model: Any, rank: int) -> Any:
    from edge_runtime.lora.adapter import LayerSlot, Slot  # noqa: PLC0415 - inside what is measured

    return Slot({
        name: LayerSlot(module.out_features, module.in_features, held=rank, trained=rank)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in EVERY
    })  # fmt: skip


def _start(slot: Any, run: Run) -> Any:
    """The adapter that both begin with: `a` drawn from the layer's name, `b` zero."""
    import numpy as np  # noqa: PLC0415 - inside what is measured

    from edge_runtime.lora.adapter import Adapter, Pair  # noqa: PLC0415 - as above

    return Adapter({
        name: Pair(_drawn(name, run.rank, layer.d_in), np.zeros((layer.d_out, run.rank), np.float32))
        for name, layer in slot.layers.items()
    })  # fmt: skip


def _begin_alike(model: Any, run: Run) -> None:
    import torch  # noqa: PLC0415 - inside what is measured

    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(torch.from_numpy(_drawn(name, run.rank, module.in_features)))
                module.lora_B["default"].weight.zero_()


def _drawn(name: str, rank: int, d_in: int) -> Any:
    import numpy as np  # noqa: PLC0415 - inside what is measured

    draw = np.random.default_rng(list(name.encode()))
    return (draw.uniform(-1, 1, (rank, d_in)) / np.sqrt(d_in)).astype(np.float32)


def _order(count: int, run: Run) -> list[tuple[int, ...]]:
    """Indices of each step's examples: those of our loop."""
    from edge_runtime.train.data import batch_at  # noqa: PLC0415 - inside what is measured

    return [batch_at(step, count=count, micro_batch=run.batch, seed=0) for step in range(run.steps)]


def _examples(run: Run, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """(training, held out): tokens of as many examples as are needed, of all clients or groups in turn."""
    from edge_runtime.train import data  # noqa: PLC0415 - inside what is measured

    def tokens(rows: Sequence[Any], count: int) -> list[Any]:
        draw = random.Random(0)
        found: list[Any] = []
        for index in draw.sample(range(len(rows)), len(rows)):
            example = data.tokenise(rows[index], tokenizer, run.length)
            if example.learned and len(found) < count:
                found.append(example)
        return found

    if Path(run.data).is_dir():
        train, held = (
            [
                row
                for path in sorted(Path(run.data).glob(f"*.{part}.jsonl"))
                for row in data.load_examples(str(path), limit=limit)
            ]
            for part, limit in (("train", 8), ("eval", 4))
        )
    else:
        train, held = data.split(data.load_examples(run.data), fraction=0.2)
    wanted = run.steps * run.batch
    return (_full(tokens(train, len(train)), run, wanted) if run.full else tokens(train, wanted)), tokens(
        held, run.evaluate
    )


def _full(examples: Sequence[Any], run: Run, count: int) -> list[Any]:
    """Examples one after the other, cut into as many of exactly the full length."""
    from edge_runtime.train.data import Tokenised  # noqa: PLC0415 - inside what is measured

    ids = [token for example in examples for token in example.input_ids]
    return [
        Tokenised(tuple(part), tuple(part))
        for part in (ids[at * run.length : (at + 1) * run.length] for at in range(count))
        if len(part) == run.length
    ]


def _row(example: Any) -> dict[str, list[int]]:
    return {
        "input_ids": list(example.input_ids),
        "labels": list(example.labels),
        "attention_mask": [1] * len(example.input_ids),
    }


def _stock_loss(model: Any, held_out: Sequence[Any], run: Run) -> float:
    """Mean loss of the completion tokens, one example at a time, by the model's own loss."""
    import torch  # noqa: PLC0415 - inside what is measured

    total, count = 0.0, 0
    model.train()  # adapters without dropout, no layer changes: bitsandbytes' evaluation kernels would
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=run.products == "bf16"):
        for example in held_out:
            row = {name: torch.tensor([values]) for name, values in _row(example).items()}
            total += float(model(**row).loss) * example.learned
            count += example.learned
    return total / count


def _found(
    run: Run, lengths: Sequence[Sequence[int]], times: Sequence[float], losses: Sequence[float]
) -> dict[str, Any]:
    seconds = [after - before for before, after in pairwise(times)]
    tokens = [sum(step) for step in lengths]
    return {
        "peak": peak_bytes(),
        "tokens": tokens,
        "seconds": seconds,
        # The first step also compiles kernels and fills caches.
        "rate": sum(tokens[1:]) / sum(seconds[1:]),
        "losses": list(losses),
        "threads": run.threads,
    }


if __name__ == "__main__":
    main(sys.argv[1])
