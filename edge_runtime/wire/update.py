"""The making of an update, pure: from a change, what is still owed and what is asked for to the bytes that travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.errors import UnknownCodecError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import take
from edge_runtime.lora.factors import Factors, numbers_in, only
from edge_runtime.wire import allocate, codec, feedback
from edge_runtime.wire.allocate import AUTO
from edge_runtime.wire.feedback import Residual
from edge_runtime.wire.layout import Layer

TRIES = 4
"""How often `auto` may pack to learn the size; the second time is mostly the last one."""
NEAR = 0.95
"""Share of the budget with which it is content."""
HEADER_BYTES, LAYER_BYTES = 100, 10
"""What a layout takes after zstd, about."""


@dataclass(frozen=True)
class Terms:
    """What an update must be like.

    Attributes:
        codec: a codec's name, or `allocate.AUTO`.
        upload_bytes: what `auto` may use; None where the fleet does not say.
        round_bytes: as above, where the device's owner does not say; see `allocate.budget_of`.
        error_feedback: whether what the codec loses is sent later.
        sent: the factors that travel. Of another one nothing is sent, and what is owed of it stays owed.
    """

    codec: str
    upload_bytes: int | None = None
    round_bytes: int | None = None
    error_feedback: bool = True
    sent: Factors = "ab"


@dataclass(frozen=True, eq=False)
class Made:
    """An update that is ready to travel.

    Attributes:
        payload: the blob.
        sent: the change that it decodes to.
        residual: what is owed once it was accepted.
        how: the codec, for people.
    """

    payload: bytes
    sent: Adapter
    residual: Residual
    how: str


def make(
    change: Adapter,
    received: Adapter,
    owed: Residual,
    terms: Terms,
    directions: Mapping[str, tuple[int, ...]] | None = None,
) -> Made:
    """An update of this change of the slice received.

    Args:
        change: factor-wise change of the trained slice.
        received: the slice before training, or what this device holds, if its first directions are the slice.
        owed: what former updates did not deliver.
        terms: what is asked for.
        directions: layer → the numbers of the slice's directions; the first ones where a layer is not named.

    Raises:
        WireError: the change holds NaN, infinity, or a number that the codec cannot.
        UnknownCodecError: a codec that this version does not have.
    """
    numbers = {name: found for name, found in (directions or {}).items() if name in change}
    trained = Adapter({name: take(received[name], range(pair.rank)) for name, pair in change.items()})
    change = only(change, terms.sent)
    wanted = feedback.wanted(change, trained, owed, numbers) if terms.error_feedback else change
    payload, how = pack(only(wanted, terms.sent), trained, terms, numbers)
    sent = codec.decode(payload)
    residual = feedback.left(wanted, sent, trained, numbers) if terms.error_feedback else feedback.NONE
    return Made(payload, sent, residual, how)


def pack(
    change: Adapter,
    received: Adapter,
    terms: Terms,
    directions: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[bytes, str]:
    """The blob of a change of this slice, and how it was packed, for people.

    Raises:
        WireError: as `make`.
    """
    if terms.codec != AUTO:
        return codec.encode(change, terms.codec, directions, factor=terms.sent), terms.codec
    payload, how = _fitting(change, received, terms, directions or {})
    return payload, f"{terms.codec} ({how})"


def _fitting(
    wanted: Adapter, received: Adapter, terms: Terms, directions: Mapping[str, tuple[int, ...]]
) -> tuple[bytes, str]:
    """The largest blob tried that fits the budget; the smallest there is, if not even that fits."""
    budget = allocate.budget_of(numbers_in(wanted.sizes, terms.sent), (terms.upload_bytes, terms.round_bytes))
    aim, best = 0.98 * (budget - HEADER_BYTES - LAYER_BYTES * len(wanted)), None
    order = allocate.order(wanted, received)
    for _ in range(TRIES):
        payload, layers = _encoded(order, aim, directions)
        if len(payload) <= budget and (best is None or len(payload) > len(best[0])):
            best = payload, layers
        if NEAR * budget <= len(payload) <= budget:
            break
        # zstd gains more here and less there: aim where this one would have fitted.
        aim += 0.98 * budget - len(payload)
    payload, layers = best or _encoded(order, 0.0, directions)
    return payload, allocate.describe(layers)


def _encoded(
    order: allocate.Order, aim: float, directions: Mapping[str, tuple[int, ...]]
) -> tuple[bytes, tuple[Layer, ...]]:
    layers = allocate.choose(order, aim)
    return codec.encode(order.change, layers, directions), layers


def bits_up(name: str) -> float:
    """Bits of a number of an update before zstd, under a codec of the table or `auto` without a budget.

    This and `bits_down` are to be asked of the codecs that a configuration names before anything is started with them.

    Raises:
        UnknownCodecError: neither, or one that sends nothing.
    """
    return allocate.DEFAULT_BITS if name == AUTO else bits_down(name)


def bits_down(name: str) -> float:
    """The same of the global adapter, for which there is no `auto`: devices of every kind read the same bytes.

    Raises:
        UnknownCodecError: no codec of the table, or one that sends nothing.
    """
    if not (found := codec.codec(name).bits):
        raise UnknownCodecError(f"the codec '{name}' sends nothing, so nobody would learn; expected one that sends")
    return found
