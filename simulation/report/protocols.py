"""Three questions to runs, as tables: how good is it under a budget, what does a target cost, what do failures cost?

In the manner of EdgeFlowerTune, a benchmark of federated fine-tuning under the limits of devices: quality under a
budget, cost to a target, robustness. A run is judged by versions that there were: nothing is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edge_runtime.errors import ConfigError
from simulation.report.story import Story
from simulation.tables import VersionRow
from simulation.traces import HOUR

MIB = 1 << 20
Chosen = Mapping[str, str]

COSTS: Mapping[str, Callable[[VersionRow], float]] = {
    "hours": lambda row: row.seconds / HOUR,
    "mib": lambda row: (row.bytes_up + row.bytes_down) / MIB,
    "joules": lambda row: row.joules,
}
"""What a version has cost when it is merged: virtual hours, MiB up and down of all devices, and joules of all."""

SHARES = 0.25, 0.5, 1.0
"""Of what the most frugal run spent: budgets under which every run can be judged."""
WAY = 0.5, 0.75, 0.9
"""Of the way from the first loss to the best: targets when none are named."""
LONGEST = 32
"""Characters of a value that a legend bears."""
ALONE = "run"
"""The name of what is tried when runs are told apart by their folders alone."""
BREAKING = ("simulation.devices", "simulation.server_crashes_per_hour", ALONE)
"""Keys that make a fleet fail more or less; runs that differ in another key are not compared for robustness."""


@dataclass(frozen=True)
class Questions:
    """What the protocols are asked.

    Attributes:
        targets: losses whose cost is asked for; some are chosen when empty.
        budgets: name in `COSTS` → budgets in its unit; some are chosen of each when empty.
    """

    targets: Sequence[float] = ()
    budgets: Mapping[str, Sequence[float]] = field(default_factory=dict)


def questions(targets: Sequence[float], budgets: Sequence[str]) -> Questions:
    """What a command line asks.

    Args:
        targets: losses.
        budgets: each `hours=2`, `mib=500` or `joules=1e5`.

    Raises:
        ConfigError: one that is no number above 0, or a budget of something else.
    """
    for target in targets:
        if not 0 < target < math.inf:
            raise ConfigError(f"--target takes a loss above 0, such as 0.3; found {target}")
    found: dict[str, list[float]] = {}
    for text in budgets:
        name, _, value = map(str.strip, text.partition("="))
        amount = _positive(value)
        if name not in COSTS or amount is None:
            known = ", ".join(f"{cost}=NUMBER" for cost in COSTS)
            raise ConfigError(f"--budget takes one of {known}, where the number is above 0; found {text!r}")
        found.setdefault(name, []).append(amount)
    return Questions(tuple(targets), {name: sorted(set(found[name])) for name in COSTS if name in found})


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


@dataclass(frozen=True)
class Judged:
    """A run, what it tries (key → value, empty for a single run), and what to call it in a legend or a table."""

    chosen: Chosen
    story: Story
    name: str


def named(runs: Sequence[Chosen]) -> list[str]:
    """What to call runs: by what they try, a long value by its number among those of its key."""
    found = []
    for chosen in runs:
        words = []
        for key, value in chosen.items():
            values = list(dict.fromkeys(run[key] for run in runs if key in run))
            said = value if len(value) <= LONGEST else f"no. {values.index(value) + 1}"
            words.append(said if key == ALONE else f"{key.rpartition('.')[2]}={said}")
        found.append(", ".join(words) or ALONE)
    return found


@dataclass(frozen=True)
class Quality:
    """Loss and accuracy of the last version that a run merged within a budget; None when it had none yet."""

    run: str
    cost: str
    budget: float
    loss: float | None
    accuracy: float | None = None


@dataclass(frozen=True)
class Cost:
    """What a run had spent when its loss first was at the target or below; None when it never was."""

    run: str
    target: float
    hours: float | None
    mib: float | None
    joules: float | None


@dataclass(frozen=True)
class Robustness:
    """A run with failures beside one without, which differs from it only in how the fleet fails."""

    run: str
    against: str
    crashes: int
    dropouts: int
    server_crashes: int
    loss: float | None
    loss_without: float | None
    hours: float
    hours_without: float
    rounds: int
    rounds_without: int


def loss_of(row: VersionRow) -> float | None:
    """The loss that a version is judged by: of the global adapter where it is known, or else what devices held out."""
    return row.loss if row.loss is not None else row.held_out


def last_loss(story: Story) -> float | None:
    """The loss at the end."""
    return loss_of(story.versions[-1]) if story.versions else None


def quality(runs: Sequence[Judged], budgets: Mapping[str, Sequence[float]] | None = None) -> list[Quality]:
    """How good each run is under each budget.

    Args:
        runs: to be judged.
        budgets: name in `COSTS` → budgets in its unit; shares of what the most frugal run spent when there are none.
    """
    found = []
    for name, of in COSTS.items():
        for budget in budgets.get(name, ()) if budgets else _budgets(runs, of):
            for run in runs:
                within = [row for row in run.story.versions if of(row) <= budget]
                reached = (loss_of(within[-1]), within[-1].accuracy) if within else (None, None)
                found.append(Quality(run.name, name, budget, *reached))
    return found


def _budgets(runs: Sequence[Judged], of: Callable[[VersionRow], float]) -> list[float]:
    spent = [of(run.story.versions[-1]) for run in runs if run.story.versions]
    # To the digits that a reader sees, upwards: the whole of what a run spent has to suffice for it.
    return [_digits(share * min(spent), math.ceil) for share in SHARES] if spent else []


def _digits(value: float, to: Callable[[float], int], digits: int = 3) -> float:
    if value <= 0:
        return value
    scale = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{to(value / scale) * scale:.{digits}g}")


def cost(runs: Sequence[Judged], targets: Sequence[float] = ()) -> list[Cost]:
    """What each target costs each run.

    Args:
        runs: to be judged.
        targets: losses; some of the way from the worst first loss to the best when empty.
    """
    found = []
    for target in targets or _targets(runs):
        for run in runs:
            rows = ((row, loss_of(row)) for row in run.story.versions)
            first = next((row for row, loss in rows if loss is not None and loss <= target), None)
            spent = {name: of(first) if first else None for name, of in COSTS.items()}
            found.append(Cost(run.name, target, **spent))
    return found


def _targets(runs: Sequence[Judged]) -> list[float]:
    told = [[loss for row in run.story.versions if (loss := loss_of(row)) is not None] for run in runs]
    losses = [each for each in told if each]
    if not losses:
        return []
    start, best = max(each[0] for each in losses), min(min(each) for each in losses)
    return [_digits(start + share * (best - start), math.ceil) for share in WAY]


def robustness(runs: Sequence[Judged]) -> list[Robustness]:
    """Each run that failures befell beside each that none did, where they differ only in how the fleet fails."""
    without = [run for run in runs if not sum(run.story.failures.values())]
    return [
        _beside(run, other)
        for run in runs
        if sum(run.story.failures.values())
        for other in without
        if {key for key in run.chosen if run.chosen[key] != other.chosen.get(key)} <= set(BREAKING)
    ]


def _beside(run: Judged, other: Judged) -> Robustness:
    story, failures = run.story, run.story.failures
    return Robustness(
        run.name, other.name, failures.get("crash", 0), failures.get("dropout", 0), failures.get("server crash", 0),
        last_loss(story), last_loss(other.story), story.seconds / HOUR, other.story.seconds / HOUR,
        len(story.versions), len(other.story.versions),
    )  # fmt: skip
