"""Chance in a simulation: each thing that is left to it has a generator of its own, named by what it is for.

Nothing depends on the order in which things are drawn, so an engine, a crash or another device changes no draw.
"""

from __future__ import annotations

import hashlib

import numpy as np


def named(seed: int, *names: object) -> np.random.Generator:
    """A generator for what these names mean, in a simulation of that seed."""
    text = ":".join(map(str, (seed, *names)))
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")))


def fraction(seed: int, *names: object) -> float:
    """A number from 0 to 1, for what these names mean: cheaper than a generator."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2.0**56
