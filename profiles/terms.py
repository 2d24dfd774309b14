"""What a plan is made under: what the fleet asks for, what the owner allows, what somebody insists on."""

from __future__ import annotations

from dataclasses import dataclass, fields

from edge_runtime.errors import ConfigError, unknown_name
from profiles.memory import COMPUTE_DTYPES, PRECISIONS, TRAINED_BYTES


@dataclass(frozen=True)
class Task:
    """What the fleet asks for.

    Attributes:
        target_modules: suffixes of the modules with an adapter, such as q_proj.
        max_rank: largest rank that a device may train.
        max_held: largest rank that a device may hold: that of the global adapter.
        max_length: tokens of an example, at most.
        batch_size: examples of one optimiser step.
        steps: optimiser steps of a round.
        hold_more: whether a device may hold directions that it does not train.
        beside: directions of the global adapter that a device holds in any case, beside those that it trains.
        bits_up: bits of a number in an update, before it is compressed.
        bits_down: the same for the global adapter.
        copies: of the trained numbers in float32 that terms beside the loss need; see `profiles.memory.Setting`.
        family: of the adapter; a name in `profiles.families.FAMILIES`.
        regained: directions of what a quantised base lost; see `profiles.memory.Setting`.
    """

    target_modules: tuple[str, ...]
    max_rank: int
    max_held: int
    max_length: int
    batch_size: int
    steps: int
    hold_more: bool = True
    bits_up: float = 8.0
    bits_down: float = 8.0
    copies: int = 0
    family: str = "lora"
    beside: int = 0
    regained: int = 0

    def __post_init__(self) -> None:
        for name in ("max_rank", "max_held", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a plan needs {name} of at least 1; found {getattr(self, name)}")
        if self.steps < 0 or min(self.bits_up, self.bits_down) <= 0:
            raise ConfigError(f"a plan needs steps of at least 0 and a positive number of bits; found {self}")
        if not self.target_modules or len(set(self.target_modules)) != len(self.target_modules):
            raise ConfigError(f"a plan needs different target modules, at least one; found {self.target_modules}")
        if self.max_held < self.max_rank:
            raise ConfigError(f"a device holds what it trains: expected max_held >= {self.max_rank}, its max_rank")


@dataclass(frozen=True)
class Budgets:
    """What the owner of the device allows.

    Attributes:
        memory_bytes: peak of the training process; None for all that the device can bear.
        round_seconds: training time of a round; None for as long as it takes.
        round_bytes: what a round may move over the link, both ways; None for as much as there is.
    """

    memory_bytes: int | None = None
    round_seconds: float | None = None
    round_bytes: int | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and value <= 0:
                raise ConfigError(f"a budget of {entry.name} is positive; found {value}")


@dataclass(frozen=True)
class Overrides:
    """Choices that somebody made instead of the plan; None leaves a choice to it. Fields as in `Plan`."""

    rank: int | None = None
    held: int | None = None
    layers_trained: int | None = None
    precision: str | None = None
    compute_dtype: str | None = None
    product_dtype: str | None = None
    trained_modules: tuple[str, ...] | None = None
    max_length: int | None = None
    micro_batch: int | None = None
    gradient_checkpointing: bool | None = None
    recomputed_layers: int | None = None
    optimizer: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "held", "layers_trained", "max_length", "micro_batch", "recomputed_layers", "threads"):
            value, least = getattr(self, name), int(name != "recomputed_layers")
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} is a whole number of at least {least}; found {value!r}")
        named = (
            ("precision", PRECISIONS),
            ("compute_dtype", COMPUTE_DTYPES),
            ("product_dtype", COMPUTE_DTYPES),
            ("optimizer", TRAINED_BYTES),
        )
        for name, known in named:
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(unknown_name(name.replace("_", " "), str(value), known))
        if self.rank and self.held and self.held < self.rank:
            raise ConfigError(f"a device holds what it trains: found held {self.held} below rank {self.rank}")
        count, checkpointing = self.recomputed_layers, self.gradient_checkpointing
        if None not in (count, checkpointing) and bool(count) != checkpointing:
            raise ConfigError(
                f"recomputed_layers {count} contradicts gradient_checkpointing {str(checkpointing).lower()}; "
                "leave one of them out"
            )

    @property
    def given(self) -> dict[str, object]:
        """Those that somebody made."""
        return {
            entry.name: getattr(self, entry.name) for entry in fields(self) if getattr(self, entry.name) is not None
        }
