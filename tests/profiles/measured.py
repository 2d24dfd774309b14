"""A profile with every rate measured, as on two cores of a server with bf16 instructions."""

from __future__ import annotations

from dataclasses import replace

from profiles.catalogue import device
from profiles.device import UNITS

GIB = 2**30

MEASURED = replace(
    device("raspberry-pi-5"),
    name="measured",
    physical_cores=2,
    usable_cores=2,
    memory_bearable_bytes=64 * GIB,
    gemm_fp32_gflops=80.0,
    gemm_bf16_gflops=160.0,
    bf16_rate_ratio=2.0,
    bf16_is_fast=True,
    four_bit=True,
    eight_bit=True,
    memory_bandwidth_gb_s=10.0,
    nf4_gweights_s=1.0,
    int8_gweights_s=2.0,
    op_overhead_us=6.0,
    reasons=dict.fromkeys(UNITS, "measured"),
    unreadable={},
)
