"""A report as one HTML file: facts, pictures in it as data, and tables; nothing is fetched, and there is no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any

from simulation.report import style
from simulation.report.protocols import Judged, last_loss
from simulation.report.story import Story
from simulation.report.style import BYTES, ENERGIES, TIMES

CSS = """
:root { color-scheme: light dark;
  --ink: #1d2329; --faint: #5c6670; --paper: #f4f4f1; --card: #fbfbf9; --line: #d9dcdf; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaec; --faint: #a3adb6; --paper: #14181c; --card: #1d2329; --line: #39424a; } }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { color: var(--faint); margin: .25rem 0 1rem; max-width: 50rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--faint); font-size: .85rem; } dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
figure { margin: 0 0 1.25rem; } figcaption { color: var(--faint); font-size: .9rem; max-width: 50rem; }
img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: .5rem; background: #fbfbf9; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--faint); font-weight: 600; }
"""
WORDS: Mapping[str, str] = {
    "run": "run", "cost": "of", "budget": "budget", "loss": "loss", "target": "target loss", "hours": "virtual hours",
    "mib": "MiB", "joules": "joules", "against": "beside", "crashes": "crashes", "dropouts": "drop-outs",
    "server_crashes": "server crashes", "loss_without": "loss beside", "hours_without": "hours beside",
    "rounds": "rounds", "rounds_without": "rounds beside", "accuracy": "accuracy",
}  # fmt: skip

MEASURED = {"accuracy"}
"""Columns that a table has only where somebody measured them."""
WHOLE = 1000.0
"""From here on numbers are written without a fraction."""


@dataclass(frozen=True)
class Picture:
    """A figure as it goes into a page: the PNG's bytes, what it shows in words, and a sentence of how to read it."""

    name: str
    png: bytes
    says: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A table under a heading; `missing` is what a cell without a value says."""

    heading: str
    text: str
    rows: Sequence[Any]
    missing: str


def facts(story: Story) -> Mapping[str, str]:
    """What a reader wants to know first."""
    last = story.versions[-1] if story.versions else None
    loss = last_loss(story)
    failed = ", ".join(f"{count} x {kind}" for kind, count in story.failures.items())
    return {
        "devices that planned": f"{len(story.devices):,}",
        "rounds merged": f"{len(story.versions)} of {story.asked}",
        "loss at the end": "—" if loss is None else f"{loss:.4g}",
        **({} if last is None or last.accuracy is None else {"accuracy at the end": f"{last.accuracy:.1%}"}),
        "virtual time": style.worded(story.seconds, TIMES),
        "sent": style.worded(last.bytes_up, BYTES) if last else "—",
        "received": style.worded(last.bytes_down, BYTES) if last else "—",
        "energy": style.worded(last.joules, ENERGIES) if last else "—",
        "failures": failed or "none",
    }


def page(title: str, text: str, told: Mapping[str, str], pictures: Sequence[Picture], tables: Sequence[Section]) -> str:
    """The HTML.

    Args:
        title: of the page.
        text: a sentence or two under it.
        told: what to know first: name → value.
        pictures: in their order.
        tables: after them; those without rows are left out.
    """
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in told.items())
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(text)}</p>", f"<dl>{cards}</dl>" if cards else ""]
    body += [_picture(each) for each in pictures]
    body += [_table(each) for each in tables if each.rows]
    head = (
        '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{CSS}</style>"
    )
    inner = "\n".join(part for part in body if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{inner}\n</body></html>\n'


def _picture(each: Picture) -> str:
    data = base64.b64encode(each.png).decode("ascii")
    image = f'<img alt="{escape(each.says)}" src="data:image/png;base64,{data}"/>'
    return f"<h2>{escape(each.name)}</h2><figure>{image}<figcaption>{escape(each.caption)}</figcaption></figure>"


def _table(section: Section) -> str:
    known = {name for row in section.rows for name, value in vars(row).items() if value is not None}
    names = [entry.name for entry in fields(section.rows[0]) if entry.name in known or entry.name not in MEASURED]
    head = "".join(f"<th>{escape(WORDS.get(name, name))}</th>" for name in names)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(getattr(row, name), section.missing))}</td>" for name in names) + "</tr>"
        for row in section.rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>{escape(section.heading)}</h2><p>{escape(section.text)}</p><div class="table">{table}</div>'


def _cell(value: Any, missing: str) -> str:
    if value is None:
        return missing
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= WHOLE else f"{value:.4g}"
    return str(value)


@dataclass(frozen=True)
class Summary:
    """A run of a sweep, in a row."""

    run: str
    rounds: int
    loss: float | None
    hours: float
    mib: float
    joules: float
    accuracy: float | None = None


def summary(run: Judged) -> Summary:
    """The row of a run."""
    story = run.story
    last = story.versions[-1] if story.versions else None
    moved = (last.bytes_up + last.bytes_down) / 2**20 if last else 0.0
    spent = (story.seconds / 3600, moved, last.joules if last else 0.0)
    return Summary(run.name, len(story.versions), last_loss(story), *spent, last.accuracy if last else None)
