"""What the fleet is asked to do now: a Directive from the file and the state of the rounds. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from edge_runtime.config import Config
from edge_runtime.schedule import rate_in
from edge_runtime.trainer import Training
from edge_runtime.wire.messages import Band, Directive
from edge_runtime.wire.sampling import FULL
from server.aggregators.method import Aggregator
from server.fitting import personal_of, spec_of
from server.state import State

ASKS: Mapping[str, Literal["gather", "train", "finish"]] = {
    "gather": "gather",
    "train": "train",
    "merging": "train",
    "finish": "finish",
    "over": "finish",
}
"""Phase of the rounds → what a Directive asks of a device."""


def directive_of(config: Config, state: State, cut: tuple[Band, ...], *, rank: int, method: Aggregator) -> Directive:
    """The Directive of a state.

    Args:
        config: the fleet's file.
        state: where the rounds stand.
        cut: the bands of the current version.
        rank: of the global adapter.
        method: by which the fleet merges; devices are told what it permits, not what it is.
    """
    phase, asks = ASKS[state.phase], method.asks(max(state.round, 1))
    steps = config.training.personal_steps if phase == "finish" else config.training.max_steps
    training = config.training.model_dump(exclude={"personal_steps", "max_steps", "fleet_schedule"})
    if phase == "finish":
        # What pulls in rounds does not pull a personal adapter: that has a strength of its own, in `personal`.
        training |= {"proximal": 0.0, "correction": 0.0}
    else:
        training |= {"factors": asks.trained, **method.training}
        training["learning_rate"] *= rate_in(
            state.round, rounds=config.rounds.num_rounds, schedule=config.training.fleet_schedule
        )
    everybody = phase != "train" or state.sample.below == FULL
    return Directive(
        fleet=config.fleet.name,
        run=state.run,
        phase=phase,
        round=state.round,
        version=state.version,
        num_rounds=config.rounds.num_rounds,
        base=state.base,
        adapter=spec_of(config, method, rank),
        training=Training(max_steps=steps, **training),
        bands=cut,
        sample=None if everybody else state.sample,
        codec=config.wire.codec_up,
        error_feedback=config.wire.error_feedback,
        upload_bytes=config.wire.upload_bytes,
        increments=method.increments,
        max_staleness=config.rounds.max_staleness if config.rounds.mode == "buffered" else 0,
        sent=asks.sent,
        private=asks.private,
        personal=personal_of(config, method),
    )
