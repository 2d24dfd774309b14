"""Why a plan is as it is: a sentence for each choice, what the next better one would need, and why nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from profiles.device import MIB, DeviceProfile
from profiles.known_bases import known_cards
from profiles.memory import Setting, estimate
from profiles.search import Cost, Problem, cost, fits, leanest, recomputable, recomputing, smallest, ways
from profiles.terms import Overrides
from profiles.worth import worth

_AT_BEST: Mapping[str, str] = {
    "rank": "the largest rank that the fleet allows",
    "held": "all that the server has",
    "layers_trained": "all layers of the model",
    "trained_modules": "all that have an adapter",
    "precision": "nothing is lost by quantising",
    "max_length": "as the fleet asks for",
}

OPTIMIZERS: Mapping[str, str] = {"adamw": "AdamW", "adamw_8bit": "8-bit AdamW"}
"""What people call them."""

_SHORT: Mapping[str, str] = {"layers_trained": "layers", "trained_modules": "modules", "max_length": "length"}


def raises(problem: Problem, setting: Setting) -> dict[str, str]:
    """For each choice that could be raised: the next step up, and what it would need beyond the budgets."""
    found = {}
    for name, following in _NEXT.items():
        for better in following(problem, setting):
            found[name] = f"{_named(name, getattr(better, name))} {_lack(problem, better)}"
    return found


def reasons(problem: Problem, setting: Setting, overrides: Overrides) -> dict[str, str]:
    """Field of the plan → one sentence."""
    profile, task = problem.profile, problem.task
    better = raises(problem, setting)
    taken = cost(problem, setting)
    learnt = {name: better.get(name) or _AT_BEST[name] for name in _AT_BEST}
    lossless = {"bf16": "nothing is quantised", "fp32": "nothing is quantised, and bf16 is slow here"}
    learnt["precision"] = better.get("precision") or lossless.get(setting.precision) or _works(profile, setting)
    said = {
        **learnt,
        "compute_dtype": _why_narrow(profile, setting),
        "product_dtype": _why_products(problem, setting),
        "micro_batch": _why_this_way(problem, setting, "micro_batch"),
        "gradient_accumulation_steps": f"makes a batch of {task.batch_size} sequences",
        "gradient_checkpointing": _why_this_way(problem, setting, "gradient_checkpointing"),
        "recomputed_layers": _why_this_way(problem, setting, "recomputed_layers"),
        "optimizer": _why_this_way(problem, setting, "optimizer"),
        "family": "what the fleet shares",
        "threads": "one per usable core; hardware threads add nothing here",
        "predicted_peak_bytes": (
            f"of {problem.limits.memory / MIB:.0f} MiB ({problem.limits.source}): "
            f"{estimate(problem.card, setting, profile.pool).describe(6)}"
        ),
        "predicted_step_seconds": _time(problem, taken),
        "predicted_round_bytes": _link(problem, taken),
    }
    return {**said, **{name: f"as asked for; {said[name]}" for name in overrides.given}}


def nothing_fits(problem: Problem, overrides: Overrides, without: Setting | None) -> str:
    """Why there is no plan, in one line: what is missing, and what would fit."""
    card, within = problem.card, problem.limits
    least = smallest(problem)
    taken = cost(problem, least)
    asked = "".join(f", {_named(name, value)} as asked for" for name, value in overrides.given.items())
    what = (
        f"the smallest plan for {card.name} ({_named('layers_trained', least.layers_trained)}, rank {least.rank}, "
        f"{least.max_length} tokens, {least.precision}{asked})"
    )
    if taken.memory > within.memory:
        missing = -(-(taken.memory - within.memory) // MIB)
        problem_said = (
            f"{missing} MiB are missing: {what} needs {taken.memory / MIB:.0f} MiB, and {within.source} is "
            f"{within.memory / MIB:.0f} MiB (most of it: {estimate(card, least, problem.profile.pool).describe(3)})"
        )
    else:
        problem_said = f"no plan is within the budgets: {what} {_lack(problem, least)}"
    if without is not None:
        return f"{problem_said}; without what was asked for, this fits: {_in_short(without)}"
    base = _largest_that_fits(problem)
    if not base:
        return f"{problem_said}; free memory or raise the limit: no known base fits"
    cure = f"the largest known base that fits is {base}"
    return f"{problem_said}; free memory, raise the limit, or choose a smaller base: {cure}"


def _largest_that_fits(problem: Problem) -> str:
    """The known base with the most parameters for which there is a plan; empty where there is none."""
    for card in reversed(known_cards()):
        if card.parameters < problem.card.parameters:
            smaller = replace(problem, card=card, options=replace(problem.options, layers=(1,)))
            if fits(smaller, cost(smaller, smallest(smaller))):
                return card.name
    return ""


def _lack(problem: Problem, setting: Setting) -> str:
    """What a setting that does not fit would need: of the ways to train it, the one that lacks fewest budgets."""
    _, taken = leanest(problem, setting)
    within = problem.limits
    if taken.memory > within.memory:
        return f"needs {-(-(taken.memory - within.memory) // MIB)} MiB more"
    if within.moved is not None and taken.moved > within.moved:
        return f"would move {taken.moved / MIB:.1f} MiB a round of {within.moved / MIB:.1f} allowed"
    possible = [cost(problem, way) for way in ways(problem, setting)]
    seconds = [found.seconds for found in possible if found.seconds is not None and found.memory <= within.memory]
    quickest = min(seconds, default=None)
    if quickest is not None and within.seconds is not None and quickest > within.seconds:
        return f"would take {quickest:.0f} s a round of {within.seconds:.0f} allowed"
    return "fits, and is worth no more"


def _why_this_way(problem: Problem, setting: Setting, field: str) -> str:
    """Why it is trained in this way and not in the other ways that learn the same."""
    chosen = cost(problem, setting)
    parts = []
    for way in _OTHER_WAYS[field](problem, setting):
        taken = cost(problem, way)
        name = _named(field, getattr(way, field))
        if not fits(problem, taken):
            parts.append(f"{name} {_lack_of(problem, taken)}")
        elif taken.seconds is None or chosen.seconds is None:
            parts.append(f"{name} fits too; speeds were not measured")
        elif taken.seconds > chosen.seconds:
            parts.append(f"{name} would be {taken.seconds / chosen.seconds - 1:.0%} slower")
        else:
            parts.append(f"{name} would gain {1 - taken.seconds / chosen.seconds:.0%}{_for_it(chosen, taken)}")
    return "; ".join(parts) or "the only way on offer"


def _for_it(chosen: Cost, taken: Cost) -> str:
    return " and take more memory" if taken.memory > chosen.memory else ""


def _other_micro_batches(problem: Problem, setting: Setting) -> Iterator[Setting]:
    """Each with as few layers recomputed as fit."""
    same = (way for way in ways(problem, setting) if way.optimizer == setting.optimizer)
    return (way for way in same if way.micro_batch != setting.micro_batch)


def _other_checkpointing(problem: Problem, setting: Setting) -> Iterator[Setting]:
    """None instead of some, or all instead of none."""
    if problem.options.checkpointing is None and problem.options.recomputed is None:
        yield recomputing(setting, 0 if setting.recomputed else setting.layers_trained)


def _other_recomputed(problem: Problem, setting: Setting) -> Iterator[Setting]:
    """One layer less."""
    if setting.recomputed - 1 in recomputable(problem, setting):
        yield recomputing(setting, setting.recomputed - 1)


def _other_optimizers(problem: Problem, setting: Setting) -> Iterator[Setting]:
    """Each at the micro-batch chosen, or at its leanest where that does not fit."""
    for optimizer in problem.options.optimizers:
        if optimizer != setting.optimizer:
            possible = [(way, cost(problem, way)) for way in ways(problem, setting) if way.optimizer == optimizer]
            same = [way for way, taken in possible if way.micro_batch == setting.micro_batch and fits(problem, taken)]
            yield same[0] if same else min(possible, key=lambda pair: pair[1].memory)[0]


def _other_products(problem: Problem, setting: Setting) -> Iterator[Setting]:
    """The other type at the micro-batch chosen."""
    same = (way for way in ways(problem, setting) if way.optimizer == setting.optimizer)
    return (
        way for way in same if way.micro_batch == setting.micro_batch and way.product_dtype != setting.product_dtype
    )


_OTHER_WAYS: Mapping[str, Callable[[Problem, Setting], Iterator[Setting]]] = {
    "micro_batch": _other_micro_batches,
    "gradient_checkpointing": _other_checkpointing,
    "recomputed_layers": _other_recomputed,
    "optimizer": _other_optimizers,
    "product_dtype": _other_products,
}


def _lack_of(problem: Problem, taken: Cost) -> str:
    within = problem.limits
    if taken.memory > within.memory:
        return f"needs {-(-(taken.memory - within.memory) // MIB)} MiB more"
    return f"would take {taken.seconds or 0:.0f} s a round of {within.seconds or 0:.0f} allowed"


def _time(problem: Problem, taken: Cost) -> str:
    if taken.seconds is None:
        return "unknown: the device's rates were not measured"
    allowed = problem.limits.seconds
    budget = f" of {allowed:.0f} s allowed" if allowed is not None else ""
    return f"from the measured rates; a round of {problem.task.steps} steps takes {taken.seconds:.0f} s{budget}"


def _link(problem: Problem, taken: Cost) -> str:
    profile, allowed = problem.profile, problem.limits.moved
    budget = f", of {allowed / MIB:.1f} MiB allowed" if allowed is not None else ""
    rate = min(profile.link_up_mbit_s, profile.link_down_mbit_s)
    seconds = f"; {taken.moved * 8 / rate / 1e6:.0f} s over its link" if rate > 0 else ""
    return f"update up and global adapter down, before compression{budget}{seconds}"


def _works(profile: DeviceProfile, setting: Setting) -> str:
    return _explained(profile, {"nf4": "four_bit", "int8": "eight_bit"}[setting.precision])


def _why_products(problem: Problem, setting: Setting) -> str:
    measured = _explained(problem.profile, "bf16_is_fast")
    if len(problem.options.product_dtypes) == 1:
        return measured
    return f"{measured}; {_why_this_way(problem, setting, 'product_dtype')}"


def _why_narrow(profile: DeviceProfile, setting: Setting) -> str:
    if setting.compute_dtype == "bf16":
        return "half the activations of fp32"
    return _explained(profile, "bf16_is_fast")


def _explained(profile: DeviceProfile, field: str) -> str:
    return profile.reasons.get(field) or profile.unreadable[field]


def _in_short(setting: Setting) -> str:
    return (
        f"rank {setting.rank} of {setting.held} held, last {setting.layers_trained} layers, {setting.precision}, "
        f"{setting.max_length} tokens"
    )


def _named(field: str, value: Any) -> str:
    """A choice in words, such as "rank 16" or "checkpointing"."""
    if field == "gradient_checkpointing":
        return "checkpointing" if value else "no checkpointing"
    if field == "recomputed_layers":
        return f"recomputing {value} layers" if value != 1 else "recomputing 1 layer"
    if field == "optimizer":
        return OPTIMIZERS[value]
    if field == "trained_modules":
        return "training " + ", ".join(value)
    if field == "layers_trained":
        return f"{value} layers" if value > 1 else "1 layer"
    return f"{_SHORT.get(field, field).replace('_', ' ')} {value}"


def _step_up(
    field: str, offered: Callable[[Problem], tuple[Any, ...]]
) -> Callable[[Problem, Setting], Iterator[Setting]]:
    """The setting with one choice raised by one step, if there is such a step and it is worth more."""

    def following(problem: Problem, setting: Setting) -> Iterator[Setting]:
        better = []
        for value in offered(problem):
            changed = {field: value, "recomputed_layers": None}
            if field == "rank":
                changed["held"] = max(setting.held, value) if problem.task.hold_more else value + problem.task.beside
            if field == "held" and (value < setting.rank or not problem.task.hold_more):
                continue
            candidate = replace(setting, **changed)
            gain = worth(problem.card, candidate) - worth(problem.card, setting)
            if gain > 0:
                better.append((gain, candidate))
        if better:
            yield min(better, key=lambda pair: pair[0])[1]

    return following


_NEXT: Mapping[str, Callable[[Problem, Setting], Iterator[Setting]]] = {
    "rank": _step_up("rank", lambda problem: problem.options.ranks),
    "held": _step_up("held", lambda problem: problem.options.held),
    "layers_trained": _step_up("layers_trained", lambda problem: problem.options.layers),
    "trained_modules": _step_up("trained_modules", lambda problem: problem.options.modules),
    "precision": _step_up("precision", lambda problem: problem.options.precisions),
    "max_length": _step_up("max_length", lambda problem: problem.options.lengths),
}
