"""What bounds the rounds of a fleet: the fleet's file as the state machine sees it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_runtime.config import Config, Rounds
from edge_runtime.errors import ConfigError
from server.aggregators.method import Aggregator


@dataclass(frozen=True)
class Policy:
    """What the fleet's file says about rounds; see `edge_runtime.config.Rounds` and `Server`.

    Attributes:
        increments: whether the method takes increments, which a gateway offers.
        led: whether another fleet opens the rounds of this one, which is behind a gateway: see `rounds.Asked`.
    """

    fleet: str
    num_rounds: int
    min_available_nodes: int
    fraction_train: float
    quorum: float
    progress_timeout: float
    pause_timeout: float
    max_upload_bytes: int
    max_examples: int
    max_members: int
    seed: int
    mode: Literal["synchronous", "buffered"] = "synchronous"
    over_select: float = 1.0
    buffer_size: int | None = None
    max_staleness: int = 0
    increments: bool = False
    led: bool = False

    @property
    def reach(self) -> int:
        """So many versions behind the newest one, an update still counts."""
        return self.max_staleness if self.mode == "buffered" else 0

    def since(self, version: int) -> int | None:
        """The oldest version of which an upload under way is kept when this one becomes the newest; None: of none."""
        return version - self.reach if self.mode == "buffered" else None


def policy_of(config: Config, method: Aggregator, *, led: bool) -> Policy:
    """The policy in a fleet's file.

    Args:
        config: the file.
        method: that it names.
        led: see `Policy`.

    Raises:
        ConfigError: keys of [rounds] that have no meaning together, or none with this method.
    """
    problem = _unfit(config.rounds, method, led=led)
    if problem:
        raise ConfigError(problem)
    return Policy(
        fleet=config.fleet.name,
        max_upload_bytes=min(config.wire.max_upload_bytes, config.server.max_staged_bytes),
        max_examples=config.server.max_examples,
        max_members=config.server.max_members,
        seed=config.training.seed,
        increments=method.increments,
        led=led,
        **config.rounds.model_dump(exclude={"staleness_exponent"}),
    )


def _unfit(rounds: Rounds, method: Aggregator, *, led: bool) -> str:
    """Why rounds cannot be as their keys say, or ''."""
    buffered = rounds.mode == "buffered"
    if buffered and led:
        return 'a gateway\'s rounds are opened by the fleet above; set [rounds] mode = "synchronous" behind it'
    if buffered and not method.increments:
        return (
            '[rounds] mode = "buffered" merges updates of several versions, each as the increment against its own, and '
            'this method has no increments; set [aggregator] method = "increment", or mode = "synchronous"'
        )
    if buffered and rounds.over_select > 1:
        return '[rounds] over_select is for mode = "synchronous"; a buffer is filled by whoever is first anyway'
    if not buffered and rounds.buffer_size is not None:
        return '[rounds] buffer_size is for mode = "buffered"; a synchronous round waits for those that it asks'
    if rounds.over_select > 1 and rounds.fraction_train == 1:
        return "[rounds] over_select asks more devices than fraction_train says, which are all; lower fraction_train"
    return ""
