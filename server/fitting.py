"""Whether a method can serve a fleet: seen at the start as far as the file says, and with each hello. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from edge_runtime import ways
from edge_runtime.config import Config
from edge_runtime.errors import ConfigError
from edge_runtime.lora.factors import Factors
from edge_runtime.schedule import rate_afterwards
from edge_runtime.trainer import AdapterSpec, PersonalSpec
from edge_runtime.wire import update
from edge_runtime.wire.messages import Hello, ungroup
from server.aggregators.method import Aggregator

UNEQUAL = 'let the fleet merge by a method for unequal ranks: [aggregator] method = "increment"'


def check(config: Config, method: Aggregator) -> None:
    """See at the start that the fleet's file asks for nothing that its method cannot do.

    Raises:
        ConfigError: it does; says what would work.
    """
    for problem in _problems(config, method):
        raise ConfigError(f"[aggregator] method '{config.aggregator.method}' {problem}")


def _problems(config: Config, method: Aggregator) -> Iterator[str]:
    rank, own, adapter = config.aggregator.rank, config.adapter.max_rank, config.adapter
    if method.equal_ranks and rank not in {None, own}:
        yield (
            f"averages factors of one rank, [adapter] max_rank = {own}; found [aggregator] rank = {rank}; leave that "
            f"out, or {UNEQUAL}"
        )
    if method.beside and rank is not None and rank < own:
        yield (
            f"trains directions beside a frozen adapter, up to [adapter] max_rank = {own}; found [aggregator] rank = "
            f"{rank}; leave that out"
        )
    yield from _personal_problems(config, method)
    found = f"found [adapter] slice = '{adapter.slice}' and allocation = '{adapter.allocation}'; leave both out"
    if (adapter.slice, adapter.allocation) != ("top", "uniform"):
        if method.equal_ranks:
            yield f"has every device train every direction; {found}, or {UNEQUAL}"
        if method.slice:
            yield f"says itself what is trained; {found}"
        if method.training:
            yield f"has devices prune their last directions; {found}"
    if config.training.correction and any(method.asks(number).trained != "ab" for number in (1, 2)):
        yield (
            "trains one factor a round, and [training] correction needs what two of them changed; leave it out, or "
            "take [training] proximal"
        )


def _personal_problems(config: Config, method: Aggregator) -> Iterator[str]:
    way, bound = config.personal.way, ways.implied(method.asks(1).private, method.own)
    found = f"found [personal] way = '{way}'; leave it out"
    if bound and way not in {None, bound}:
        yield f"makes personal adapters by '{bound}'; {found}"
    elif not bound and way is not None and way not in ways.FREE:
        needs = {ways.PRIVATE_FACTOR: "fedsa_lora", ways.TWO_LEVEL: "pf2lora"}[way]
        yield f"leaves no device with what that takes; {found}, or take [aggregator] method = '{needs}'"
    elif method.core and way == ways.BESIDE:
        yield f"trains cores, beside which no pair has a place; {found}"


def personal_of(config: Config, method: Aggregator) -> PersonalSpec:
    """How the devices of a fleet that `check` does not refuse make their own adapters.

    Args:
        config: the fleet's file.
        method: that it names.
    """
    found, bound = config.personal, ways.implied(method.asks(1).private, method.own)
    share = found.rate_share or rate_afterwards(config.training.fleet_schedule)
    return PersonalSpec(
        way=found.way or bound or ways.FINETUNE, steps=config.training.personal_steps, proximal=found.proximal,
        rank=found.rank or 0, every=found.every, keep_better=found.keep_better,
        learning_rate=share * config.training.learning_rate,
    )  # fmt: skip


def spec_of(config: Config, method: Aggregator, rank: int) -> AdapterSpec:
    """The kind of adapter that a fleet shares.

    Args:
        config: the fleet's file.
        method: that it names.
        rank: of the global adapter.
    """
    own, core = config.adapter.model_dump(), rank if method.core else 0
    if method.slice:
        own["slice"] = method.slice
    return AdapterSpec(
        **own, max_held=rank + method.beside, hold_more=method.hold_more, equal_ranks=method.equal_ranks,
        beside=method.beside, own=method.own, core=core, bits_up=update.bits_up(config.wire.codec_up),
        bits_down=update.bits_down(config.wire.codec_down),
    )  # fmt: skip


def unfit(hello: Hello, method: Aggregator, rank: int) -> str:
    """Why a method cannot merge what a device would send, or ''.

    Args:
        hello: what the device said.
        method: of the fleet.
        rank: of the global adapter.

    Raises:
        CorruptPayloadError: a slot that cannot be.
    """
    if not method.equal_ranks:
        return ""
    for name, layer in ungroup(hello.groups).layers.items():
        wanted = min(rank, layer.d_out, layer.d_in)
        if layer.trained not in {0, wanted}:
            return (
                f"this fleet averages factors of one rank, so every device trains {wanted} directions of layer "
                f"'{name}'; yours trains {layer.trained}; leave out [device] rank, or {UNEQUAL}"
            )
    return ""


def factors_of(method: Aggregator) -> tuple[Factors, ...]:
    """What each range of the global adapter becomes a band of."""
    return ("a", "b") if method.apart else ("ab",)
