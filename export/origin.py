"""Where an adapter comes from: facts that stay beside it, whoever takes it along and in whatever format.

`origin.json` is written when an adapter leaves, in each folder that it leaves in. It says what the model card says, and
of which base the adapter is: one that looks alike and has other weights would load, and answer nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_runtime.errors import ExportError, FingerprintMismatchError

FILE = "origin.json"

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Origin(BaseModel):
    """What is known of an adapter; what is not known is empty. Fields that a newer version adds are ignored.

    No examples, no paths and no names of people: only how many examples there were, and of what kind.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    base: str
    """As the fleet or the device names it: an alias, a hub id, a file's or folder's name."""
    fingerprint: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """SHA-256 of the base, the same at every precision; see `edge_runtime.train.source.fingerprint`."""
    precision: str = ""
    """Of the base's weights while the adapter was trained."""
    licence: str = ""
    """Of the base, as its publisher names it."""
    kind: Literal["personal", "global", ""] = ""
    family: str = "lora"
    fleet: str = ""
    device: str = ""
    run: str = ""
    """Names the life of the fleet."""
    version: int | None = None
    """Of the global adapter that it is, or was made from."""
    rounds: int | None = None
    """Rounds of the fleet up to then."""
    method: str = ""
    """By which the server merged; devices are not told."""
    devices: int | None = None
    """That took part, of a global adapter."""
    data: str = ""
    """What it was trained on, described: never the data."""
    losses: Mapping[str, Finite] = Field(default_factory=dict)
    """Held-out completion loss, nats per token: of `base`, `global` and `personal`."""


def write(origin: Origin, folder: Path) -> None:
    """Put the facts beside an adapter."""
    (folder / FILE).write_text(origin.model_dump_json(indent=2, exclude_defaults=True) + "\n", encoding="utf-8")


def read(folder: Path) -> Origin | None:
    """The facts beside an adapter; None where nobody wrote any.

    Raises:
        ExportError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return Origin.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ExportError(f"expected {path} as it was written; found: {reason}; export the adapter again") from error


def check(origin: Origin | None, fingerprint: str, label: str) -> None:
    """Refuse an adapter of another base; one of which no base is known passes, its layers must fit all the same.

    Args:
        origin: from `read`.
        fingerprint: of the base at hand.
        label: what it is called.

    Raises:
        FingerprintMismatchError: the adapter was trained on another base.
    """
    if origin is not None and origin.fingerprint and origin.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"this adapter belongs to the base '{origin.base}' ({origin.fingerprint[:16]}); found {label} "
            f"({fingerprint[:16]}); give its own base with --base"
        )
