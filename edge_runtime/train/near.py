"""The terms beside the loss that a round asks for: which of `terms`, about what."""

from __future__ import annotations

from edge_runtime.lora.adapter import Adapter
from edge_runtime.train import drift, resume
from edge_runtime.train.receiving import Received
from edge_runtime.train.terms import Term, proximal, push, tail
from edge_runtime.trainer import Training


def terms_of(
    training: Training,
    received: Received,
    start: resume.RoundState | None,
    scaling: float,
    away: Adapter | None = None,
) -> list[Term]:
    """What holds a device near its fleet.

    A personal adapter P may begin away from the global one G, and is to be pulled to G. With S the slice that is
    trained and S₀ that slice at the beginning, μ/2 ‖P - G‖² has the gradient of μ/2 ‖S - S₀‖² + μ ⟨P₀ - G, S⟩.

    Args:
        training: what is asked for.
        received: what training begins with.
        start: its state, of an earlier round or of this one.
        scaling: of the live model.
        away: P₀ - G, of the layers where there is any.
    """
    found = [tail(training.kept, training.tail_penalty, scaling)] if training.tail_penalty else []
    if training.proximal:
        found.append(proximal(received.before, training.proximal, scaling))
        if away:
            trained = {name: pair for name, pair in away.items() if name in received.before}
            found.append(push(trained, training.proximal, scaling))
    direction = drift.pushes(start.beside) if start is not None else {}
    if training.correction and direction:
        found.append(push(direction, training.correction, scaling))
    return found
