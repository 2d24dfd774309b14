"""What an onlooker of a fleet sees: messages folded into one row a device. Pure.

The demo is such an onlooker: it subscribes to the fleet's topics like anybody else and asks no process anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edge_runtime.lora.adapter import Slot
from edge_runtime.wire import topics
from edge_runtime.wire.messages import Directive, Hello, Message, Offer, Presence, Report, ungroup


@dataclass(frozen=True)
class Row:
    """One device.

    Attributes:
        client: its name.
        hello: what it said of itself, once it has.
        report: its newest report.
        online: its presence.
        updates: the newest offer of each round.
        held_out: (version, loss) of each global adapter that it evaluated; version 0 is the base.
    """

    client: str
    hello: Hello | None = None
    report: Report | None = None
    online: bool = True
    updates: tuple[Offer, ...] = ()
    held_out: tuple[tuple[int, float], ...] = ()

    @property
    def slot(self) -> Slot:
        """What it holds and trains; nothing before its hello."""
        return ungroup(self.hello.groups) if self.hello else Slot({})

    @property
    def rank(self) -> int:
        """Largest rank that it trains."""
        return max(self.slot.trained.values(), default=0)

    @property
    def held(self) -> int:
        """Largest rank that it holds."""
        return max(self.slot.held.values(), default=0)

    @property
    def layers(self) -> int:
        """How many of the model's layers it trains."""
        return len({name.split(".self_attn")[0].split(".mlp")[0] for name in self.slot.trained})


@dataclass(frozen=True)
class Board:
    """The fleet."""

    directive: Directive | None = None
    rows: Mapping[str, Row] = field(default_factory=dict)


def fold(board: Board, message: Message) -> Board:
    """The board after one more message."""
    match message:
        case Directive():
            return replace(board, directive=message)
        case Hello():
            return _with(board, replace(_row(board, message.client), hello=message))
        case Offer():
            row = _row(board, message.client)
            kept = tuple(offer for offer in row.updates if offer.round != message.round)
            return _with(board, replace(row, updates=(*kept, message)))
        case Report():
            return _with(board, _reported(_row(board, message.client), message))
        case Presence():
            return _with(board, replace(_row(board, message.client), online=message.state == "online"))
        case _:
            return board


def bytes_as_fp32(board: Board) -> int:
    """What the same exchange would take as plain fp32 adapters: slices trained up, ranks held down, round by round."""
    total = 0
    for row in board.rows.values():
        shapes = row.slot.shapes
        numbers = {
            way: sum(rank * sum(shapes[name]) for name, rank in ranks.items())
            for way, ranks in (("up", row.slot.trained), ("down", row.slot.held))
        }
        fetches = len(row.updates) + 1  # one a round, and the last version for the personal adapter
        total += 4 * (numbers["up"] * len(row.updates) + numbers["down"] * fetches)
    return total


def patterns(fleet: str) -> tuple[str, ...]:
    """What an onlooker subscribes to; not the blobs."""
    return topics.directive(fleet), topics.up(fleet, "+"), topics.status(fleet, "+")


def _row(board: Board, client: str) -> Row:
    return board.rows.get(client, Row(client))


def _with(board: Board, row: Row) -> Board:
    return replace(board, rows=dict(sorted({**board.rows, row.client: row}.items())))


def _reported(row: Row, report: Report) -> Row:
    losses = dict(row.held_out)
    if report.held_out.base is not None:
        losses[0] = report.held_out.base
    if report.held_out.merged is not None:
        losses[report.held_out.version] = report.held_out.merged
    return replace(row, report=report, held_out=tuple(sorted(losses.items())))
