"""How much a device is expected to learn with a setting: the one number that the plan maximises.

    worth = Σ gain(choice), in hundredths of the loss that a round can take away

It orders settings and predicts nothing else. Each gain grows with its choice, so a plan that could raise one more
choice within its budgets is never the best. Checkpointing and the micro-batch are not in it: they change what a step
costs and not what it learns.

Source of the gains: benchmarks/what_a_choice_is_worth.py, on SmolLM2-135M, one choice changed at a time; the table is
in docs/decisions/0006. Only `held` cannot be measured on one device: its gain is that of the pilot in the design of the
merge (ten devices, ranks 2 to 32), where holding all instead of what is trained was worth as much as five more rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from profiles.card import ModelCard
from profiles.memory import Setting

# Training the last n of all layers: the share of what all of them learn is close to a power of n / all.
LAYERS = 60.0
LAYERS_POWER = 0.35
# Each doubling of the trained rank. The published result is that rank hardly matters with adapters everywhere (QLoRA,
# arXiv 2305.14314, appendix A): it is worth less than anything else, and still something.
RANK_DOUBLED = 1.0
# Each doubling of the rank that is held.
HELD_DOUBLED = 4.0
# What is lost by quantising the base, which no adapter of the fleet gives back as a whole.
PRECISION: Mapping[str, float] = {"nf4": 0.0, "int8": 9.0, "bf16": 10.0, "fp32": 10.0}
# Training only some of the modules that have an adapter, by their share of its parameters.
MODULES = 8.0
# Each doubling of the sequence: what is cut away cannot be learnt.
LENGTH_DOUBLED = 12.0


def worth(card: ModelCard, setting: Setting) -> float:
    """What is expected to be learnt; comparable between settings of one model only."""
    trained = card.rank_parameters(setting.trained) / card.rank_parameters(setting.target_modules)
    return (
        LAYERS * math.pow(setting.layers_trained / card.num_layers, LAYERS_POWER)
        + RANK_DOUBLED * math.log2(setting.rank)
        + HELD_DOUBLED * math.log2(setting.held)
        + PRECISION[setting.precision]
        + MODULES * trained
        + LENGTH_DOUBLED * math.log2(setting.max_length)
    )
