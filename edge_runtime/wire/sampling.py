"""Who takes part in a round, by hash: every device finds out by itself, and no message names anybody. Pure.

A device's number in a round is a hash of (seed, round, name), uniform below FULL; the round asks those whose number is
below its threshold. A threshold that rises asks the same devices and more. Who knows names and threshold knows who is
asked, so a Directive has the same size for ten devices and for a hundred thousand.
"""

from __future__ import annotations

import hashlib
from typing import Final

BITS: Final = 48
FULL: Final = 1 << BITS
"""The threshold below which every number is. JSON readers that know only doubles read it exactly."""


def number_of(seed: int, round_number: int, name: str) -> int:
    """A device's number in a round, 0 ≤ number < FULL."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{round_number}:{name}".encode()).digest()[: BITS // 8], "big")
