"""The evaluation of a live model: the loss of completions, and how many of their tokens it would say itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edge_runtime.errors import DataError
from edge_runtime.train import heap
from edge_runtime.train.batches import pack_together
from edge_runtime.train.checkpointing import released_layers
from edge_runtime.train.data import Tokenised
from edge_runtime.train.lean import lean
from edge_runtime.train.live import LiveModel
from edge_runtime.train.loss import labelled, right_tokens, summed, unwrap


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out examples.

    Attributes:
        loss: mean over all completion tokens, in nats.
        tokens: completion tokens.
        right: those of them that the model holds most likely, given the true tokens before; None where nobody asked.
    """

    loss: float
    tokens: int
    right: int | None = None

    @property
    def accuracy(self) -> float | None:
        """The share of the completion tokens that are right."""
        return None if self.right is None else self.right / self.tokens


def evaluate(
    live: LiveModel, examples: Sequence[Tokenised], *, batch: int = 1, count_right: bool = False
) -> Evaluation:
    """The mean loss of completion tokens, each token with the same weight.

    Args:
        live: its mode (training or not) is left as it was found.
        examples: all of them are evaluated, in their order.
        batch: examples that pass through the model at once; it changes the memory, not the result.
        count_right: whether the tokens that are right are counted too, for one more product with the head.

    Raises:
        DataError: no completion token in any example.
    """
    total, tokens, right, was_training = 0.0, 0, 0, live.model.training
    causal = unwrap(live.model)
    device = causal.get_input_embeddings().weight.device
    live.model.eval()
    try:
        with torch.no_grad(), lean(causal), heap.releasing(released_layers(causal)):
            for first in range(0, len(examples), batch):
                row = pack_together(examples[first : first + batch], device)
                found = labelled(live.model, row.input_ids, row.labels, row.position_ids, row.lengths)
                total += float(summed(found).total)
                tokens += len(found.targets)
                right += right_tokens(found) if count_right else 0
                del row, found  # or they would stay until the next ones are there
                heap.release()
    finally:
        live.model.train(was_training)
    if not tokens:
        raise DataError(f"expected completion tokens to evaluate, found none in {len(examples)} examples")
    return Evaluation(total / tokens, tokens, right if count_right else None)
