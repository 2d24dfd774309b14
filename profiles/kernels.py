"""Whether quantised layers really train here: quantise, run forward and backward, compare the gradient with fp32.

An import proves nothing: on a Jetson the bitsandbytes wheel of PyPI imports and fails at its first kernel, and there
ends the whole process. On a card the trials therefore run in a process of their own, and report one by one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from profiles import measure
from profiles.machine import FAILURES, Reading, sentence

Library = Callable[[str], Any]

# Directions of output and gradient against fp32. NF4 itself costs about 0.005 and int8 less than 0.0001; a broken
# kernel costs 0.1 or more.
AGREEMENT: Mapping[str, float] = {"four_bit": 0.98, "eight_bit": 0.999}
BITS: Mapping[str, str] = {"four_bit": "4-bit", "eight_bit": "8-bit"}

# What each kind of layer needs, and what to do where its trial fails, by where it ran.
CURES: Mapping[tuple[str, str], str] = {
    ("four_bit", "cpu"): (
        "try: pip install --upgrade bitsandbytes (0.50 or newer trains on x86 with AVX2 and on 64-bit ARM)"
    ),
    ("four_bit", "cuda"): (
        "the wheel has no kernels for this GPU, as on a Jetson; build bitsandbytes on the device: "
        "cmake -DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY=87 . && make -j4 && pip install . (87: Orin, 72: Xavier)"
    ),
    ("eight_bit", "cpu"): "try: pip install --upgrade torch (2.4 or newer; 8-bit layers need torch alone)",
    ("eight_bit", "cuda"): (
        "this torch has no kernels for this GPU; on a Jetson install NVIDIA's build of torch for its JetPack"
    ),
}

NO_BITSANDBYTES = "bitsandbytes is not installed; run: pip install 'edge-runtime[client]'"

# How long a child may take that imports torch and bitsandbytes on a slow board.
CHILD_SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """What one trial gave.

    Attributes:
        field: of the profile.
        values: (output, gradient) cosines of a layer, or the one rate; empty when it failed.
        fault: why it failed, on one line.
        passing: True when the fault may be gone next time, as when a child took too long.
    """

    field: str
    values: tuple[float, ...] = ()
    fault: str = ""
    passing: bool = False


def trials(library: Library, where: str, shape: measure.Shape, dtype: str) -> Iterator[Outcome]:
    """Runs the trials in this process; those that bitsandbytes may end the process in come last.

    Args:
        library: imports a library by its name.
        where: "cpu" or "cuda".
        shape: (tokens, d_in, d_out) whose weights the rates are measured at.
        dtype: what weights are opened to: "bfloat16" or "float32".
    """
    torch = library("torch")
    steps: Mapping[str, Callable[[], tuple[float, ...]]] = {
        "eight_bit": lambda: eight_bit_cosines(torch, where),
        "int8_gweights_s": lambda: (measure.int8_rate(torch, where, shape, dtype),),
        "four_bit": lambda: four_bit_cosines(torch, library("bitsandbytes"), where),
        "nf4_gweights_s": lambda: (measure.nf4_rate(torch, library("bitsandbytes"), where, shape, dtype),),
    }
    for field, step in steps.items():
        try:
            yield Outcome(field, step())
        except FAILURES as error:
            yield Outcome(field, fault=sentence(error))


def trials_in_child(where: str, shape: measure.Shape, dtype: str) -> Iterator[Outcome]:
    """The same in a process of its own, which a missing kernel may end."""
    source = f"from profiles import probe; probe.report_trials({where!r}, {shape!r}, {dtype!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=CHILD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        fault = f"the process that tries it did not end within {CHILD_SECONDS} s"
        yield from (Outcome(field, fault=fault, passing=True) for field in FIELDS)
        return
    reported = list(_reported(done.stdout))
    yield from reported
    said = (done.stderr.strip() or "nothing").splitlines()[-1]
    missing = [field for field in FIELDS if field not in {outcome.field for outcome in reported}]
    yield from (Outcome(field, fault=f"the process ended with {done.returncode}, saying: {said}") for field in missing)


def written(outcome: Outcome) -> str:
    """An outcome as the line that a child prints."""
    return _MARK + json.dumps(asdict(outcome))


def verdicts(outcomes: Iterable[Outcome], where: str, dtype: str, *, installed: bool) -> dict[str, Reading | str]:
    """What the outcomes say for the profile: a reading of each field, or why there is none.

    Args:
        outcomes: of each of `FIELDS`.
        where: they ran on, "cpu" or "cuda".
        dtype: what weights were opened to.
        installed: bitsandbytes is.
    """
    found: dict[str, Reading | str] = {}
    for outcome in outcomes:
        field = outcome.field
        if field == "four_bit" and not installed:
            found[field] = Reading(False, NO_BITSANDBYTES)
        elif field == "nf4_gweights_s" and not installed:
            found[field] = NO_BITSANDBYTES
        elif outcome.passing:
            found[field] = f"{UNMEASURED}: {outcome.fault}"
        elif field in BITS:
            found[field] = _verdict(outcome, where)
        elif outcome.fault:
            found[field] = f"{UNMEASURED}: {outcome.fault}"
        else:
            found[field] = Reading(outcome.values[0], f"measured: one layer's weights opened to {dtype} on {where}")
    return found


def eight_bit_cosines(torch: Any, where: str) -> tuple[float, float]:
    """(output, gradient) cosines of a layer of int8 weights, with a scale for each row, against fp32."""
    weight, x, target = _layer(torch)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    kept = (weight / scale).round().to(torch.int8).to(where)
    factor = scale.to(where)
    return _agreement(torch, weight, x, target, where, lambda v: torch.nn.functional.linear(v, kept.float() * factor))


def four_bit_cosines(torch: Any, bitsandbytes: Any, where: str) -> tuple[float, float]:
    """(output, gradient) cosines of a 4-bit layer in training mode against the same layer in fp32.

    The layer is never put into eval mode: with bitsandbytes 0.50 on processors with avx512_bf16 that repacks its
    weights, and the next training forward silently has no gradient.
    """
    weight, x, target = _layer(torch)
    d_out, d_in = weight.shape
    layer = bitsandbytes.nn.Linear4bit(d_in, d_out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to(where).train()
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False
    return _agreement(torch, weight, x, target, where, layer)


def _layer(torch: Any) -> tuple[Any, Any, Any]:
    """Weights (64, 128), inputs (16, 128) and the gradient of the outputs (16, 64), always the same."""
    seeded = torch.Generator().manual_seed(0)
    d_in, d_out, tokens = 128, 64, 16
    weight = torch.randn(d_out, d_in, generator=seeded) / d_in**0.5
    return weight, torch.randn(tokens, d_in, generator=seeded), torch.randn(tokens, d_out, generator=seeded)


def _agreement(
    torch: Any, weight: Any, x: Any, target: Any, where: str, layer: Callable[[Any], Any]
) -> tuple[float, float]:
    def run(function: Callable[[Any], Any], device: str) -> tuple[Any, Any]:
        inputs = x.clone().to(device).requires_grad_()
        output = function(inputs)
        (output * target.to(device)).sum().backward()
        if inputs.grad is None:
            raise RuntimeError("the backward pass gave no gradient")
        return output.detach().float().cpu().flatten(), inputs.grad.float().cpu().flatten()

    expected = run(lambda inputs: torch.nn.functional.linear(inputs, weight), "cpu")
    output, gradient = (
        float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        for one, other in zip(expected, run(layer, where), strict=True)
    )
    return output, gradient


def _verdict(outcome: Outcome, where: str) -> Reading:
    bits, cure, least = BITS[outcome.field], CURES[outcome.field, where], AGREEMENT[outcome.field]
    if outcome.fault:
        return Reading(False, f"a {bits} layer failed on {where}: {outcome.fault}; {cure}")
    output, gradient = outcome.values
    agreement = f"cosine with fp32: output {output:.5f}, gradient {gradient:.5f}, expected {least} or more"
    # Written so that not-a-number fails too.
    if not min(output, gradient) >= least:
        return Reading(False, f"a {bits} layer runs on {where} but gives wrong numbers ({agreement}); {cure}")
    return Reading(True, f"quantised, ran forward and backward on {where}: {agreement}")


def _reported(text: str) -> Iterator[Outcome]:
    """The outcomes among the lines of a child, which libraries may have written to as well."""
    for line in text.splitlines():
        if line.startswith(_MARK):
            data = json.loads(line.removeprefix(_MARK))
            yield Outcome(data["field"], tuple(data["values"]), data["fault"], data["passing"])


FIELDS = ("eight_bit", "int8_gweights_s", "four_bit", "nf4_gweights_s")
# How the cause of a measurement that failed begins; a profile that holds one is not remembered.
UNMEASURED = "the measurement failed"
_MARK = "OUTCOME "
