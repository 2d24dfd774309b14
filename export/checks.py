"""What several formats ask of a subject before they write it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_runtime.errors import ExportError
from edge_runtime.lora.dense import is_dense
from export.subject import Subject

if TYPE_CHECKING:
    # Its module imports torch, and whoever writes an adapter alone has none.
    from edge_runtime.train.base import PreparedBase


def base_of(subject: Subject) -> PreparedBase:
    """The base model of a subject.

    Raises:
        ExportError: there is none.
    """
    if subject.prepared is None:
        raise ExportError("this format depends on the base model; found none; give it with --base")
    return subject.prepared


def only_pairs(subject: Subject, form: str) -> None:
    """The adapter is made of low-rank pairs, and has a direction.

    Args:
        subject: what leaves.
        form: what holds pairs alone, for people.

    Raises:
        ExportError: it is more than pairs (names what), or nothing.
    """
    if beyond := [name for name in subject.adapter if is_dense(name)]:
        raise ExportError(
            f"{form} holds low-rank pairs alone; found '{beyond[0]}' ({len(beyond)} such tensors of the family "
            f"'{subject.family}'); export the adapter as native, or as peft or merged where they have the family"
        )
    if not any(subject.adapter.ranks.values()):
        raise ExportError("expected an adapter with at least one direction, found none; train it first")
