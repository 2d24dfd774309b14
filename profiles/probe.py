"""Read and measure the machine: every field of the profile gets a value and a reason, or a cause why it has none.

What the system tells comes from `profiles.machine`; what only a run can tell is measured here with torch, imported
inside functions: whether bf16 really is fast, and whether a 4-bit layer really trains. An import proves neither: on a
Jetson the bitsandbytes wheel of PyPI imports and fails at its first kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from profiles.device import UNITS, DeviceProfile, Gpu
from profiles.machine import READERS, Machine, Reading, with_reserve

# One linear layer of SmolLM2-135M over 128 tokens: (tokens, d_in, d_out). Small products are what small devices run.
GEMM_SHAPE = (128, 576, 1536)
GEMM_SECONDS = 0.2

# bf16 halves the activations, so it may cost a tenth of the speed before fp32 is the better choice.
BF16_WORTHWHILE = 0.9

# Directions of output and gradient of a 4-bit layer against fp32. NF4 itself costs about 0.005; a broken kernel 0.1+.
FOUR_BIT_COSINE = 0.98

# Without a measurement: instruction sets that multiply bf16 natively.
BF16_SETS = ("avx512_bf16", "amx_bf16", "bf16")

_NEUTRAL: Mapping[str, Any] = {
    "name": "unnamed",
    "kind": "cpu",
    "cpu_model": "",
    "architecture": "",
    "physical_cores": 1,
    "usable_cores": 1,
    "instruction_sets": (),
    "memory_limit_bytes": None,
    "gpus": (),
    "gemm_fp32_gflops": 0.0,
    "gemm_bf16_gflops": 0.0,
    "bf16_rate_ratio": 0.0,
    "bf16_is_fast": False,
    "four_bit": False,
}

_CHANGING = ("memory_available_bytes", "memory_limit_bytes", "memory_bearable_bytes", "swap_bytes", "disk_free_bytes")

# What reading may raise: files that are missing or malformed, libraries that are absent or cannot load, and kernels
# that are not built for this device (RuntimeError, and AttributeError when a native library is not there).
_FAILURES = (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError, subprocess.SubprocessError)


def probe(
    *,
    memory_limit: int | None = None,
    measure: bool = True,
    root: Path = Path("/"),
    disk: Path = Path(),
) -> DeviceProfile:
    """Reads this machine; never stops for a field that cannot be read, which `unreadable` then explains.

    Args:
        memory_limit: bytes that this process may use, where somebody says so; a tighter control group still counts.
        measure: run torch (about 1 s, and the 250 to 390 MB of importing it, which training needs anyway). Without it
            bf16 is judged by the instruction sets, and 4-bit and GPUs are not looked at.
        root: the folder that holds /proc and /sys.
        disk: a folder on the disk that models and updates will be kept on.
    """
    readings, unreadable = _read(READERS, Machine(root, disk, memory_limit))
    facts = _measured(readings) if measure else _assumed(readings)
    for field, outcome in facts.items():
        if isinstance(outcome, Reading):
            readings[field] = outcome
        else:
            unreadable[field] = outcome
    readings.update(_on_card(readings))
    return DeviceProfile(
        **{field: readings[field].value if field in readings else _NEUTRAL.get(field, 0) for field in UNITS},
        reasons={field: reading.reason for field, reading in readings.items()},
        unreadable=unreadable,
    )


def refresh(
    profile: DeviceProfile,
    *,
    memory_limit: int | None = None,
    root: Path = Path("/"),
    disk: Path = Path(),
) -> DeviceProfile:
    """The same device now: memory, swap and disk are read again, what was measured is kept.

    A card's own memory is left as it was: this process may be what fills it.
    """
    changing = [field for field in _CHANGING if field != "memory_bearable_bytes" or profile.pool != "gpu"]
    readings, unreadable = _read({field: READERS[field] for field in changing}, Machine(root, disk, memory_limit))
    kept = {field: cause for field, cause in profile.unreadable.items() if field not in changing}
    reasons = {field: reason for field, reason in profile.reasons.items() if field not in changing}
    values = {field: readings[field].value if field in readings else _NEUTRAL.get(field, 0) for field in changing}
    return replace(
        profile,
        **values,
        reasons={**reasons, **{field: reading.reason for field, reading in readings.items()}},
        unreadable={**kept, **unreadable},
    )


def _read(
    readers: Mapping[str, Callable[[Machine], Reading]], machine: Machine
) -> tuple[dict[str, Reading], dict[str, str]]:
    readings: dict[str, Reading] = {}
    unreadable: dict[str, str] = {}
    for field, reader in readers.items():
        try:
            readings[field] = reader(machine)
        except _FAILURES as error:
            unreadable[field] = f"could not be read: {_sentence(error)}"
    return readings, unreadable


def _assumed(readings: Mapping[str, Reading]) -> dict[str, Reading | str]:
    """What can be said of kernels without running one."""
    sets = readings["instruction_sets"].value if "instruction_sets" in readings else ()
    native = [name for name in BF16_SETS if name in sets]
    why = f"has {', '.join(native)}" if native else f"has none of {', '.join(BF16_SETS)}"
    unmeasured = "not measured: the probe was asked not to run torch"
    return {
        "kind": Reading("apple" if _is_apple() else "cpu", "by the platform; GPUs were not looked for"),
        "gpus": unmeasured,
        "gemm_fp32_gflops": unmeasured,
        "gemm_bf16_gflops": unmeasured,
        "bf16_rate_ratio": unmeasured,
        "bf16_is_fast": Reading(bool(native), f"not measured; the processor {why}"),
        "four_bit": Reading(
            "avx2" in sets or "neon" in sets, "not tried; bitsandbytes trains on x86 with AVX2 and on 64-bit ARM"
        ),
    }


def _measured(readings: Mapping[str, Reading]) -> dict[str, Reading | str]:
    """What only running torch can tell."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        cause = f"torch cannot be imported ({_sentence(error)}); run: pip install 'edge-runtime[client]'"
        guesses = _assumed(readings)
        return {field: guess if isinstance(guess, Reading) else cause for field, guess in guesses.items()} | {
            "four_bit": cause
        }
    kind = "cuda" if torch.cuda.is_available() else "apple" if _is_apple() else "cpu"
    where = "cuda" if kind == "cuda" else "cpu"
    facts: dict[str, Reading | str] = {"kind": Reading(kind, f"torch {torch.__version__} trains on {where} here")}
    steps: Mapping[str, Callable[[], Mapping[str, Reading]]] = {
        "gpus": lambda: {"gpus": _gpus(torch)},
        "bf16_is_fast": lambda: _gemm(torch, where, readings),
        "four_bit": lambda: {"four_bit": _four_bit(where)},
    }
    for field, step in steps.items():
        try:
            facts.update(step())
        except _FAILURES as error:
            facts[field] = f"the measurement failed: {_sentence(error)}"
    for field in ("gemm_fp32_gflops", "gemm_bf16_gflops", "bf16_rate_ratio"):
        facts.setdefault(field, facts["bf16_is_fast"])
    return facts


def _gpus(torch: Any) -> Reading:
    """The accelerators that torch can train on."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        unified = bool(getattr(facts, "is_integrated", False))
        found.append(Gpu(facts.name, int(total), int(free), f"{facts.major}.{facts.minor}", unified))
    return Reading(tuple(found), f"{len(found)} that CUDA in torch {torch.__version__} can use")


def _on_card(readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """The bearable memory of a GPU with memory of its own: there training fills the card, not the host."""
    gpus = readings["gpus"].value if "gpus" in readings else ()
    if not gpus or gpus[0].unified:
        return {}
    return {"memory_bearable_bytes": with_reserve(gpus[0].free_bytes, f"free on {gpus[0].name}, where training runs")}


def _gemm(torch: Any, where: str, readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """Rates of fp32 and bf16 products of one layer's shape, interleaved; the best of each, in GFLOP/s."""
    tokens, d_in, d_out = GEMM_SHAPE
    before = torch.get_num_threads()
    threads = int(readings["usable_cores"].value) if "usable_cores" in readings else before
    operands = {
        name: (torch.ones(tokens, d_in, dtype=dtype, device=where), torch.ones(d_out, d_in, dtype=dtype, device=where))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    best = dict.fromkeys(operands, float("inf"))
    torch.set_num_threads(threads)
    try:
        for x, weight in operands.values():
            torch.nn.functional.linear(x, weight)
        deadline = time.perf_counter() + 2 * GEMM_SECONDS
        while time.perf_counter() < deadline:
            for name, (x, weight) in operands.items():
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                if where == "cuda":
                    torch.cuda.synchronize()
                best[name] = min(best[name], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    rates = {name: 2 * tokens * d_in * d_out / seconds / 1e9 for name, seconds in best.items()}
    ratio = rates["bf16"] / rates["fp32"]
    how = f"measured: ({tokens}, {d_in}) by ({d_in}, {d_out}) on {where}, {threads} threads"
    verdict = f"bf16 runs at {ratio:.2f} times the rate of fp32; worthwhile from {BF16_WORTHWHILE}"
    return {
        "gemm_fp32_gflops": Reading(round(rates["fp32"], 1), how),
        "gemm_bf16_gflops": Reading(round(rates["bf16"], 1), how),
        "bf16_rate_ratio": Reading(round(ratio, 3), how),
        "bf16_is_fast": Reading(ratio >= BF16_WORTHWHILE, f"{verdict}; {how}"),
    }


def _four_bit(where: str) -> Reading:
    """Whether a 4-bit layer trains here, and if not what to do about it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return Reading(False, "bitsandbytes is not installed; run: pip install 'edge-runtime[client]'")
    try:
        cosines = four_bit_cosines("cpu") if where == "cpu" else _four_bit_in_child(where)
    except _FAILURES as error:
        return Reading(False, f"a 4-bit layer failed on {where}: {_sentence(error)}; {_CURES[where]}")
    output, gradient = cosines
    agreement = f"cosine with fp32: output {output:.4f}, gradient {gradient:.4f}, expected {FOUR_BIT_COSINE} or more"
    if min(output, gradient) < FOUR_BIT_COSINE:
        return Reading(False, f"a 4-bit layer runs on {where} but gives wrong numbers ({agreement}); {_CURES[where]}")
    return Reading(True, f"quantised, ran forward and backward on {where}: {agreement}")


_CURES: Mapping[str, str] = {
    "cpu": "try: pip install --upgrade bitsandbytes (0.50 or newer trains on x86 with AVX2 and on 64-bit ARM)",
    "cuda": (
        "the wheel has no kernels for this GPU, as on a Jetson; build bitsandbytes on the device: "
        "cmake -DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY=87 . && make -j4 && pip install . (87: Orin, 72: Xavier)"
    ),
}


def four_bit_cosines(where: str) -> tuple[float, float]:
    """(output, gradient) cosines of a 4-bit layer in training mode against the same layer in fp32.

    The layer is never put into eval mode: with bitsandbytes 0.50 on processors with avx512_bf16 that repacks its
    weights, and the next training forward silently has no gradient.
    """
    torch = importlib.import_module("torch")
    bitsandbytes = importlib.import_module("bitsandbytes")
    d_in, d_out, tokens = 128, 64, 16
    seeded = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=seeded) / d_in**0.5
    x = torch.randn(tokens, d_in, generator=seeded)
    target = torch.randn(tokens, d_out, generator=seeded)
    layer = bitsandbytes.nn.Linear4bit(d_in, d_out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to(where).train()
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False

    def run(function: Callable[[Any], Any], device: str) -> tuple[Any, Any]:
        inputs = x.clone().to(device).requires_grad_()
        output = function(inputs)
        (output * target.to(device)).sum().backward()
        if inputs.grad is None:
            raise RuntimeError("the backward pass gave no gradient")
        return output.detach().float().cpu().flatten(), inputs.grad.float().cpu().flatten()

    expected = run(lambda inputs: torch.nn.functional.linear(inputs, weight), "cpu")
    found = run(layer, where)
    output, gradient = (
        float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        for one, other in zip(expected, found, strict=True)
    )
    return output, gradient


def _four_bit_in_child(where: str) -> tuple[float, float]:
    """The same in a process of its own: bitsandbytes ends the whole process when a CUDA kernel is missing."""
    source = f"import json; from profiles.probe import four_bit_cosines; print(json.dumps(four_bit_cosines({where!r})))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=180, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"the process ended with {done.returncode}, saying: {said}")
    output, gradient = json.loads(done.stdout.strip().splitlines()[-1])
    return float(output), float(gradient)


def _is_apple() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def _sentence(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
