"""The fleet behind a gateway: its server, whose rounds are opened by the fleet above.

A round has the number that it has above, and trains from the version of that number: the very bands, byte for byte. So
a device learns behind a gateway what it would learn without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edge_runtime.config import Config
from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.wire import bands, codec, update
from edge_runtime.wire.guard import OPEN, Guard
from edge_runtime.wire.messages import Band, Directive, Offer
from edge_runtime.wire.sampling import FULL
from edge_runtime.wire.transport import Transport
from server import aggregators, engines, events
from server import state as rounds
from server.aggregators.method import Aggregator, State, Update, save_state
from server.directing import ASKS
from server.service import Service
from server.store import Store, StoredVersion

MANY = 64
"""Deliveries taken in one turn, at most, so that neither fleet waits for the other."""


def method_of(config: Config, say: Callable[[str], None]) -> Aggregator:
    """How a subtree's updates are reduced.

    Raises:
        ConfigError: no such method, one that does not sum increments, or a server optimiser.
    """
    own = config.aggregator
    if (own.model_extra or {}).get("optimizer") is not None:
        raise ConfigError(
            "a gateway sends what its devices changed, and a server optimiser makes steps of its own of it; leave "
            "[aggregator] optimizer to the fleet above"
        )
    method = aggregators.build(own.method, engines.build(config.server, say), **(own.model_extra or {}))
    if not method.increments or method.beside:
        raise ConfigError(
            f'a gateway sums increments, and [aggregator] method "{own.method}" does something else; take "increment" '
            "there, whatever the fleet above takes"
        )
    return method


class Subtree:
    """The server of a gateway's devices.

    Args:
        config: the subtree's file.
        above: what the fleet above asks for; says what kind of adapter is trained, and how.
        transport: connected to the subtree's broker.
        store: opened.
        say, record, clock, guard: as of `server.service.Service`.
    """

    def __init__(  # noqa: PLR0913  as of the service within it
        self,
        config: Config,
        above: Directive,
        transport: Transport,
        store: Store,
        *,
        say: Callable[[str], None],
        record: Callable[[Mapping[str, Any]], None],
        clock: Callable[[], float],
        guard: Guard = OPEN,
    ) -> None:
        if above.base is not None:
            config = config.model_copy(update={"fleet": config.fleet.model_copy(update={"base": above.base})})
        self.above = above
        self._config, self._store = config, store
        self._service = Service(
            config, transport, store, say=say, record=record, clock=clock, guard=guard, lead=self._asked
        )
        self._service.begin()

    @property
    def state(self) -> rounds.State:
        """Where its rounds stand."""
        return self._service.state

    @property
    def ready(self) -> bool:
        """Whether enough of its devices are here, or were when its rounds began."""
        online = sum(member.online for member in self.state.members.values())
        return self.state.phase != "gather" or online >= self._config.rounds.min_available_nodes

    def turn(self, poll: float) -> None:
        """Take what has arrived, for the first of which it waits `poll` seconds."""
        for _ in range(MANY):
            if not self._service.turn(poll):
                return
            poll = 0.0

    def opened(self, above: Directive) -> bool:
        """Whether this round of the fleet above is open here, or complete; or, if it says so, the devices finish."""
        phases = {"finish", "over"} if above.phase == "finish" else {"train", "merging"}
        return self.state.phase in phases and self.state.round == above.round

    def open(self, above: Directive, payloads: Sequence[bytes]) -> None:
        """Open the round that the fleet above asks for, or let the devices finish.

        Args:
            above: its Directive.
            payloads: the bands of the version, as they came.

        Raises:
            DiskFullError: no room for the version; nothing of it happened.
        """
        last = above.phase == "finish"
        self.above = above
        known = bands.join([codec.decode(payload) for payload in payloads])
        version = StoredVersion(above.version, save_state(State(known, Adapter({}), above.version)), above.bands)
        self._service.open(events.Asked(above.round, above.version, last), version, list(payloads))

    def complete(self, number: int) -> bool:
        """Whether all updates of this round are here that it waits for."""
        return self.state.phase == "merging" and self.state.round == number

    def updates(self, number: int) -> Iterator[Update]:
        """The updates of a round."""
        return self._service.updates(number)

    def offers(self, number: int) -> list[Offer]:
        """How its devices offered them."""
        return [offer for offer, _ in self._store.updates(number)]

    def end(self) -> None:
        """See that all that was said is gone, and close the store."""
        self._service.end()
        self._store.close()

    def _asked(self, state: rounds.State, cut: tuple[Band, ...]) -> Directive:
        """What the fleet above asks for, in the words of this one."""
        own, phase = self._config, ASKS[state.phase]
        everybody = phase != "train" or state.sample.below == FULL
        facts = {
            "fleet": own.fleet.name,
            "run": state.run,
            "phase": phase,
            "round": state.round,
            "version": state.version,
            "base": state.base,
            "adapter": self.above.adapter.model_copy(update={"bits_up": update.bits_up(own.wire.codec_up)}),
            "bands": cut,
            "sample": None if everybody else state.sample,
            "codec": own.wire.codec_up,
            "error_feedback": own.wire.error_feedback,
            "upload_bytes": own.wire.upload_bytes,
            "increments": True,
            "max_staleness": 0,
        }
        return self.above.model_copy(update=facts)
