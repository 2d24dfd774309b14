"""What bounds the rounds of a fleet: the fleet's file as the state machine sees it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.config import Config
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
    increments: bool = False
    led: bool = False


def policy_of(config: Config, method: Aggregator, *, led: bool) -> Policy:
    """The policy in a fleet's file.

    Args:
        config: the file.
        method: that it names.
        led: see `Policy`.
    """
    return Policy(
        fleet=config.fleet.name,
        max_upload_bytes=min(config.wire.max_upload_bytes, config.server.max_staged_bytes),
        max_examples=config.server.max_examples,
        max_members=config.server.max_members,
        seed=config.training.seed,
        increments=method.increments,
        led=led,
        **config.rounds.model_dump(),
    )
