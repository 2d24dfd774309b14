"""Whether a method can serve a fleet: seen at the start as far as the file says, and with each hello. Pure."""

from __future__ import annotations

from edge_runtime.config import Config
from edge_runtime.errors import ConfigError
from edge_runtime.lora.factors import Factors
from edge_runtime.trainer import AdapterSpec
from edge_runtime.wire import update
from edge_runtime.wire.messages import Hello, ungroup
from server.aggregators.method import Aggregator

UNEQUAL = 'let the fleet merge by a method for unequal ranks: [aggregator] method = "increment"'


def check(config: Config, method: Aggregator) -> None:
    """See at the start that the fleet's file asks for nothing that its method cannot do.

    Raises:
        ConfigError: it does; says what would work.
    """
    own, rank = config.aggregator, config.adapter.max_rank
    if method.equal_ranks and own.rank not in {None, rank}:
        raise ConfigError(
            f"[aggregator] method '{own.method}' averages factors of one rank, [adapter] max_rank = {rank}; found "
            f"[aggregator] rank = {own.rank}; leave that out, or {UNEQUAL}"
        )
    if method.equal_ranks and (config.adapter.slice, config.adapter.allocation) != ("top", "uniform"):
        raise ConfigError(
            f"[aggregator] method '{own.method}' has every device train every direction; found [adapter] slice = "
            f"'{config.adapter.slice}' and allocation = '{config.adapter.allocation}'; leave both out, or {UNEQUAL}"
        )
    if method.beside and own.rank is not None and own.rank < rank:
        raise ConfigError(
            f"[aggregator] method '{own.method}' trains directions beside a frozen adapter, up to [adapter] max_rank = "
            f"{rank}; found [aggregator] rank = {own.rank}; leave that out"
        )
    if method.slice and config.adapter.slice != "top":
        raise ConfigError(
            f"[aggregator] method '{own.method}' says itself what is trained; found [adapter] slice = "
            f"'{config.adapter.slice}'; leave that out"
        )
    if config.training.correction and any(method.asks(number).trained != "ab" for number in (1, 2)):
        raise ConfigError(
            f"[aggregator] method '{own.method}' trains one factor a round, and [training] correction needs what two "
            "of them changed; leave it out, or take [training] proximal"
        )


def spec_of(config: Config, method: Aggregator, rank: int) -> AdapterSpec:
    """The kind of adapter that a fleet shares.

    Args:
        config: the fleet's file.
        method: that it names.
        rank: of the global adapter.
    """
    own = config.adapter.model_dump()
    if method.slice:
        own["slice"] = method.slice
    return AdapterSpec(
        **own, max_held=rank + method.beside, hold_more=method.hold_more, equal_ranks=method.equal_ranks,
        beside=method.beside, own=method.own, bits_up=update.bits_up(config.wire.codec_up),
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
