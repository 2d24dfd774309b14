"""How much a device is expected to learn with a setting: the one number that the plan maximises.

    worth = Σ gain(choice), in hundredths of the loss that a round can take away

It orders settings and predicts nothing else. Each gain grows with its choice, so a plan that could raise one more
choice within its budgets is never the best. Checkpointing and the micro-batch are not in it: they change what a step
costs and not what it learns.

Source of the gains: benchmarks/what_a_choice_is_worth.py, on SmolLM2-135M, one choice changed at a time; the table is
in docs/decisions/0006. Only `held` cannot be measured on one device: its gain is that of a pilot with ten devices of
ranks 2 to 32, in which holding all of a rank of 64 let the fleet's loss fall by a tenth more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from profiles import families
from profiles.card import ModelCard
from profiles.memory import Setting

# Training the last n of all layers: the share of what all of them learn is close to a power of n / all.
LAYERS = 100.0
LAYERS_POWER = 0.38
# What is lost at rank r is close to this over r. That the rank hardly matters from 8 on, with adapters on all layers,
# is also what QLoRA found (arXiv 2305.14314, appendix A).
RANK_SHORT = 22.0
# What is lost where sequences are cut at so many tokens is close to this over their number.
LENGTH_SHORT = 720.0
# Each doubling of the rank that is held.
HELD_DOUBLED = 2.5
# What a base loses by being quantised, which no adapter of the fleet gives back as a whole.
PRECISION: Mapping[str, float] = {"nf4": 0.0, "int8": 13.8, "bf16": 14.1, "fp32": 14.1}
# Training only some of the modules that have an adapter, by their share of its parameters.
MODULES = 9.4


def worth(card: ModelCard, setting: Setting) -> float:
    """What is expected to be learnt; comparable between settings of one model only."""
    trained, targets = (
        families.numbers(card, setting.family, modules, 1, 1) for modules in (setting.trained, setting.target_modules)
    )
    return (
        LAYERS * math.pow(setting.layers_trained / card.num_layers, LAYERS_POWER)
        - RANK_SHORT / setting.rank
        - LENGTH_SHORT / setting.max_length
        + HELD_DOUBLED * math.log2(setting.held)
        + PRECISION[setting.precision]
        + MODULES * trained / targets
    )
