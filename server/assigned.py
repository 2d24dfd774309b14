"""Whether an update is of the layers and ranks that its device said hello with. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.wire.messages import LayerGroup, Offer, ungroup

Sizes = Mapping[str, tuple[int, int, int]]
"""Layer → (d_out, d_in, rank)."""


def check(offer: Offer, sizes: Sizes, plans: Sequence[tuple[LayerGroup, ...]], *, uniform: bool) -> None:
    """Refuse an update that is not of a plan of its device.

    Of a former plan is an update whose device planned anew, and started again, while it was on its way. A gateway's
    increment is of whichever layers its devices train, at whichever rank is worth sending.

    Args:
        offer: whose.
        sizes: of its layers.
        plans: of its device, the latest first.
        uniform: whether every layer trains the rank of the plan. Otherwise ranks are shared out by the device, and
            none is more than what it holds.

    Raises:
        CorruptPayloadError: it has a layer too many or too few, or another rank than assigned.
    """
    if offer.kind == "increment":
        return
    problems = [_problem(sizes, plan, uniform=uniform) for plan in plans]
    if all(problems):
        raise CorruptPayloadError(f"the update of '{offer.client}' {problems[0]}; say hello with another plan first")


def _problem(sizes: Sizes, plan: tuple[LayerGroup, ...], *, uniform: bool) -> str:
    slot = ungroup(plan)
    trained = slot.trained
    odd = sorted(set(trained) ^ set(sizes))
    if odd:
        name = odd[0]
        return f"has a layer '{name}' that its plan does not train" if name in sizes else f"lacks its layer '{name}'"
    for name, rank in trained.items():
        found, most = sizes[name][2], rank if uniform else max(rank, slot.held[name])
        if found > most or (uniform and found != rank):
            return f"has rank {found} in layer '{name}', where its plan has {rank}"
    return ""
