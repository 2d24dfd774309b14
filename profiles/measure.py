"""How fast this machine multiplies, copies, opens quantised weights and calls an operation: measured with torch.

Every rate is the best of several runs, with all threads and with one: a busy machine only ever adds time. What is
allocated at once stays below about 50 MB of the host's memory, so that a tight limit does not kill the probe that is to
respect it. The libraries are arguments: `profiles.probe` loads them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from profiles.machine import Reading

Shape = tuple[int, int, int]

# The distinct linear layers of SmolLM2-135M over 128 tokens, as (tokens, d_in, d_out): q and o, k and v, gate and up,
# down. Small products are what small devices run.
SMOLLM2_SHAPES: tuple[Shape, ...] = ((128, 576, 576), (128, 576, 192), (128, 576, 1536), (128, 1536, 576))

# Seconds for each kind of measurement; the whole probe is to end within ten.
GEMM_SECONDS = 1.2
COPY_SECONDS = 0.4
OPEN_SECONDS = 0.2
CALL_SECONDS = 0.4

# bf16 halves the activations, so it may cost a tenth of the speed before fp32 is the better choice.
BF16_WORTHWHILE = 0.9

# Weights and activations of one measured product; 24 MB and 6 MB of fp32 and bf16 together.
WEIGHTS_MOST = 4_000_000
ACTIVATIONS_MOST = 1_000_000

# Two buffers of it: beyond the caches of most machines, and within 50 MB. A card's own memory takes more, its cache
# being as large as that.
COPY_BYTES = 24_000_000
COPY_BYTES_CARD = 256_000_000

# Calls between two looks at the clock (and, on a card, two waits for it).
CALLS = 100
BATCH_CARD = 20


def bounded(shape: Shape) -> Shape:
    """The shape, halved where it is longest until it needs no more memory than the probe may take."""
    tokens, d_in, d_out = shape
    while d_in * d_out > WEIGHTS_MOST:
        d_in, d_out = (d_in // 2, d_out) if d_in >= d_out else (d_in, d_out // 2)
    while tokens > 1 and tokens * (d_in + d_out) > ACTIVATIONS_MOST:
        tokens //= 2
    return tokens, d_in, d_out


@contextmanager
def threads_of(torch: Any, threads: int) -> Iterator[None]:
    """Within it torch computes with as many threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gemm(torch: Any, where: str, shapes: Sequence[Shape], how: str) -> dict[str, Reading]:
    """Rates of fp32 and bf16 products: all operations of the shapes over all their best times, in GFLOP/s.

    Args:
        torch: the library.
        where: "cpu" or "cuda".
        shapes: (tokens, d_in, d_out) of each product.
        how: ends the reason of each: on what, with how many threads.
    """
    sizes = tuple(dict.fromkeys(bounded(shape) for shape in shapes))
    best = [_best_products(torch, where, shape, GEMM_SECONDS / len(sizes)) for shape in sizes]
    operations = sum(2 * tokens * d_in * d_out for tokens, d_in, d_out in sizes)
    fp32, bf16 = (operations / sum(seconds) / 1e9 for seconds in zip(*best, strict=True))
    ratio = bf16 / fp32
    cut = ", the larger cut down to bear the measurement" if set(sizes) != set(shapes) else ""
    named = ", ".join(" x ".join(str(size) for size in shape) for shape in sizes)
    found = f"measured at {named} (tokens x inputs x outputs){cut}, {how}"
    verdict = f"bf16 runs at {ratio:.2f} times the rate of fp32; worthwhile from {BF16_WORTHWHILE}"
    return {
        "gemm_fp32_gflops": Reading(_rounded(fp32), found),
        "gemm_bf16_gflops": Reading(_rounded(bf16), found),
        "bf16_rate_ratio": Reading(_rounded(ratio), "the two rates, measured in turn"),
        "bf16_is_fast": Reading(ratio >= BF16_WORTHWHILE, f"measured: {verdict}"),
        "gemm_shapes": Reading(sizes, f"(tokens, inputs, outputs) of the products measured{cut}"),
    }


def bandwidth(torch: Any, where: str, *, own_memory: bool, how: str) -> Reading:
    """Rate of a large copy, in GB/s; bytes read and bytes written both count.

    Args:
        torch: the library.
        where: "cpu" or "cuda".
        own_memory: the card has memory of its own, so the copy may be larger.
        how: ends the reason.
    """
    size = COPY_BYTES_CARD if own_memory else COPY_BYTES
    source = torch.ones(size // 4, device=where)
    target = torch.zeros_like(source)
    seconds = _best(torch, where, lambda: target.copy_(source), COPY_SECONDS)
    return Reading(_rounded(2 * size / seconds / 1e9), f"measured: a copy of {size / 1e6:.0f} MB, {how}")


def op_overhead(torch: Any, where: str) -> Reading:
    """Microseconds of one small call: a product of 64 pairs of numbers.

    Of a small linear layer the time depends on where a process happens to find its operands: of six processes one took
    half as long again as the others.
    """
    x = torch.ones(64, device=where)
    multiply = torch.mul

    def calls() -> None:
        for _ in range(CALLS):
            multiply(x, x)

    seconds = _best(torch, where, calls, CALL_SECONDS) / CALLS
    return Reading(_rounded(seconds * 1e6), f"measured: a product of 64 pairs of numbers on {where}")


def nf4_rate(torch: Any, bitsandbytes: Any, where: str, shape: Shape, dtype: str) -> float:
    """Billions of 4-bit weights (double quantisation, as this project keeps them) opened to `dtype` per second."""
    _, d_in, d_out = bounded(shape)
    weight = torch.randn(d_out, d_in, device=where).to(getattr(torch, dtype))
    functional = bitsandbytes.functional
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    seconds = _best(torch, where, lambda: functional.dequantize_4bit(packed, state), OPEN_SECONDS)
    return _rounded(d_in * d_out / seconds / 1e9)


def int8_rate(torch: Any, where: str, shape: Shape, dtype: str) -> float:
    """Billions of int8 weights opened to `dtype` per second: converted, and multiplied by the scale of their row."""
    _, d_in, d_out = bounded(shape)
    kind = getattr(torch, dtype)
    weight = torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8, device=where)
    scale = torch.rand(d_out, 1, device=where).to(kind)
    seconds = _best(torch, where, lambda: weight.to(kind).mul_(scale), OPEN_SECONDS)
    return _rounded(d_in * d_out / seconds / 1e9)


def _best_products(torch: Any, where: str, shape: Shape, budget: float) -> tuple[float, float]:
    """(fp32, bf16) seconds of one product, run in turn: what disturbs the one disturbs the other."""
    tokens, d_in, d_out = shape
    operands = [
        (torch.ones(tokens, d_in, dtype=dtype, device=where), torch.ones(d_out, d_in, dtype=dtype, device=where))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    linear = torch.nn.functional.linear
    best = [math.inf, math.inf]
    counts = _thread_counts(torch, where)
    for threads in counts:
        with threads_of(torch, threads):
            deadline = time.perf_counter() + budget / len(counts)
            # One round is for warming up and does not count; one at least does, however slow the machine.
            rounds = 0
            while rounds < 2 or time.perf_counter() < deadline:
                for index, (x, weight) in enumerate(operands):
                    seconds = _timed(torch, where, partial(linear, x, weight))
                    best[index] = min(best[index], seconds) if rounds else best[index]
                rounds += 1
    return best[0], best[1]


def _best(torch: Any, where: str, run: Callable[[], Any], budget: float) -> float:
    """Seconds of the fastest run within the budget, the first left out."""
    best, counts = math.inf, _thread_counts(torch, where)
    for threads in counts:
        with threads_of(torch, threads):
            run()
            best = min(best, _timed(torch, where, run))
            deadline = time.perf_counter() + budget / len(counts)
            while time.perf_counter() < deadline:
                best = min(best, _timed(torch, where, run))
    return best


def _thread_counts(torch: Any, where: str) -> tuple[int, ...]:
    """All threads, and one alone.

    Where another program keeps a core busy, threads that wait for each other at the end of every product measure it up
    to ten times too slow; one that waits for nobody does not.
    """
    threads = torch.get_num_threads()
    return (threads, 1) if where == "cpu" and threads > 1 else (threads,)


def _timed(torch: Any, where: str, run: Callable[[], Any]) -> float:
    """Seconds of one run; on a card of one among several in a row, which is how training calls them."""
    times = BATCH_CARD if where == "cuda" else 1
    if where == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    if where == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def _rounded(value: float) -> float:
    """Four digits that count; more would be noise."""
    return float(f"{value:.4g}")
