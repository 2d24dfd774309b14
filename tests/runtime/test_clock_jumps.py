"""Wall time decides nothing: whatever it does, a fleet merges the same bytes."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.runtime.fleets import BRISK, check_undisturbed, fleet_in


@pytest.mark.parametrize("seed", range(3))
def test_a_wall_clock_that_jumps_by_years_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    calm = fleet_in(folder, "before", *BRISK).run()
    draw = random.Random(seed)
    monkeypatch.setattr(time, "time", lambda: draw.uniform(0, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: draw.randrange(4 * 10**18))
    jumping = fleet_in(folder, "jumping", *BRISK, fuses={"server": [30], "a": [20]}).run()
    check_undisturbed(jumping)
    assert len(jumping.kills) == 2
    assert jumping.merged().digest() == calm.merged().digest()
    assert jumping.clock.now < 2 * calm.clock.now + 60, "nor does it wait longer"
