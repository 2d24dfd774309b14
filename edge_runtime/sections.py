"""What a section of the configuration is, and the section on personal adapters; `config` has all the others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Way = Literal["finetune", "private_factor", "two_level", "beside"]
"""How a device makes its own adapter; see `edge_runtime.ways`."""


def _listed(found: object) -> object:
    """A text is a list with commas between its names."""
    return [name for name in map(str.strip, found.split(",")) if name] if isinstance(found, str) else found


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""`["a", "b"]`, or "a, b"."""


class Section(BaseModel):
    """Frozen; a key that does not exist is an error, with the keys that do; so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Personal(Section):
    """How each device makes its own adapter of the fleet's, in `training.personal_steps` steps."""

    way: Way | None = None
    """What the fleet's method leaves its devices with, when absent: private_factor, two_level, or finetune."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """Strength of the pull back to the global adapter while it is made by `finetune` or `beside`."""
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Directions of the pair that `beside` trains; half of what the device trains of the fleet's, when absent."""
    every: Annotated[int, Field(ge=0)] = 0
    """A device also goes on with it after each so many rounds, while it waits; 0 for the end of the rounds alone."""
    rate_share: Fraction | None = None
    """Share of `training.learning_rate` that it is made at; all of it when absent, or an eighth where `fleet_schedule`
    lets the rate fall."""
    keep_better: bool = True
    """Whether a device keeps the global adapter where its own is worse on texts that neither has seen."""
