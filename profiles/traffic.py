"""What a round moves over the link of a device, as a plan counts it."""

from __future__ import annotations

from functools import partial

from profiles import families
from profiles.card import ModelCard
from profiles.memory import Setting
from profiles.terms import Task


def round_bytes(card: ModelCard, task: Task, setting: Setting) -> int:
    """What a round moves: the trained directions up, the held ones down, before compression."""
    numbers = partial(families.numbers, card, setting.family)
    up = numbers(setting.trained, setting.rank, setting.layers_trained) * task.bits_up
    down = numbers(setting.target_modules, setting.held, card.num_layers) * task.bits_down
    return int((up + down) / 8)
