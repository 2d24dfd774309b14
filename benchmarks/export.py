"""Does every export compute what the live adapter computes, in the engine that reads it, and what does it cost?

SmolLM2-135M with an adapter of rank 8 that is trained here, and tiny random models of the shapes of Llama and Qwen2.
Each is written in each format, opened in its own engine and compared, in float32, with the adapter on the live model:
logits at every position of prompts and answers, and every greedy token in the context that both share. Times are of
one machine; differences are not.

    python -m benchmarks.export [--quick] [--formats peft,gguf] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.export_subjects import SHAPES, Case, shaped, trained
from benchmarks.result import Goal, result
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.train.exclusive import remove
from export import FORMATS, folders
from export.parity import Parity
from export.subject import Subject
from export.verify import Reference, judge, reference

MIB = 2**20
SPEED_TOKENS = 32
SWAPS = 20
GOALS: Mapping[str, Goal] = {
    "peft_max_logit_diff": ("<=", 1e-5),
    "merged_max_logit_diff": ("<=", 1e-3),
    "onnx_max_logit_diff": ("<=", 1e-3),
    "onnx_adapter_max_logit_diff": ("<=", 1e-4),
    "mlx_max_logit_diff": ("<=", 1e-4),
    "gguf_token_agreement": (">=", 0.95),
    "gguf_tokens": (">=", 256),
}
"""Those of the issue; formats that are missing here miss theirs."""

Write = Callable[[Subject, Path], None]


@dataclass(frozen=True)
class Row:
    """What came of one format and one case.

    Attributes:
        case: its name.
        form: the format, or a variant of one.
        parity: what comparison found; None where the format could not be tried.
        size: bytes of the folder.
        writing: seconds to write it.
        opening: seconds to open it in its engine.
        tokens_per_second: of a greedy answer, with the engine's cache.
        swap_ms: milliseconds to put another adapter into the open engine.
        note: why it could not be tried.
    """

    case: str
    form: str
    parity: Parity | None = None
    size: int = 0
    writing: float = math.nan
    opening: float = math.nan
    tokens_per_second: float = math.nan
    swap_ms: float = math.nan
    note: str = ""


def main() -> int:
    """Export, compare, print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prompts and steps")
    parser.add_argument("--formats", default=",".join(FORMATS), help="with commas; all when absent")
    parser.add_argument("--cases", default=",".join(("SmolLM2-135M", *SHAPES)), help="with commas; all when absent")
    parser.add_argument("--out", type=Path, default=Path("edge-exports"))
    options = parser.parse_args()
    # Libraries that set logging up when they are imported let every file that gguf writes be told.
    logging.getLogger("gguf").setLevel(logging.WARNING)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    rows = []
    for case in _cases(options.out, options.cases.split(","), quick=options.quick):
        rows += list(_measured(case, options.formats.split(","), options.out, 8 if options.quick else 16))
    Console(width=150).print(_table(rows))
    return 0 if result("export", figures(rows), GOALS) else 1


def _cases(out: Path, names: Sequence[str], *, quick: bool) -> Iterator[Case]:
    size = {"prompts": 4 if quick else 16, "prompt_tokens": 24}
    if "SmolLM2-135M" in names:
        yield trained(steps=2 if quick else 8, **size)
    for name in SHAPES:
        if name in names:
            yield shaped(name, out / "bases", **size)


def _measured(case: Case, formats: Sequence[str], out: Path, count: int) -> Iterator[Row]:
    """One case in every format; each folder goes when it has been measured, as together they take gigabytes."""
    for part in ("known", "other"):
        (out / part).mkdir(exist_ok=True)
    known = reference(case.subject, case.prompts, out / "known", count=count)
    print(f"{case.name}: the adapter changes logits by up to {known.effect:.2f}", flush=True)
    for name in formats:
        for label, write in _variants(name):
            folder = out / "export"
            remove(folder)
            folder.mkdir()
            try:
                row = _one(case, name, label, write, folder, known)
                if name == "onnx-adapter":
                    row = _swapped(case, row, folder, out / "other", known, count)
            except (EdgeRuntimeError, ModuleNotFoundError) as error:
                row = Row(case.name, label, note=f"{type(error).__name__}: {error}")
            print(f"  {label}: {row.note or _in_words(row)}", flush=True)
            yield row


def _variants(name: str) -> Iterator[tuple[str, Write]]:
    """Ways to write a format; what sixteen bits do to a merged model is told apart from what merging does."""
    if name not in FORMATS:
        raise SystemExit(f"expected formats of {', '.join(FORMATS)}; found '{name}'")
    if name == "merged":
        yield "merged", lambda subject, folder: FORMATS[name].write(subject, folder, weights="fp32")  # type: ignore[call-arg]
        yield "merged_16bit", FORMATS[name].write
    else:
        yield name.replace("-", "_"), FORMATS[name].write


def _one(case: Case, name: str, label: str, write: Write, folder: Path, known: Reference) -> Row:
    form = FORMATS[name]
    form.refuse(case.subject)
    start = time.perf_counter()
    write(case.subject, folder)
    written = time.perf_counter()
    engine = form.open_engine(case.subject, folder)
    opened = time.perf_counter()
    try:
        parity = judge(known, engine)
        begun = time.perf_counter()
        engine.greedy(case.prompts[0], SPEED_TOKENS)
        speed = SPEED_TOKENS / (time.perf_counter() - begun)
    finally:
        engine.close()
    return Row(case.name, label, parity, folders.size_of(folder), written - start, opened - written, speed)


def _swapped(case: Case, row: Row, folder: Path, scratch: Path, known: Reference, count: int) -> Row:
    """Another adapter, of another rank, in the same session, and the first again; how long a swap takes."""
    from export import onnx_adapter  # noqa: PLC0415 - needs an extra

    second = folder / "second.onnx_adapter"
    onnx_adapter.write_adapter(case.other, second)
    of_second = reference(case.other, case.prompts, scratch, count=count)
    engine = onnx_adapter.open_engine(case.subject, folder)
    try:
        seconds = []
        for number in range(SWAPS):
            begun = time.perf_counter()
            onnx_adapter.activate(engine, (folder / onnx_adapter.ADAPTER, second)[number % 2])
            seconds.append(time.perf_counter() - begun)
        other = judge(of_second, engine)
        onnx_adapter.activate(engine, folder / onnx_adapter.ADAPTER)
        again = judge(known, engine)
    finally:
        engine.close()
    worst = max((row.parity, other, again), key=lambda found: found.distance.max_logit_diff if found else 0.0)
    return replace(row, parity=worst, swap_ms=1000 * statistics.median(seconds))


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The worst of all cases for each format; what it costs, and tokens alike, of the trained model."""
    found: dict[str, Any] = {"not_run": sorted({row.form for row in rows if row.parity is None})}
    for row in rows:
        if row.parity is None:
            continue
        if row.parity.of_logits:
            key = f"{row.form}_max_logit_diff"
            found[key] = max(found.get(key, 0.0), row.parity.distance.max_logit_diff)
        if row.case == "SmolLM2-135M":
            found[f"{row.form}_token_agreement"] = row.parity.agreement
            found[f"{row.form}_mib"] = round(row.size / MIB, 2)
            found[f"{row.form}_seconds"] = round(row.writing, 2)
            found[f"{row.form}_tokens_per_second"] = round(row.tokens_per_second, 1)
            if row.form == "gguf":
                found["gguf_tokens"] = row.parity.greedy_tokens
            if not math.isnan(row.swap_ms):
                found["swap_ms"] = round(row.swap_ms, 3)
    # A case that failed must not hide behind the others.
    for form in found["not_run"]:
        found.pop(f"{form}_max_logit_diff", None)
    return found


def _in_words(row: Row) -> str:
    if row.parity is None:
        return row.note
    return (
        f"{row.parity.distance.max_logit_diff:.1e}, {100 * row.parity.agreement:.1f} % of {row.parity.greedy_tokens} "
        f"tokens, {row.size / MIB:.1f} MiB in {row.writing:.1f} s, {row.tokens_per_second:.1f} tokens/s"
    )


def _table(rows: Sequence[Row]) -> Table:
    table = Table(
        "base", "format", "max |Δlogit|", "KL (nats)", "tokens alike", "MiB", "write s", "open s", "tokens/s", "swap ms"
    )
    for row in rows:
        if row.parity is None:
            table.add_row(row.case, row.form, f"not run: {row.note[:90]}")
            continue
        found = row.parity.distance
        table.add_row(
            row.case, row.form, f"{found.max_logit_diff:.1e}{'' if row.parity.of_logits else ' (log p)'}",
            f"{found.kl:.1e}", f"{100 * row.parity.agreement:.1f} % of {row.parity.greedy_tokens}",
            f"{row.size / MIB:.1f}", f"{row.writing:.1f}", f"{row.opening:.1f}", f"{row.tokens_per_second:.1f}",
            "" if math.isnan(row.swap_ms) else f"{row.swap_ms:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
