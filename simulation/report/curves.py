"""Curves of what a run learnt: loss against rounds, virtual time, bytes and energy, and what merging lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from simulation.report import style
from simulation.report.protocols import Judged, last_loss, loss_of
from simulation.report.style import BYTES, ENERGIES, TIMES
from simulation.tables import VersionRow

AGAINST: Mapping[str, tuple[Callable[[VersionRow], float], Mapping[str, float], str]] = {
    "rounds": (lambda row: float(row.round), {"": 1.0}, "rounds"),
    "virtual time": (lambda row: row.seconds, TIMES, "of virtual time"),
    "moved by all devices": (lambda row: row.bytes_up + row.bytes_down, BYTES, "sent and received"),
    "used by all devices": (lambda row: row.joules, ENERGIES, "used"),
}
"""What loss is drawn against: of a version, its units, and how a title goes on after the quantity."""
Curve = Callable[[Any, Judged, Callable[[VersionRow], float], int, int], None]
LEGEND = 28
"""Runs that a legend can tell apart."""


def losses(runs: Sequence[Judged]) -> Any:
    """Loss against each thing that it costs, all runs in the same axes."""
    return _against(runs, _curve, "loss", headline(runs))


def accuracies(runs: Sequence[Judged]) -> Any:
    """Accuracy against the same things."""
    return _against(runs, _accuracy_curve, "% of held-out tokens", accuracy_headline(runs))


def _against(runs: Sequence[Judged], curve: Curve, y: str, title: str) -> Any:
    told = [run for run in runs if run.story.versions]
    drawn, axes = style.figure(6.8, 2, 2, sharey=True)
    for axis, (what, (of, units, words)) in zip(axes.flat, AGAINST.items(), strict=True):
        most = max((of(run.story.versions[-1]) for run in told), default=0.0)
        unit, size = style.scaled(most, units)
        for number, run in enumerate(told):
            curve(axis, run, partial(_scaled, of, size), number, len(runs))
        axis.set_xlim(left=0)
        axis.xaxis.get_major_locator().set_params(integer=not unit)
        style.titled(axis, f"{style.worded(most, units)} {words}", f"{what}, {unit}" if unit else what, y)
        if not told:
            axis.text(0.5, 0.5, "nothing was merged", transform=axis.transAxes, ha="center", color=style.FAINT)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if 0 < len(labels) <= LEGEND and told:
        style.keyed(drawn, handles, labels, columns=3)
    drawn.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left", color=style.INK)
    return drawn


def _scaled(of: Callable[[VersionRow], float], size: float, row: VersionRow) -> float:
    return of(row) / size


def _curve(axis: Any, run: Judged, at: Callable[[VersionRow], float], number: int, runs: int) -> None:
    rows = [row for row in run.story.versions if loss_of(row) is not None]
    alone, marks = runs == 1, _marks(number, runs, len(rows))
    # A single run's curve is named by what it is; curves of many by their runs.
    known = any(row.loss is not None for row in rows)
    name = ("global adapter, all data" if known else "held out by the devices") if alone else run.name
    axis.plot([at(row) for row in rows], [loss_of(row) for row in rows], label=name, **style.line(number), **marks)
    if alone and known:
        held = [row for row in rows if row.held_out is not None]
        xs, ys = [at(row) for row in held], [row.held_out for row in held]
        axis.plot(xs, ys, label="held out, before training", **{**style.line(1), "linestyle": "--"}, **marks)
    if alone and run.story.floor is not None:
        axis.axhline(run.story.floor, color=style.FAINT, linestyle=":", linewidth=1.3, label="least that there is")


def _accuracy_curve(axis: Any, run: Judged, at: Callable[[VersionRow], float], number: int, runs: int) -> None:
    known = [(at(row), 100 * row.accuracy) for row in run.story.versions if row.accuracy is not None]
    name = "held out by the devices" if runs == 1 else run.name
    xs, ys = [x for x, _ in known], [y for _, y in known]
    axis.plot(xs, ys, label=name, **style.line(number), **_marks(number, runs, len(known)))


def _marks(number: int, runs: int, rows: int) -> dict[str, Any]:
    """Later curves are thinner than earlier ones, so that those which run together can all be seen."""
    thin = number / max(1, runs - 1) if runs > 1 else 0.5
    return {"markevery": max(1, rows // 12), "markersize": 7 - 4 * thin, "linewidth": 3 - 2 * thin}


def headline(runs: Sequence[Judged]) -> str:
    """What the losses say, in one line."""
    ended = [(loss, run) for run in runs if (loss := last_loss(run.story)) is not None]
    if not ended:
        return "No loss: nothing was merged"
    best, run = min(ended, key=lambda pair: pair[0])
    if len(runs) > 1:
        worst = max(loss for loss, _ in ended)
        if f"{best:.3g}" == f"{worst:.3g}":
            return f"All losses end at {best:.3g}"
        return f"Losses end at {best:.3g} to {worst:.3g}; lowest: {run.name}"
    first, last = run.story.versions[0], run.story.versions[-1]
    again = [(before[0], after[0]) for before, after in run.story.twice]
    if last.loss is None and again:
        return f"Held-out loss {_means(again, '.4g')}"
    return (
        f"Loss {loss_of(first):.4g} → {best:.4g} in {len(run.story.versions)} rounds, "
        f"{style.worded(last.seconds, TIMES)} of virtual time"
    )


def accuracy_headline(runs: Sequence[Judged]) -> str:
    """What the accuracies say, in one line."""
    known = [(found, run) for run in runs if (found := accuracies_of(run))]
    if not known:
        return "No accuracy: nobody measured one"
    (best, run) = max(((found[-1], run) for found, run in known), key=lambda pair: pair[0])
    if len(runs) > 1:
        worst = min(found[-1] for found, _ in known)
        return f"Accuracies end at {worst:.1%} to {best:.1%}; highest: {run.name}"
    again = [(one[1], two[1]) for one, two in run.story.twice if one[1] is not None and two[1] is not None]
    if again:
        return f"Held-out accuracy {_means(again, '.1%')}"
    first = accuracies_of(run)[0]
    return f"{first:.1%} → {best:.1%} of held-out tokens are those that the model holds most likely"


def _means(pairs: Sequence[tuple[float, float]], form: str) -> str:
    """Of devices that were asked again: those of other rounds hold out other examples."""
    before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return f"{before:{form}} → {after:{form}} on the {len(pairs)} devices that trained more than once"


def accuracies_of(run: Judged) -> list[float]:
    """The accuracy of each version that has one."""
    return [row.accuracy for row in run.story.versions if row.accuracy is not None]


def truncation(runs: Sequence[Judged]) -> Any:
    """What each merge lost when it was brought back to the rank that is kept."""
    drawn, axes = style.figure(3.2)
    axis = axes[0, 0]
    most = 0.0
    for number, run in enumerate(runs):
        rows = run.story.versions
        errors = [100 * row.truncation for row in rows]
        most = max([most, *errors])
        marks = _marks(number, len(runs), len(rows))
        axis.plot([row.round for row in rows], errors, label=run.name, **style.line(number), **marks)
    axis.set_ylim(0, max(1.2 * most, 0.1))
    said = f"at most {most:.2g} % of a merged change" if most >= 1e-6 else "nothing: every merge was exact"
    axis.xaxis.get_major_locator().set_params(integer=True)
    style.titled(axis, f"Truncation lost {said}", "round", "% of the change's norm")
    if 1 < len(runs) <= LEGEND:
        handles, labels = axis.get_legend_handles_labels()
        style.keyed(drawn, handles, labels, columns=3)
    return drawn
