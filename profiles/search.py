"""The best setting within three budgets: memory, seconds and bytes of a round.

What is learnt comes first (`worth`): the largest sum that fits, over precision, ranks, modules and length, with as many
layers as fit each of these. Speed comes second: of the ways to train that setting, which differ in micro-batch and in
the type of products and each recompute as few layers as fit, the leanest of those that are within a twentieth of the
fastest. 8-bit AdamW is slow without a kernel of its own, so it is taken only where nothing else lets a setting fit. A
larger budget admits every setting that a smaller one admits, so it never gives a plan that is worth less. The same
arguments give the same setting.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from edge_runtime.errors import ConfigError, PlanError, unknown_name
from profiles import families
from profiles.card import ModelCard
from profiles.device import DeviceProfile
from profiles.memory import TRAINED_BYTES, Setting, estimate
from profiles.speed import measured, seconds_per_step
from profiles.terms import Budgets, Overrides, Task
from profiles.traffic import round_bytes
from profiles.worth import worth

RANKS = (2, 4, 8, 16, 32, 64)
# A shorter sequence is a last resort: what is cut off is not learnt.
SHORTEST = 32
# The two modules that the first publication of LoRA adapted; where memory is short, they alone.
FEW_MODULES = ("q_proj", "v_proj")
# Of two ways that are equally fast, the leaner one.
EQUALLY_FAST = 1.05


@dataclass(frozen=True)
class Options:
    """What there is to choose from, each best first; `layers` ascending."""

    precisions: tuple[str, ...]
    compute_dtype: str
    product_dtypes: tuple[str, ...]
    """In which linear layers may multiply, the faster one first."""
    ranks: tuple[int, ...]
    held: tuple[int, ...]
    layers: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...]
    lengths: tuple[int, ...]
    micro_batches: tuple[int, ...]
    optimizers: tuple[str, ...]
    checkpointing: bool | None
    """Whether all trained layers are recomputed, or none; None where it is open how many."""
    recomputed: int | None
    """The number that somebody insists on."""


@dataclass(frozen=True)
class Limits:
    """The three budgets, and where the first comes from; None for none."""

    memory: int
    source: str
    seconds: float | None = None
    moved: int | None = None


@dataclass(frozen=True)
class Problem:
    """All that a choice depends on."""

    profile: DeviceProfile
    card: ModelCard
    task: Task
    limits: Limits
    options: Options


@dataclass(frozen=True)
class Cost:
    """What a setting takes: peak bytes, seconds of a round (None where nothing was measured), bytes of a round."""

    memory: int
    seconds: float | None
    moved: int


def options(profile: DeviceProfile, card: ModelCard, task: Task, overrides: Overrides) -> Options:
    """What there is to choose from on this device.

    Raises:
        ConfigError: an override that the fleet, the model or the device does not allow.
        BaseModelError: a target module that the model does not have.
    """
    families.numbers(card, task.family, task.target_modules, 1, 1)
    compute = overrides.compute_dtype or _compute_dtype(profile, overrides)
    ranks = sorted({*(rank for rank in RANKS if rank < task.max_rank), task.max_rank}, reverse=True)
    held = sorted({*ranks, *_doublings(task.max_held), task.max_held}, reverse=True)
    lengths = [task.max_length]
    while lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    few = tuple(name for name in task.target_modules if name in FEW_MODULES)
    modules = [task.target_modules, *([few] if few and few != task.target_modules else [])]
    recomputed = overrides.recomputed_layers
    # What is trained before the first layer is reached through all of them.
    fewest = card.num_layers if families.family(task.family).modules == "embedding" else 1
    layers = _one(
        "layers_trained", overrides.layers_trained, range(fewest, card.num_layers + 1), fewest, card.num_layers
    )
    if recomputed is not None:
        _one("recomputed_layers", recomputed, (), 0, max(layers))
    batches = [size for size in range(task.batch_size, 0, -1) if task.batch_size % size == 0]
    return Options(
        precisions=_precisions(profile, compute, overrides.precision),
        compute_dtype=compute,
        product_dtypes=_product_dtypes(profile, compute, overrides.product_dtype),
        ranks=_one("rank", overrides.rank, ranks, 1, task.max_rank),
        held=_one("held", overrides.held, held, 1, task.max_held),
        layers=tuple(count for count in layers if count >= (recomputed or 0)),
        modules=_modules(overrides.trained_modules, modules, task),
        lengths=_one("max_length", overrides.max_length, lengths, 1, task.max_length),
        micro_batches=_one("micro_batch", overrides.micro_batch, batches, 1, task.batch_size),
        optimizers=_optimizers(profile, overrides.optimizer),
        checkpointing=overrides.gradient_checkpointing,
        recomputed=recomputed,
    )


def limits(profile: DeviceProfile, budgets: Budgets) -> Limits:
    """The budgets of this device.

    Raises:
        PlanError: what the device can bear could not be read, and no budget is given.
    """
    if budgets.memory_bytes is not None:
        return Limits(budgets.memory_bytes, "the budget given", budgets.round_seconds, budgets.round_bytes)
    if "memory_bearable_bytes" in profile.unreadable:
        raise PlanError(
            f"how much memory {profile.name} can bear is unknown ({profile.unreadable['memory_bearable_bytes']}); "
            "give a memory budget"
        )
    return Limits(profile.memory_bearable_bytes, "what the device can bear", budgets.round_seconds, budgets.round_bytes)


def best(problem: Problem) -> Setting | None:
    """The setting that is worth most, in the way that trains it fastest; None where nothing fits."""
    found: Setting | None = None
    most = float("-inf")
    for setting in _combinations(problem):
        if worth(problem.card, setting) <= most:
            continue  # all layers are its best case
        layers = _most_layers(problem, setting)
        if layers is None:
            continue
        candidate = replace(setting, layers_trained=layers)
        if worth(problem.card, candidate) > most:
            found, most = candidate, worth(problem.card, candidate)
    return None if found is None else fastest(problem, found)


def fastest(problem: Problem, setting: Setting) -> Setting:
    """The way to train a setting that fits and is fastest; the leanest of those that are nearly so.

    An optimiser is considered only where none before it fits.
    """
    costs = [(way, cost(problem, way)) for way in ways(problem, setting)]
    fitting = [(way, taken) for way, taken in costs if fits(problem, taken)]
    fitting = [(way, taken) for way, taken in fitting if way.optimizer == fitting[0][0].optimizer]
    if all(taken.seconds is None for _, taken in fitting):
        # Nothing was measured: recomputing is the slowest of all, and large passes are seldom slower.
        return min(fitting, key=lambda pair: (pair[0].recomputed, -pair[0].micro_batch))[0]
    quickest = min(taken.seconds or 0.0 for _, taken in fitting)
    near = [(way, taken) for way, taken in fitting if (taken.seconds or 0.0) <= EQUALLY_FAST * quickest]
    return min(near, key=lambda pair: (pair[1].memory, pair[1].seconds))[0]


def leanest(problem: Problem, setting: Setting) -> tuple[Setting, Cost]:
    """The way to train a setting that takes least memory, and what it takes."""
    return min(((way, cost(problem, way)) for way in _lean_ways(problem, setting)), key=lambda pair: pair[1].memory)


def smallest(problem: Problem) -> Setting:
    """The setting that takes least memory of all on offer."""
    choices = problem.options
    candidates = (
        replace(
            _setting(problem, precision, min(choices.ranks), modules, min(choices.lengths)),
            layers_trained=min(choices.layers),
        )
        for precision in choices.precisions
        for modules in choices.modules
    )
    return min((leanest(problem, setting) for setting in candidates), key=lambda pair: pair[1].memory)[0]


def ways(problem: Problem, setting: Setting) -> Iterator[Setting]:
    """The ways to train a setting, one for each optimiser and micro-batch: what is learnt is the same.

    Each recomputes as few layers as fit into memory, which is its fastest; where none fits, it is its leanest.
    """
    return (_fewest_recomputed(problem, way) for way in _passes(problem, setting))


def recomputable(problem: Problem, setting: Setting) -> Sequence[int]:
    """How many layers may be recomputed: ascending, each leaner and slower than the one before.

    Keeping all of the last layer costs nothing (see `profiles.memory.estimate`), so nobody recomputes it unasked.
    """
    choices, layers = problem.options, setting.layers_trained
    if choices.recomputed is not None:
        return (min(choices.recomputed, layers),)
    if choices.checkpointing is not None:
        return (layers if choices.checkpointing else 0,)
    return range(layers)


def recomputing(setting: Setting, count: int) -> Setting:
    """The setting with so many layers recomputed."""
    return replace(setting, gradient_checkpointing=count > 0, recomputed_layers=count)


def cost(problem: Problem, setting: Setting) -> Cost:
    """What a setting takes on this device."""
    task, profile, card = problem.task, problem.profile, problem.card
    seconds = None
    if measured(profile, setting):
        accumulation = -(-task.batch_size // setting.micro_batch)
        seconds = task.steps * seconds_per_step(profile, card, setting, accumulation)
    return Cost(estimate(card, setting, profile.pool).total, seconds, round_bytes(card, task, setting))


def fits(problem: Problem, taken: Cost) -> bool:
    """Whether a cost is within all three budgets; time that nobody measured is not held against it."""
    within = problem.limits
    return (
        taken.memory <= within.memory
        and _in_time(problem, taken)
        and (within.moved is None or taken.moved <= within.moved)
    )


def _fits_somehow(problem: Problem, setting: Setting) -> bool:
    within = problem.limits
    if within.moved is not None and round_bytes(problem.card, problem.task, setting) > within.moved:
        return False
    if not any(_in_memory(problem, way) for way in _lean_ways(problem, setting)):
        return False
    if within.seconds is None:
        return True
    fewest = recomputable(problem, setting)[0]
    quick = (way for way in _passes(problem, setting) if _in_time(problem, cost(problem, recomputing(way, fewest))))
    return any(fits(problem, cost(problem, _fewest_recomputed(problem, way))) for way in quick)


def _passes(problem: Problem, setting: Setting) -> Iterator[Setting]:
    choices = problem.options
    for optimizer, size, kind in itertools.product(choices.optimizers, choices.micro_batches, choices.product_dtypes):
        yield replace(setting, optimizer=optimizer, micro_batch=size, product_dtype=kind)


def _fewest_recomputed(problem: Problem, way: Setting) -> Setting:
    counts = recomputable(problem, way)
    least = bisect_left(counts, True, key=lambda count: _in_memory(problem, recomputing(way, count)))
    return recomputing(way, counts[min(least, len(counts) - 1)])


def _lean_ways(problem: Problem, setting: Setting) -> Iterator[Setting]:
    """Of each optimiser's ways the one that takes least memory."""
    for optimizer in problem.options.optimizers:
        choices = problem.options
        way = replace(
            setting,
            optimizer=optimizer,
            micro_batch=min(choices.micro_batches),
            product_dtype=choices.product_dtypes[-1],
        )
        yield recomputing(way, recomputable(problem, setting)[-1])


def _in_time(problem: Problem, taken: Cost) -> bool:
    allowed = problem.limits.seconds
    return allowed is None or taken.seconds is None or taken.seconds <= allowed


def _in_memory(problem: Problem, setting: Setting) -> bool:
    return estimate(problem.card, setting, problem.profile.pool).total <= problem.limits.memory


def _most_layers(problem: Problem, setting: Setting) -> int | None:
    """The most layers that fit: all costs grow with them, so half of the rest is ruled out at each look."""
    layers = problem.options.layers
    low, high = -1, len(layers) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _fits_somehow(problem, replace(setting, layers_trained=layers[middle])):
            low = middle
        else:
            high = middle - 1
    return None if low < 0 else layers[low]


def _combinations(problem: Problem) -> Iterator[Setting]:
    choices = problem.options
    for precision, length, modules, rank in itertools.product(
        choices.precisions, choices.lengths, choices.modules, choices.ranks
    ):
        setting = _setting(problem, precision, rank, modules, length)
        for held in choices.held:
            if held > rank and problem.task.hold_more:
                yield replace(setting, held=held)
        if len(choices.held) > 1 or rank in choices.held or not problem.task.hold_more:
            yield setting


def _setting(problem: Problem, precision: str, rank: int, modules: tuple[str, ...], length: int) -> Setting:
    choices = problem.options
    return Setting(
        target_modules=problem.task.target_modules,
        trained_modules=modules,
        rank=rank,
        held=rank + problem.task.beside,
        layers_trained=max(choices.layers),
        precision=precision,
        compute_dtype=choices.compute_dtype,
        product_dtype=choices.product_dtypes[-1],
        max_length=length,
        micro_batch=min(choices.micro_batches),
        copies=problem.task.copies, family=problem.task.family, regained=problem.task.regained,
    )  # fmt: skip


def _compute_dtype(profile: DeviceProfile, overrides: Overrides) -> str:
    if overrides.precision in ("bf16", "fp32"):
        return overrides.precision  # what is kept in a type is computed in it
    # On a card without fast bfloat16 all is float32. A processor casts in its cache, so activations stay narrow.
    return "bf16" if profile.bf16_is_fast or profile.pool == "host" else "fp32"


def _product_dtypes(profile: DeviceProfile, compute: str, wanted: str | None) -> tuple[str, ...]:
    """The last one takes least memory: that of the activations, for which nothing is cast."""
    if wanted is not None:
        return (wanted,)
    if profile.bf16_is_fast or compute == "fp32":
        return (compute,)
    # Emulated products whose rate nobody measured are never known to end in time, so they aren't on offer.
    return ("fp32", compute) if profile.gemm_bf16_gflops > 0 else ("fp32",)


def _precisions(profile: DeviceProfile, compute: str, wanted: str | None) -> tuple[str, ...]:
    """Of the base's weights, best first: those that this device's kernels were seen to train with."""
    works = {"nf4": profile.four_bit, "int8": profile.eight_bit, "fp16": True, compute: True}
    if wanted is None:
        return tuple(name for name in (compute, "int8", "nf4") if works[name])
    if wanted not in works:
        raise ConfigError(f"weights kept in {wanted} are computed with in {wanted}; found a compute type of {compute}")
    if not works[wanted]:
        field = {"nf4": "four_bit", "int8": "eight_bit"}[wanted]
        cause = profile.reasons.get(field) or profile.unreadable[field]
        raise ConfigError(f"{profile.name} cannot train over {wanted} weights: {cause}")
    return (wanted,)


def _optimizers(profile: DeviceProfile, wanted: str | None) -> tuple[str, ...]:
    """Best first; 8-bit moments need the library that 4-bit weights need."""
    if wanted == "adamw_8bit" and not profile.four_bit:
        cause = profile.reasons.get("four_bit") or profile.unreadable["four_bit"]
        raise ConfigError(f"{profile.name} cannot train with 8-bit AdamW, nor over nf4 weights: {cause}")
    if wanted is not None:
        return (wanted,)
    return tuple(name for name in TRAINED_BYTES if name == "adamw" or profile.four_bit)


def _one(name: str, wanted: int | None, offered: Sequence[int], least: int, most: int) -> tuple[int, ...]:
    """The value somebody insists on, checked, or all that are on offer."""
    if wanted is None:
        return tuple(offered)
    if not least <= wanted <= most:
        raise ConfigError(f"{name} is between {least} and {most} here; found {wanted}")
    if name == "micro_batch" and wanted not in offered:
        raise ConfigError(f"micro_batch divides the batch: one of {', '.join(map(str, offered))}; found {wanted}")
    return (wanted,)


def _modules(
    wanted: tuple[str, ...] | None, offered: Sequence[tuple[str, ...]], task: Task
) -> tuple[tuple[str, ...], ...]:
    if wanted is None:
        return tuple(offered)
    for name in wanted:
        if name not in task.target_modules:
            raise ConfigError(unknown_name("target module of this fleet", name, task.target_modules))
    return (tuple(name for name in task.target_modules if name in wanted),)


def _doublings(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 2
