"""One export from beginning to end: refused, or written beside, opened in its engine, compared, described, in place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import EdgeRuntimeError, ExportError, MissingExtraError
from export import Format, folders, get, origin
from export.card import FILE as CARD
from export.card import card
from export.origin import Origin
from export.parity import Parity
from export.subject import Subject

if TYPE_CHECKING:
    # Comparing needs torch, and whoever writes an adapter alone has none.
    from export.verify import Reference

PARITY = "parity.json"


@dataclass(frozen=True)
class Made:
    """What an export is.

    Attributes:
        folder: where it is.
        parity: what verification found; None where it was switched off.
        size: bytes of all its files.
    """

    folder: Path
    parity: Parity | None
    size: int


def make(
    name: str,
    subject: Subject,
    folder: Path,
    about: Origin,
    known: Reference | None,
    *,
    force: bool = False,
    more: Callable[[Path], None] | None = None,
) -> Made:
    """Export in one format. Nothing is in `folder` before all of it is, and nothing that is not what it should be.

    Args:
        name: a key of `FORMATS`.
        subject: what leaves.
        folder: where to; see `folders` for the names beside it.
        about: where the adapter comes from.
        known: what the live model says; None to go without a comparison.
        force: whether an earlier export there is replaced.
        more: writes further files into the folder.

    Raises:
        ExportError: the format cannot hold the adapter, the folder is taken or cannot be written, or the artefact does
            not compute what the live model computes.
        MissingExtraError: its engine is not installed.
        EdgeRuntimeError: the engine could not open it; what was written is kept, under a name that says so.
    """
    form = get(name)
    form.refuse(subject)
    with folders.writing(folder, force=force) as part:
        try:
            form.write(subject, part)
            if more is not None:
                more(part)
            origin.write(about, part)
        except OSError as error:
            raise folders.unwritable(folder, error) from error
        found = None if known is None else _verified(form, subject, part, folder, known)
        _describe(name, subject, about, found, part)
        if found is not None and not good(form, found):
            kept = folders.keep_as(part, folder, "refused")
            raise ExportError(f"{_fault(name, form, found)}; it is kept in {kept}: do not use it, and report this")
        size = folders.size_of(part)
    return Made(folder, found, size)


def _describe(name: str, subject: Subject, about: Origin, found: Parity | None, folder: Path) -> None:
    """Put the card, and what verification found, beside the artefact."""
    if found is not None:
        told = json.dumps(summary(name, get(name), found), indent=2, allow_nan=False) + "\n"
        (folder / PARITY).write_text(told, encoding="utf-8")
    (folder / CARD).write_text(card(name, about, subject.adapter, found), encoding="utf-8")


def good(form: Format, found: Parity) -> bool:
    """Whether an artefact is what it should be."""
    return found.distance.max_logit_diff <= form.tolerance and found.agreement >= form.agreement


def summary(name: str, form: Format, found: Parity) -> dict[str, Any]:
    """What `parity.json` says; what has no limit has null."""
    return {
        "format": name,
        "good": good(form, found),
        "max_logit_diff" if found.of_logits else "max_log_probability_diff": found.distance.max_logit_diff,
        "tolerance": form.tolerance if math.isfinite(form.tolerance) else None,
        "kl_nats": found.distance.kl,
        "greedy_agreement": found.agreement,
        "least_agreement": form.agreement,
        "greedy_tokens": found.greedy_tokens,
        "same_top": found.distance.same_top,
        "positions": found.distance.positions,
        "effect_of_the_adapter": found.effect,
    }


def _verified(form: Format, subject: Subject, part: Path, folder: Path, known: Reference) -> Parity:
    from export.verify import judge  # noqa: PLC0415 - only where torch is

    try:
        engine = form.open_engine(subject, part)
        try:
            return judge(known, engine)
        finally:
            engine.close()
    except MissingExtraError as error:
        kept = folders.keep_as(part, folder, "unverified")
        raise MissingExtraError(f"{error}; or give --no-verify; what was written is kept in {kept}") from error
    except EdgeRuntimeError as error:
        kept = folders.keep_as(part, folder, "refused" if isinstance(error, ExportError) else "unverified")
        raise type(error)(f"{error}; what was written is kept in {kept}: it is not verified") from error
    except Exception:
        # Memory that ran out, above all: the caller says so; what was written need not go with it.
        folders.keep_as(part, folder, "unverified")
        raise


def _fault(name: str, form: Format, found: Parity) -> str:
    if found.distance.max_logit_diff > form.tolerance:
        return (
            f"the {name} export changes logits by {found.distance.max_logit_diff:.1e} against the live adapter; "
            f"expected at most {form.tolerance:.0e}"
        )
    return (
        f"the {name} export chooses {100 * found.agreement:.1f} % of {found.greedy_tokens} tokens as the live adapter "
        f"does; expected at least {100 * form.agreement:.0f} %"
    )
