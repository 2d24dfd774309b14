"""The ways from the global adapter to a device's own, as a literal table: what is held, what of it is trained. Pure.

    finetune         the slice that a round would train, from the global adapter and what is the device's own already
    private_factor   the factor that the fleet does not share, beside the fleet's other one
    two_level        the directions that are the device's own, behind those of the fleet, which stay
    beside           a pair of a rank of its own beside the whole global adapter, which stays; the sum is one adapter

The second and third follow from the method by which the fleet merges, which trains these parts in each round. A device
of any other fleet may take the first or the last, whatever its fleet does: no one else sees a difference.

Sources: finetune with a proximal pull is Ditto (Li et al., ICML 2021, arXiv 2012.04221), on products; it differs where
`every` is 0, for then it is made once. private_factor is FedSA-LoRA (arXiv 2410.01463), two_level PF2LoRA (arXiv
2503.03920), first-order; see `server.aggregators`. beside is the adapter in parallel of FedDPA (Yang et al., NeurIPS
2024, arXiv 2403.19211) without its mixing by example: its weight is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from edge_runtime.errors import ConfigError, unknown_name
from edge_runtime.lora import rebasing, slices
from edge_runtime.lora.adapter import Adapter, Pair, Slot
from edge_runtime.lora.algebra import zero
from edge_runtime.lora.factors import Factors
from edge_runtime.trainer import PersonalSpec, Training
from edge_runtime.wire.messages import Directive

FINETUNE, PRIVATE_FACTOR, TWO_LEVEL, BESIDE = "finetune", "private_factor", "two_level", "beside"
ALONE = "lora"
"""The family that has pairs and nothing else."""


@dataclass(frozen=True)
class Own:
    """What a device's own file says of its personal adapter; None where it leaves that to the fleet's."""

    way: str | None = None
    proximal: float | None = None
    rank: int | None = None
    every: int | None = None
    keep_better: bool | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """What there is to begin with.

    Attributes:
        received: the global adapter as far as the device holds it, with its private parts.
        directive: of that version.
        slot: what the device holds and trains of the fleet's.
        rank: of a pair beside; 0 for half of what is trained.
        change: what is the device's own from an earlier time, as a product; no layer where there is nothing.
    """

    received: Adapter
    directive: Directive
    slot: Slot
    rank: int
    change: Adapter

    @property
    def trained(self) -> dict[str, int]:
        """Directions trained of each layer that is trained and was received."""
        return {name: count for name, count in self.slot.trained.items() if name in self.received}


@dataclass(frozen=True, eq=False)
class Start:
    """What personal training begins with.

    Attributes:
        slices: what the model holds, and which rows of it are trained.
        factors: which factors of them.
        away: the change by which what the model holds is away from the global adapter.
    """

    slices: slices.Slices
    factors: Factors
    away: Adapter


class Way(NamedTuple):
    """One way."""

    begin: Callable[[Scene], Start]
    changed: Callable[[Scene, Start, Adapter], Adapter] | None
    """(scene, start, factor-wise change of the trained rows) → what is the device's own now, as a product; None where
    it is kept with the private part of the rounds."""


def _finetune(scene: Scene) -> Start:
    held = rebasing.carried(scene.received, scene.change) if scene.change else scene.received
    rows = {name: tuple(range(count)) for name, count in scene.trained.items()}
    return _start(scene, held, rows, rebasing.apart(held, scene.received) if scene.change else Adapter({}))


def _finetuned(scene: Scene, start: Start, moved: Adapter) -> Adapter:
    return rebasing.apart(slices.learnt(start.slices.seen, start.slices, moved), scene.received)


def _private_factor(scene: Scene) -> Start:
    rows = {name: tuple(range(count)) for name, count in scene.trained.items()}
    return _start(scene, scene.received, rows, Adapter({}), scene.directive.private or "ab")


def _two_level(scene: Scene) -> Start:
    rows = {}
    for name in scene.trained:
        rank, own = scene.received[name].rank, min(scene.directive.adapter.own, *scene.received[name].shape)
        rows[name] = tuple(range(rank - own, rank))
    return _start(scene, scene.received, rows, Adapter({}))


def _beside(scene: Scene) -> Start:
    pairs: dict[str, Pair] = {}
    for name, trained in scene.trained.items():
        shape = scene.received[name].shape
        known = scene.change.get(name, zero(shape))
        rank = min(scene.rank or max(1, trained // 2), *shape)
        pairs[name] = rebasing.of_rank(known if known.shape == shape else zero(shape), rank, f"personal:{name}")
    held = rebasing.stacked(scene.received, pairs)
    rows = {name: tuple(range(held[name].rank - pair.rank, held[name].rank)) for name, pair in pairs.items()}
    return _start(scene, held, rows, Adapter({name: pair for name, pair in pairs.items() if pair.b.any()}))


def _beside_after(scene: Scene, start: Start, moved: Adapter) -> Adapter:
    del scene
    held = slices.learnt(start.slices.seen, start.slices, moved)
    return Adapter({name: rebasing.last(held[name], len(start.slices.rows[name])) for name in moved})


def _start(
    scene: Scene, held: Adapter, rows: Mapping[str, tuple[int, ...]], away: Adapter, factors: Factors = "ab"
) -> Start:
    return Start(slices.lay_out(held, rows, scene.directive.version), factors, away)


WAYS: Mapping[str, Way] = {
    FINETUNE: Way(_finetune, _finetuned),
    PRIVATE_FACTOR: Way(_private_factor, None),
    TWO_LEVEL: Way(_two_level, None),
    BESIDE: Way(_beside, _beside_after),
}
FREE = (FINETUNE, BESIDE)
"""Those that a device may choose between for itself."""


def implied(private: str, own: int) -> str:
    """The way that a fleet's method leaves its devices with; empty where they may choose.

    Args:
        private: the factor that each device keeps, or none.
        own: directions that each device has of its own.
    """
    return PRIVATE_FACTOR if private else TWO_LEVEL if own else ""


def asked(directive: Directive, own: Own) -> PersonalSpec:
    """How this device makes its adapter: as its own file says where it says anything, else as the fleet's.

    Raises:
        ConfigError: a way that there is not, that the fleet's method does not leave open, or that has no meaning for
            its family of adapters.
    """
    chosen: dict[str, Any] = {key: value for key, value in vars(own).items() if value is not None}
    spec = directive.personal.model_copy(update=chosen)
    bound = implied(directive.private, directive.adapter.own)
    if bound and own.way not in {None, bound}:
        raise ConfigError(
            f"in this fleet a personal adapter is made by '{bound}', as its method has it; found [device] personal_way "
            f"= '{own.way}'; leave it out"
        )
    way = bound or spec.way
    if way not in WAYS:
        raise ConfigError(unknown_name("personal way", way, WAYS) + "; update this device")
    if way not in {bound, *FREE}:
        raise ConfigError(
            f"this fleet's method leaves no device with what the personal way '{way}' needs; expected one of: "
            f"{', '.join(FREE)}"
        )
    family = directive.adapter.family
    if family != ALONE and (way == BESIDE or spec.proximal):
        what = f"the personal way '{BESIDE}'" if way == BESIDE else "a personal proximal term"
        raise ConfigError(
            f"{what} needs adapters of the family '{ALONE}'; found '{family}'; leave it out of this device's file"
        )
    if way == BESIDE and directive.adapter.core:
        raise ConfigError(f"in this fleet cores are trained, beside which no pair has a place; found '{BESIDE}'")
    return spec.model_copy(update={"way": way})


def training_of(asked_for: PersonalSpec, directive: Directive, steps: int, factors: Factors) -> Training:
    """How the personal adapter is trained: as a round is, without what ties a round to others.

    Args:
        asked_for: by `asked`.
        directive: of the version.
        steps: how many.
        factors: of the start.
    """
    training = directive.training
    return training.model_copy(
        update={
            "learning_rate": asked_for.learning_rate or training.learning_rate,
            "max_steps": steps, "proximal": asked_for.proximal, "correction": 0.0, "carry_moments": False,
            "factors": factors, "kept": 1.0, "tail_penalty": 0.0,
        }
    )  # fmt: skip
