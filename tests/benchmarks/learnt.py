"""Whether devices that learnt side by side learnt what each would alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.lora.adapter import Adapter


def assert_as_alone(expected: Sequence[Adapter], found: Sequence[Adapter], *, noise: float) -> None:
    """Fail where a factor is off by more than 0.2 % of its largest number, and more than `noise`."""
    for at, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        assert theirs.sizes == ours.sizes
        for name, pair in theirs.items():
            for factor in ("a", "b"):
                want, got = getattr(pair, factor), getattr(ours[name], factor)
                largest = np.abs(want).max()
                assert np.abs(want - got).max() <= 2e-3 * largest + noise, f"device {at}, {name}.{factor}"
