"""A model of transformers as an engine, wrapped by PEFT or not, that computes in float32 whatever it is kept in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from edge_runtime.train.generate import answering, generate
from export.float32 import in_float32
from export.subject import Logits


@dataclass(eq=False)
class TorchEngine:
    """A model of transformers; see `export.subject.Engine`."""

    model: Any

    def logits(self, tokens: Sequence[int]) -> Logits:
        """(len(tokens), vocabulary), float32; of virtual tokens, which PEFT puts first, none."""
        with answering(self.model), in_float32(self.model):
            found = self.model(input_ids=self._row(tokens)).logits[0, -len(tokens) :]
            rows: Logits = found.float().cpu().numpy()
        return rows

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens; one that would end an answer is gone on from like any other."""
        with in_float32(self.model):
            if not getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
                return list(generate(self.model, [tokens], stop=(), max_new_tokens=count)[0])
            # Virtual tokens belong to PEFT's wrapper, which only its own way of generating asks for them.
            with answering(self.model) as causal:
                causal.generation_config = GenerationConfig(do_sample=False, max_new_tokens=count)
                row = self._row(tokens)
                found = self.model.generate(input_ids=row, attention_mask=torch.ones_like(row))[0, len(tokens) :]
        return [int(token) for token in found]

    def close(self) -> None:
        """Forget the model."""
        self.model = None

    def _row(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], device=self.model.get_input_embeddings().weight.device)
