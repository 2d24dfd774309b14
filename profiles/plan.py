"""From what a device is and what a model needs to what the device will do: the plan, with a sentence for each choice.

The candidates are rungs of one ladder, enumerated best first, and the plan is the first that fits. Each rung up raises
one thing, in this order of preference:

    1. train more layers, counted from the last one, at the smallest rank on offer
    2. hold more of the global adapter than is trained, up to the server's rank
    3. raise the trained rank, up to 8
    4. stop checkpointing, which costs a quarter to a third of the speed; and raise the rank beyond 8:
       whichever of the two needs less memory comes first
    5. a larger micro-batch, up to the batch

All layers come before rank, and rank 8 is held to be enough, because with adapters on all layers the rank hardly
changes the result (Dettmers et al., QLoRA, arXiv 2305.14314, section 4 and appendix A). A larger budget lets every rung
fit that fitted before, so it never gives a smaller plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from edge_runtime.errors import ConfigError, PlanError, unknown_name
from profiles.card import ModelCard
from profiles.device import MIB, DeviceProfile, Row, shown
from profiles.memory import PRECISIONS, MemoryEstimate, Setting, estimate
from profiles.records import checked

RANK_ENOUGH = 8


@dataclass(frozen=True)
class Budgets:
    """What the owner of the device allows.

    Attributes:
        memory_bytes: peak of the training process; None for all that the device can bear.
    """

    memory_bytes: int | None = None


class PlannedLayer(NamedTuple):
    """What the plan means for one layer: the arguments of `edge_runtime.lora.adapter.LayerSlot`, in its order."""

    d_out: int
    d_in: int
    held: int
    trained: int


@dataclass(frozen=True)
class Plan:
    """How this device trains this model.

    Attributes:
        rank: directions trained in each target of each trained layer.
        held: directions of the global adapter held in each target of every layer.
        layers_trained: the last so many layers are trained.
        precision: of the base's linear weights: nf4, bf16 or fp32.
        compute_dtype: bf16 or fp32.
        micro_batch: sequences per forward pass.
        gradient_accumulation_steps: forward passes per optimiser step.
        max_length: tokens per sequence.
        gradient_checkpointing: recompute each trained layer in the backward pass.
        threads: of torch.
        predicted_peak_bytes: of the training process.
        reasons: field → one sentence.
    """

    rank: int
    held: int
    layers_trained: int
    precision: str
    compute_dtype: str
    micro_batch: int
    gradient_accumulation_steps: int
    max_length: int
    gradient_checkpointing: bool
    threads: int
    predicted_peak_bytes: int
    reasons: Mapping[str, str]

    def layers(self, card: ModelCard, target_modules: Sequence[str]) -> dict[str, PlannedLayer]:
        """Layer name → what is held and trained there: held in every layer, trained in the last `layers_trained`.

        `Slot({name: LayerSlot(*layer) for name, layer in plan.layers(card, targets).items()})` is what the server must
        know; it is built where both rooms may be seen.

        Raises:
            BaseModelError: a target module that the model does not have.
        """
        first = card.num_layers - self.layers_trained
        return {
            card.layer_name(index, module): PlannedLayer(
                *card.shape(module), self.held, self.rank if index >= first else 0
            )
            for index in range(card.num_layers)
            for module in target_modules
        }

    def setting(self, target_modules: Sequence[str]) -> Setting:
        """What the memory and speed predictions take."""
        shared = {entry.name for entry in fields(Setting)} & {entry.name for entry in fields(self)}
        return Setting(target_modules=tuple(target_modules), **{name: getattr(self, name) for name in shared})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal plan."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ConfigError: keys are missing or unknown.
        """
        return cls(**checked("plan", data, (entry.name for entry in fields(cls))))


def plan(  # noqa: PLR0913 - each argument is one decision of the fleet or the owner; a bag of them would hide that
    profile: DeviceProfile,
    card: ModelCard,
    *,
    target_modules: Sequence[str],
    rank_choices: Sequence[int],
    held_limit: int,
    max_length: int,
    batch_size: int,
    budgets: Budgets | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> Plan:
    """The best plan that fits; the same arguments always give the same plan.

    Args:
        profile: the device.
        card: the base model.
        target_modules: suffixes of the modules that get an adapter.
        rank_choices: ranks that the fleet offers; those above `held_limit` are left out.
        held_limit: the server's rank: more than this there is not to hold.
        max_length: tokens per sequence.
        batch_size: sequences per optimiser step.
        budgets: what the owner allows.
        threads: of torch; None for one per usable core.
        precision: of the base's linear weights; None for nf4 where it works here, else the compute type.

    Raises:
        PlanError: not even the smallest plan fits (says how many MiB are missing), or the memory is unknown.
        ConfigError: no rank on offer, or a size that is not positive.
        BaseModelError: a target module that the model does not have.
    """
    ranks = sorted({rank for rank in rank_choices if 0 < rank <= held_limit})
    if not ranks or not target_modules or min(max_length, batch_size) < 1:
        raise ConfigError(
            f"a plan needs ranks between 1 and {held_limit}, target modules, a length and a batch; found ranks "
            f"{list(rank_choices)}, modules {list(target_modules)}, length {max_length}, batch {batch_size}"
        )
    compute_dtype = "bf16" if profile.bf16_is_fast else "fp32"
    lowest = Setting(
        target_modules=tuple(target_modules),
        rank=ranks[0],
        held=ranks[0],
        layers_trained=1,
        precision=_precision(profile, precision, compute_dtype),
        compute_dtype=compute_dtype,
        max_length=max_length,
    )
    budget, source = _budget(profile, budgets or Budgets())
    ladder = tuple(_ladder(card, lowest, ranks, held_limit, _divisors(batch_size), profile.pool))
    better: Setting | None = None
    for setting in ladder:
        found = estimate(card, setting, profile.pool)
        if found.total <= budget:
            choice = _Choice(setting, found, better, ladder[0], budget, source, batch_size // setting.micro_batch)
            return _plan(profile, card, choice, threads, forced=precision is not None)
        better = setting
    raise _nothing_fits(card, lowest, profile.pool, budget, source)


def rows(plan: Plan) -> tuple[Row, ...]:
    """The plan as lines for people, in the order of its fields."""
    return tuple(
        Row(
            entry.name.removesuffix("_bytes").replace("_", " "),
            shown(getattr(plan, entry.name), "bytes" if entry.name.endswith("_bytes") else ""),
            plan.reasons[entry.name],
        )
        for entry in fields(plan)
        if entry.name != "reasons"
    )


class _Choice(NamedTuple):
    """The rung that fits, the one above it that does not, and what they were held against."""

    setting: Setting
    estimate: MemoryEstimate
    better: Setting | None
    best: Setting
    budget: int
    source: str
    accumulation: int


def _ladder(
    card: ModelCard, lowest: Setting, ranks: Sequence[int], held_limit: int, batches: Sequence[int], pool: str
) -> Iterator[Setting]:
    """The candidates, best first; the module's docstring explains the order."""
    every = replace(lowest, layers_trained=card.num_layers)
    held = replace(every, held=held_limit)
    modest = [rank for rank in ranks if rank <= RANK_ENOUGH] or ranks[:1]
    high = [rank for rank in ranks if rank > modest[-1]]
    enough, most = replace(held, rank=modest[-1]), replace(held, rank=ranks[-1])
    free = replace(enough, gradient_checkpointing=False)
    speed_first = estimate(card, free, pool).total <= estimate(card, most, pool).total
    above = free if speed_first else enough

    yield from (replace(most, gradient_checkpointing=False, micro_batch=size) for size in reversed(batches))
    if not speed_first:
        yield most
    yield from (replace(above, rank=rank) for rank in reversed(high))
    if speed_first:
        yield free
    yield from (replace(held, rank=rank) for rank in reversed(modest))
    yield from (replace(every, held=size) for size in _doublings(ranks[0], held_limit))
    for count in range(card.num_layers, 0, -1):
        # With short sequences checkpointing saves nothing: then the faster of the two is also the smaller.
        yield replace(lowest, layers_trained=count, gradient_checkpointing=False)
        yield replace(lowest, layers_trained=count)


def _doublings(low: int, high: int) -> list[int]:
    """Low, 2·low, 4·low … below high; largest first."""
    sizes = [low]
    while sizes[-1] * 2 < high:
        sizes.append(sizes[-1] * 2)
    return sizes[::-1]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _budget(profile: DeviceProfile, budgets: Budgets) -> tuple[int, str]:
    if budgets.memory_bytes is not None:
        return budgets.memory_bytes, "the budget given"
    if "memory_bearable_bytes" in profile.unreadable:
        raise PlanError(
            f"how much memory {profile.name} can bear is unknown ({profile.unreadable['memory_bearable_bytes']}); "
            "give a memory budget"
        )
    return profile.memory_bearable_bytes, "what the device can bear"


def _precision(profile: DeviceProfile, wanted: str | None, compute_dtype: str) -> str:
    if wanted is None:
        return "nf4" if profile.four_bit else compute_dtype
    if wanted not in PRECISIONS:
        raise ConfigError(unknown_name("precision", wanted, PRECISIONS))
    return wanted


def _plan(profile: DeviceProfile, card: ModelCard, choice: _Choice, threads: int | None, *, forced: bool) -> Plan:
    setting = choice.setting
    cores = max(1, min(profile.usable_cores, profile.physical_cores))
    return Plan(
        rank=setting.rank,
        held=setting.held,
        layers_trained=setting.layers_trained,
        precision=setting.precision,
        compute_dtype=setting.compute_dtype,
        micro_batch=setting.micro_batch,
        gradient_accumulation_steps=choice.accumulation,
        max_length=setting.max_length,
        gradient_checkpointing=setting.gradient_checkpointing,
        threads=threads or cores,
        predicted_peak_bytes=choice.estimate.total,
        reasons={
            **_reasons(profile, card, choice),
            "precision": "as asked for" if forced else _explained(profile, "four_bit"),
            "threads": "as asked for" if threads else "one per usable core; hardware threads add nothing here",
        },
    )


def _reasons(profile: DeviceProfile, card: ModelCard, choice: _Choice) -> dict[str, str]:
    setting = choice.setting
    size = f"{choice.budget / MIB:.0f} MiB ({choice.source})"
    return {
        "rank": _raised(profile, card, choice, "rank"),
        "held": _raised(profile, card, choice, "held"),
        "layers_trained": _raised(profile, card, choice, "layers_trained"),
        "compute_dtype": _explained(profile, "bf16_is_fast"),
        "micro_batch": _raised(profile, card, choice, "micro_batch"),
        "gradient_accumulation_steps": f"makes a batch of {setting.micro_batch * choice.accumulation} sequences",
        "max_length": "as the fleet asks for",
        "gradient_checkpointing": _raised(profile, card, choice, "gradient_checkpointing"),
        "predicted_peak_bytes": f"of {size}: {choice.estimate.describe()}",
    }


def _raised(profile: DeviceProfile, card: ModelCard, choice: _Choice, field: str) -> str:
    """Why a field that the ladder raises stands where it stands."""
    setting, better = choice.setting, choice.better
    if better is None or getattr(setting, field) == getattr(choice.best, field):
        return _AT_BEST[field]
    needed = f"{estimate(card, better, profile.pool).total / MIB:.0f} MiB of {choice.budget / MIB:.0f} MiB"
    change = _difference(setting, better)
    if getattr(better, field) != getattr(setting, field):
        return f"one step more ({change}) needs {needed}"
    return f"is raised only after the next step, {change}, which needs {needed}"


_AT_BEST: Mapping[str, str] = {
    "rank": "the largest rank on offer",
    "held": "all that the server has",
    "layers_trained": "all layers of the model",
    "micro_batch": "the whole batch in one pass",
    "gradient_checkpointing": "off: all activations fit, and recomputing costs a quarter to a third of the speed",
}


def _difference(setting: Setting, better: Setting) -> str:
    """What the better setting changes, such as "rank 8 → 16"."""
    names = [entry.name for entry in fields(Setting)]
    changes = [(name, getattr(setting, name), getattr(better, name)) for name in names]
    return ", ".join(f"{name.replace('_', ' ')} {old} → {new}" for name, old, new in changes if old != new)


def _explained(profile: DeviceProfile, field: str) -> str:
    return profile.reasons.get(field) or profile.unreadable[field]


def _nothing_fits(card: ModelCard, lowest: Setting, pool: str, budget: int, source: str) -> PlanError:
    sizes = (lowest, replace(lowest, gradient_checkpointing=False))
    least = min((estimate(card, setting, pool) for setting in sizes), key=lambda found: found.total)
    missing = -(-(least.total - budget) // MIB)
    return PlanError(
        f"{missing} MiB are missing: the smallest plan for {card.name} (the last layer, rank {lowest.rank}, "
        f"{lowest.max_length} tokens, {lowest.precision}) needs {least.total / MIB:.0f} MiB, and {source} is "
        f"{budget / MIB:.0f} MiB; free memory or raise the limit, or choose shorter sequences or a smaller base model "
        f"(most of it: {least.describe(3)})"
    )
