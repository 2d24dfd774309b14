"""A report's files: tables of the protocols, PNGs, and the HTML, beside the event logs that they are made of."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_runtime.errors import DataError
from simulation.log import EVENTS
from simulation.report import curves, effort, page, people, protocols, timeline
from simulation.report.page import Picture, Section
from simulation.report.protocols import ALONE, Chosen, Judged, Questions
from simulation.report.story import Story, told

HTML, JSON, PICTURES, SWEPT = "report.html", "report.json", "figures", "sweep.csv"
ANYTHING = Questions()

SINGLE: Mapping[str, tuple[str, Callable[[Story], Any], str]] = {
    "timeline": ("Who did what, and when", timeline.gantt, "Of a large fleet, those devices that were most at work."),
    "time": ("Where the time went", timeline.spent, "All devices of a kind, over the whole run."),
    "effort": ("What it took", effort.effort, "Energy is that of computing, sending and receiving."),
    "stragglers": (
        "Stragglers", timeline.stragglers,
        "A dot is an update that the server accepted, by when it came in its round; the line runs along the last ones.",
    ),
    "plans": ("Plans", people.plans, "What each kind of device can bear, as its own planner decided."),
    "partition": ("Who has which examples", people.partition, "Devices that planned, by kind."),
}  # fmt: skip
LOSSES = (
    "The same curve four times: what a loss costs in rounds, time, traffic and energy. Everything is counted from the "
    "beginning and over all devices. What devices hold out is judged by those that trained in the round: each time by "
    "others."
)
RIGHT = (
    "The share of the tokens of held-out completions that the model holds most likely, given the true tokens before; "
    "the mean over the devices that trained from the version before, which are others in each round."
)
OWN = "Of each device, on what it holds out: below the dotted line its own adapter is better than the global one."
CHOSEN = "Budgets are shares of what the most frugal run spent."
LOST = "What a merge dropped when it brought the sum of all changes back to the rank that is kept."


@dataclass(frozen=True)
class Written:
    """What was written; `drawn` tells whether figures and the HTML are in it, or matplotlib is missing."""

    files: tuple[Path, ...]
    drawn: bool


def of_folder(folder: Path, asked: Questions = ANYTHING) -> Written:
    """Report a run that has ended, or a sweep: a folder whose folders are runs.

    Raises:
        DataError: there is no run in it, or an event log that cannot be read.
    """
    if (folder / EVENTS).is_file():
        return of_run(folder, asked)[0]
    runs = _swept(folder)
    if not runs:
        raise DataError(f"{folder}: expected {EVENTS}, or folders with one; found neither; name a folder of `simulate`")
    return of_sweep(folder, runs, asked)


def _swept(folder: Path) -> list[tuple[Chosen, Path]]:
    """The runs of a sweep: as its table has them, or else every folder with an event log, by its name."""
    inner = sorted(path.parent for path in folder.glob(f"*/{EVENTS}"))
    if not (folder / SWEPT).is_file():
        return [({ALONE: path.name}, path) for path in inner]
    with (folder / SWEPT).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = [{key: row[key] for key in row if "." in key} for row in rows]
    folders = [folder / (row.get("folder") or "") for row in rows]
    return [(each, path) for each, path in zip(chosen, folders, strict=True) if path in inner]


def of_run(folder: Path, asked: Questions = ANYTHING, name: str = "") -> tuple[Written, Story]:
    """Report one run, in its folder.

    Raises:
        DataError: no event log, or one that cannot be read.
    """
    path = folder / EVENTS
    with path.open(encoding="utf-8") as file:
        story = told(file, str(path))
    run = Judged({}, story, name or ALONE)
    files = [*_tables(folder, [run], asked)]
    if not _drawable():
        return Written(tuple(files), drawn=False), story
    pictures = [_picture(folder, "loss", "Loss", curves.losses([run]), LOSSES)]
    pictures += [
        _picture(folder, key, heading, draw(story), caption) for key, (heading, draw, caption) in SINGLE.items()
    ]
    pictures.insert(2, _picture(folder, "truncation", "Truncation", curves.truncation([run]), LOST))
    pictures[1:1] = _accuracy(folder, [run])
    if story.own:
        pictures.append(_picture(folder, "personal", "Personal adapters", effort.personal(story), OWN))
    title = f"{story.method}, {len(story.devices):,} devices, {story.base}"
    ended = "" if story.finished else f"This run did not finish: {story.why or 'it was interrupted'}. "
    text = f"{ended}A simulated fleet in virtual time{f', of the run {name}' if name else ''}."
    html = page.page(title, text, page.facts(story), pictures, _sections([run], asked))
    return Written((*files, *_html(folder, html)), drawn=True), story


def of_sweep(out: Path, runs: Sequence[tuple[Chosen, Path]], asked: Questions = ANYTHING) -> Written:
    """Report each run of a sweep in its folder, and all of them together in that of the sweep.

    Args:
        out: the sweep's folder.
        runs: what each tries, and its folder.
        asked: targets and budgets; some are chosen when there are none.

    Raises:
        DataError: an event log that cannot be read.
    """
    judged = []
    for (chosen, folder), name in zip(runs, protocols.named([chosen for chosen, _ in runs]), strict=True):
        story = of_run(folder, asked, name)[1]
        # What each device did is not compared: only one run of it is in memory at a time.
        judged.append(Judged(chosen, replace(story, bars=(), arrivals=(), devices=()), name))
    files = _tables(out, judged, asked)
    if not _drawable():
        return Written(tuple(files), drawn=False)
    pictures = [
        _picture(out, "loss", "Loss", curves.losses(judged), LOSSES),
        *_accuracy(out, judged),
        _picture(out, "truncation", "Truncation", curves.truncation(judged), LOST),
    ]
    text = f"A sweep of a simulated fleet. Each run has a {HTML} of its own in its folder."
    html = page.page(f"{len(judged)} runs beside each other", text, {}, pictures, _sections(judged, asked))
    return Written((*files, *_html(out, html)), drawn=True)


def _drawable() -> bool:
    return find_spec("matplotlib") is not None


def _judgements(runs: Sequence[Judged], asked: Questions) -> Mapping[str, Sequence[Any]]:
    return {
        "quality_under_budget": protocols.quality(runs, asked.budgets),
        "cost_to_target": protocols.cost(runs, asked.targets),
        "robustness": protocols.robustness(runs),
    }


def _tables(folder: Path, runs: Sequence[Judged], asked: Questions) -> list[Path]:
    """The protocols as CSV, and all in one JSON file; a table without rows is not written, and an old one removed."""
    found = _judgements(runs, asked)
    files = [folder / JSON]
    told_of = {"runs": [{"chosen": dict(run.chosen), **asdict(page.summary(run))} for run in runs]}
    rows = {name: [asdict(row) for row in table] for name, table in found.items()}
    files[0].write_text(json.dumps({**told_of, **rows}, indent=1) + "\n", encoding="utf-8")
    for name, table in found.items():
        path = folder / f"{name}.csv"
        if not table:
            path.unlink(missing_ok=True)
            continue
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([entry.name for entry in fields(table[0])])
            writer.writerows(astuple(row) for row in table)
        files.append(path)
    return files


def _sections(runs: Sequence[Judged], asked: Questions) -> list[Section]:
    found = _judgements(runs, asked)
    table = [page.summary(run) for run in runs] if len(runs) > 1 else []
    return [
        Section("The runs", "Virtual hours, and MiB and joules of all devices.", table, "—"),
        Section(
            "Quality under a budget",
            f"That of the last version merged within it. {'' if asked.budgets else CHOSEN}".strip(),
            found["quality_under_budget"], "nothing merged yet",
        ),
        Section("Cost to a target", "Spent when the loss first was that low.", found["cost_to_target"], "never"),
        Section(
            "Robustness under failures",
            "Runs that crashes or drop-outs befell, each beside one without, alike but for how the fleet fails.",
            found["robustness"], "—",
        ),
    ]  # fmt: skip


def _accuracy(folder: Path, runs: Sequence[Judged]) -> list[Picture]:
    """Of runs that know one: a surrogate says no tokens."""
    if not any(curves.accuracies_of(run) for run in runs):
        return []
    return [_picture(folder, "accuracy", "Accuracy", curves.accuracies(runs), RIGHT)]


def _picture(folder: Path, key: str, heading: str, figure: Any, caption: str) -> Picture:
    """Write a figure as a PNG, and have it for the page."""
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    (folder / PICTURES / f"{key}.png").write_bytes(png.getvalue())
    words = [figure.get_suptitle(), *(axis.get_title(loc="left") for axis in figure.axes)]
    return Picture(heading, png.getvalue(), "; ".join(word for word in words if word), caption)


def _html(folder: Path, html: str) -> list[Path]:
    path = folder / HTML
    path.write_text(html, encoding="utf-8")
    return [path, *sorted((folder / PICTURES).glob("*.png"))]
