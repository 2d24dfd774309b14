"""Boards as an onlooker of a fleet comes to see them."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.demo.board import Board, fold
from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.wire.messages import Losses, Message, Presence, group
from tests.runtime import said

LAYERS = 3


def slot(held: int, trained: int, layers: int = LAYERS) -> Slot:
    """A projection of attention and one of the MLP in each of three layers; the last so many are trained."""
    return Slot(
        {
            f"model.layers.{index}.{module}": LayerSlot(8, 6, held, trained if index >= LAYERS - layers else 0)
            for index in range(LAYERS)
            for module in ("self_attn.q_proj", "mlp.up_proj")
        }
    )


def life(
    name: str, *, rank: int = 2, layers: int = LAYERS, rounds: int = 2, personal: float | None = 1.0
) -> list[Message]:
    """All that a device says from its hello to its end: its losses fall from 4 by a half in each round."""
    messages: list[Message] = [
        Presence(client=name, state="online"),
        said.hello(name, groups=group(slot(2 * rank, rank, layers)), precision="nf4"),
    ]
    for number in range(1, rounds + 1):
        losses = Losses(base=4.0, merged=None if number == 1 else 4.5 - 0.5 * number, version=number - 1)
        messages += [
            said.report(name, "training", step=1, steps=2, loss=3.0, held_out=losses),
            said.offer(name, number),
        ]
    losses = Losses(base=4.0, merged=4.0 - 0.5 * rounds, version=rounds, personal=personal)
    messages.append(
        said.report(
            name, "done", held_out=losses, bytes_up=1000, bytes_down=3000, peak_bytes=500 << 20,
            export_max_logit_diff=1e-6,
        )
    )  # fmt: skip
    return [*messages, Presence(client=name, state="offline")]


def board_of(lives: Mapping[str, list[Message]]) -> Board:
    """The board after all that these devices have said."""
    board = Board()
    for messages in lives.values():
        for message in messages:
            board = fold(board, message)
    return board
