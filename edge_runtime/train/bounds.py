"""Bounds on what the libraries below torch keep for themselves, which no memory model could otherwise foresee."""

from __future__ import annotations

from collections.abc import MutableMapping

PRIMITIVES = 64
"""Compiled matrix products kept. A layer has some twenty per sequence length, each about a quarter of a MiB."""

VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_primitive_cache(environ: MutableMapping[str, str], capacity: int = PRIMITIVES) -> None:
    """Keep oneDNN from holding a compiled kernel for every shape that it ever met.

    torch on CPUs multiplies bf16 matrices through oneDNN, which caches up to 1,024 compiled kernels. Examples of
    unequal length have ever new shapes: measured on SmolLM2-135M with four examples a step, the process grew by about
    40 MiB in each step and a device with 850 MiB was killed in its second round; bounded, it stays where it is.

    Read by oneDNN at its first product, so this must come before. A value that a person has set is left alone.
    """
    for variable in VARIABLES:
        environ.setdefault(variable, str(capacity))
