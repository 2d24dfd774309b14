"""A whole fleet in one process, one step at a time: the real `run` loops over the broker in memory, without chance.

Each participant runs in a thread of its own (SQLite wants that), but only one of them is ever awake: a loop that asks
`stop()` hands its turn on. The same fleet therefore does the same things in the same order, and a participant can be
killed before any one of its operations.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from edge_runtime import config
from edge_runtime.client import Client, Identity, will
from edge_runtime.config import Config
from edge_runtime.keeper import Watch
from edge_runtime.lora.adapter import Adapter
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Delivered
from edge_runtime.wire.guard import OPEN, Guard
from edge_runtime.wire.memory import MemoryBroker, MemoryTransport
from edge_runtime.wire.transport import Delivery
from server.aggregators import method
from server.service import Service
from server.state import State
from server.store import Store
from tests.runtime.toy import ToyTrainer

PATIENCE = 30.0
"""Seconds of real time after which a turn that does not end is an error instead of a hanging test."""

UPLOAD_CHUNK = 400
"""Bytes: several chunks for each update of a toy."""

READS = {
    "receive",
    "flush",
    "rounds",
    "version",
    "blob",
    "offer_of",
    "chunks",
    "updates",
    "fact",
    "band",
    "staged",
    "staged_bytes",
    "members",
    "have",
    "norms",
    "unrecorded",
    "refusals",
    "versions",
    "on_full",
    "instance",
}
"""Operations that leave no trace: a kill before one of them is a kill before the next that does."""


class Killed(BaseException):
    """The process ends here, as by SIGKILL: nothing above may catch it, nothing of it has an effect any more."""


@dataclass
class Fuse:
    """Counts a participant's operations, and kills it before one of them.

    Attributes:
        at: number of the fatal operation, from 1; None for a long life.
        before: name of a fatal operation; empty for none.
        seen: the operations so far.
    """

    at: int | None = None
    before: str = ""
    seen: list[str] = field(default_factory=list)

    def burn(self, operation: str) -> None:
        """Count an operation that is about to happen."""
        if operation == self.before or (self.at is not None and len(self.seen) + 1 >= self.at):
            raise Killed(operation)
        self.seen.append(operation)


Thing = TypeVar("Thing")


def guarded(thing: Thing, fuse: Fuse) -> Thing:
    """A real thing whose operations burn a fuse first."""
    return cast("Thing", Guarded(thing, fuse))


class Guarded:
    """See `guarded`."""

    def __init__(self, thing: Any, fuse: Fuse) -> None:
        self._thing, self._fuse = thing, fuse

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._thing, name)
        return self._operation(name, value) if callable(value) else value

    def _operation(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if name not in READS:
                self._fuse.burn(name)
            if name == "flush":
                return call(0.0)  # nobody else moves while this participant waits
            result = call(*args, **kwargs)
            return self._delivery(result) if isinstance(result, Delivery) else result

        return operation

    def _delivery(self, delivery: Delivery) -> Delivery:
        def ack() -> None:
            self._fuse.burn("ack")
            delivery.ack()

        return Delivery(delivery.topic, delivery.payload, delivery.retained, ack)


class Stutter:
    """A transport that delivers every few messages a second time, in their order, as MQTT may after a reconnect."""

    def __init__(self, transport: MemoryTransport, every: int) -> None:
        self._transport, self._every = transport, every
        self._recent: list[Delivery] = []
        self._again: deque[Delivery] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def receive(self, timeout: float) -> Delivery | None:
        """The next delivery, new or again."""
        if self._again:
            return self._again.popleft()
        delivery = self._transport.receive(timeout)
        if delivery is not None:
            self._recent.append(delivery)
        if len(self._recent) == self._every:
            self._again.extend(self._recent)
            self._recent.clear()
        return delivery


class Seat:
    """One participant: a thread that is awake only during its turn."""

    def __init__(self, name: str, work: Callable[[Seat], None], fuse: Fuse) -> None:
        self.name, self.fuse = name, fuse
        self.ended = False
        self.error: BaseException | None = None
        self._work = work
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def turn(self) -> None:
        """Let it take one step."""
        self._go.release()
        if not self._back.acquire(timeout=PATIENCE):
            raise TimeoutError(f"'{self.name}' did not end its turn")

    def stop(self) -> bool:
        """Given to the `run` of the participant: others take their turns meanwhile."""
        self._back.release()
        self._go.acquire()
        return self._over

    def dismiss(self) -> None:
        """Ask it to stop, and wait until it has."""
        self._over = True
        while not self.ended:
            self.turn()
        self._thread.join(PATIENCE)

    def _main(self) -> None:
        self._go.acquire()
        try:
            self._work(self)
        except BaseException as error:  # noqa: BLE001  the main thread looks at every one of them
            self.error = error
        self.ended = True
        self._back.release()


@dataclass
class Clock:
    """Seconds that pass only when somebody says so."""

    now: float = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def fleet_config(*overrides: str) -> Config:
    """A small fleet's file: two rounds of three steps, chunks of 1 KiB, and no hurry."""
    return config.load(
        None,
        [
            "rounds.num_rounds=2",
            "rounds.min_available_nodes=2",
            "rounds.progress_timeout=1e6",
            "adapter.max_rank=8",
            "training.max_steps=3",
            "training.personal_steps=2",
            "training.learning_rate=0.1",
            "wire.chunk_bytes=1024",
            *overrides,
        ],
    )


class Fleet:
    """A server and its devices on one broker.

    Args:
        folder: for the disks of all participants; those of a former fleet go on from there.
        settings: the fleet's file.
        devices: name → makes its trainer; a restarted device gets a new one.
        fuses: participant ("server" or a device) → numbers of its fatal operations, one for each of its lives.
        broker: another fleet's, where that matters.
        absent: devices that join later, by `join`.
        stutter: deliver so many messages a second time, again and again; 0 for never.
        guards: participant → what signs for it; nothing does without.
    """

    def __init__(
        self,
        folder: Path,
        settings: Config,
        devices: Mapping[str, Callable[[], ToyTrainer]],
        *,
        fuses: Mapping[str, list[int]] | None = None,
        broker: MemoryBroker | None = None,
        absent: tuple[str, ...] = (),
        stutter: int = 0,
        guards: Callable[[str], AbstractContextManager[Guard]] = lambda _: nullcontext(OPEN),
    ) -> None:
        self._guards = guards
        self.folder, self.config, self.broker, self.clock = folder, settings, broker or MemoryBroker(), Clock()
        self.notes: list[str] = []
        self.records: list[Mapping[str, Any]] = []
        self.trainers: dict[str, list[ToyTrainer]] = {name: [] for name in devices}
        self.delivered: Counter[str] = Counter()
        self.transports: dict[str, MemoryTransport] = {}
        self.operations: dict[str, list[str]] = {}
        self.kills: list[str] = []
        self.with_will = True
        self.state: State | None = None
        self._makers, self._stutter = devices, stutter
        self._fuses = {name: list(numbers) for name, numbers in (fuses or {}).items()}
        self.seats: dict[str, Seat] = {}
        for name in ("server", *devices):
            if name not in absent:
                self.join(name)

    def join(self, name: str) -> None:
        """Start a participant, for the first time or again."""
        numbers = self._fuses.get(name, [])
        fuse = Fuse(numbers.pop(0) if numbers else None)
        self.operations[name] = fuse.seen
        self.seats[name] = Seat(name, self._serve if name == "server" else self._take_part, fuse)

    def sweep(self) -> None:
        """One turn for everybody, and a second passes. Whoever was killed starts again; other errors are raised."""
        self.clock.now += 1.0
        for name, seat in list(self.seats.items()):
            if seat.ended:
                continue
            seat.turn()
            if isinstance(seat.error, Killed):
                self.kills.append(f"{name}: {seat.error}")
                self.join(name)
            elif seat.error is not None:
                raise seat.error

    def run(self, *, until: Callable[[], bool] | None = None, sweeps: int = 4000) -> Fleet:
        """Let everybody work until all have ended, or `until()` says so."""
        for _ in range(sweeps):
            if until() if until else self.ended:
                return self
            self.sweep()
        where = f"phase '{self.state.phase}', round {self.state.round}" if self.state else "no server"
        raise TimeoutError(f"the fleet did not finish in {sweeps} sweeps: {where}; {self.notes[-5:]}")

    @property
    def ended(self) -> bool:
        """Whether all participants have ended."""
        return all(seat.ended for seat in self.seats.values())

    def leave(self, name: str) -> None:
        """Stop a participant in order, as SIGTERM does."""
        seat = self.seats.pop(name)
        if not seat.ended:
            seat.dismiss()

    def close(self) -> None:
        """Stop whoever is still there."""
        for name in list(self.seats):
            self.leave(name)

    @contextmanager
    def store(self) -> Iterator[Store]:
        """The server's store, once the server has ended."""
        store = Store(self.folder / "server")
        try:
            yield store
        finally:
            store.close()

    def merged(self, version: int | None = None) -> Adapter:
        """The global adapter of a version, or the last."""
        return self.stored(version).adapter

    def stored(self, version: int | None = None) -> method.State:
        """The method's state of a version, or the last."""
        with self.store() as store:
            stored = store.version(self.config.rounds.num_rounds if version is None else version)
        if stored is None:
            raise AssertionError(f"version {version} is not in the store")
        return method.load_state(stored.state)

    def merges(self) -> list[tuple[int, int]]:
        """(round, updates merged into each layer that was trained), as they were recorded."""
        return [
            (record["round"], layer["updates"])
            for record in self.records
            if record["event"] == "merge"
            for layer in record["layers"].values()
        ]

    def _serve(self, seat: Seat) -> None:
        transport = self.transports["server"] = self.broker.connect("server")
        store = Store(self.folder / "server")
        service: Service | None = None
        guards = ExitStack()
        try:
            service = Service(
                self.config,
                self._heard(transport, seat),
                guarded(store, seat.fuse),
                say=self.notes.append,
                record=self.records.append,
                clock=self.clock,
                guard=guards.enter_context(self._guards("server")),
            )
            service.run(lambda: self._look(service) or seat.stop(), poll=0.0)
        finally:
            self._look(service)
            transport.close()
            store.close()
            guards.close()

    def _look(self, service: Service | None) -> bool:
        self.state = service.state if service else self.state
        return False

    def _take_part(self, seat: Seat) -> None:
        name = seat.name
        trainer = self._makers[name]()
        self.trainers[name].append(trainer)
        guards = ExitStack()
        guard = guards.enter_context(self._guards(name))
        transport = self.transports[name] = self.broker.connect(name, will=will(self.config.fleet.name, name, guard))
        disk = DeviceState(self.folder / name)
        try:
            client = Client(
                Identity(self.config.fleet.name, name, chunk_bytes=UPLOAD_CHUNK, guard=guard),
                transport=self._heard(transport, seat),
                state=guarded(disk, seat.fuse),
                trainer=guarded(trainer, seat.fuse),
                deliver=lambda: self._deliver(name),
                say=lambda text: self.notes.append(f"{name}: {text}"),
                watch=Watch(clock=self.clock),
            )
            client.run(seat.stop, poll=0.0)
        except Killed:
            transport.drop(with_will=self.with_will)
            raise
        finally:
            transport.close()
            disk.close()
            guards.close()

    def _heard(self, transport: MemoryTransport, seat: Seat) -> MemoryTransport:
        stuttering = cast("MemoryTransport", Stutter(transport, self._stutter)) if self._stutter else transport
        return guarded(stuttering, seat.fuse)

    def _deliver(self, name: str) -> Delivered:
        self.delivered[name] += 1
        return Delivered(f"{name}/personal", 0.0)
