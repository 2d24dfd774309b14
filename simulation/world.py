"""A whole fleet in virtual time: its devices, its server, and what comes of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.config import Config
from edge_runtime.errors import QuorumError
from edge_runtime.governor import Thresholds
from edge_runtime.wire.messages import Directive, Message
from profiles.find_card import find_card
from server import aggregators
from server.aggregators.beside import published
from server.aggregators.method import load_state
from server.choosing import named as in_words
from server.exchange import rank_of
from server.fitting import spec_of
from server.store import Store
from simulation import engines, people
from simulation.clock import Clock, Event
from simulation.device import Device
from simulation.draws import named
from simulation.fleet import Planning, group_of
from simulation.host import Host
from simulation.journal import Journal
from simulation.log import Log
from simulation.memory import Spent
from simulation.settings import Simulation
from simulation.surroundings import Surroundings
from simulation.tables import DeviceRow, VersionRow
from simulation.traces import HOUR
from simulation.work import Done, Recipe, problem_of

STILL = 4
"""Times the server's patience in which nothing happens before a run is given up."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        finished: whether all rounds were merged.
        why: in words.
        seconds: of virtual time.
        versions: a row for each round.
        devices: a row for each device.
        events: of the clock.
        found: rounds of devices that a former run had computed.
        adapter: SHA-256 of the last global adapter.
    """

    finished: bool
    why: str
    seconds: float
    versions: Sequence[VersionRow]
    devices: Sequence[DeviceRow]
    events: int
    found: int
    adapter: str


class World:
    """One simulation.

    Args:
        config: the fleet's file.
        simulation: its [simulation].
        folder: for the server's store, the outcomes of devices' rounds, and the event log; what is there of a former
            run of the same simulation is used.
        say: told a sentence for people.
        kills: number of an event → "server" or the name of a device, which crashes after it.

    Raises:
        PlanError: a device that cannot hold the base; names all those.
        EdgeRuntimeError: of another kind, if something in the file cannot be.
    """

    def __init__(
        self, config: Config, simulation: Simulation, folder: Path, *, say: Say, kills: Mapping[int, str] | None = None
    ) -> None:
        self._config, self._simulation, self._say = people.with_room(config, simulation), simulation, say
        self._kills = kills or {}
        people.check(self._config, simulation)
        self._groups = [group_of(settings, config.device) for settings in simulation.devices]
        card = find_card(simulation.base)
        self._problem = problem_of(simulation) if simulation.trainer == "surrogate" else None
        planning = Planning(self._config, simulation, card, self._problem)
        self._method = aggregators.build(config.aggregator.method, **(config.aggregator.model_extra or {}))
        spec = spec_of(self._config, self._method, rank_of(self._config, self._method))
        planning.check(self._groups, spec, people.training_of(config))
        self._clock, self._closing = Clock(), ExitStack()
        self._versions: list[VersionRow] = []
        self._judged: dict[int, list[tuple[float, float | None]]] = {}
        self._asked: tuple[object, list[Device]] = (None, [])
        self._still = 0
        self._next_crash: Event | None = None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._open(folder, planning)
        except BaseException:
            self._closing.close()
            raise

    def _open(self, folder: Path, planning: Planning) -> None:
        config, simulation, clock = self._config, self._simulation, self._clock
        shutil.rmtree(folder / "server", ignore_errors=True)  # a run begins at the beginning; see `journal`
        log = Log(folder)
        self._closing.callback(log.close)
        fleet = people.People(config, simulation, self._groups)
        recipe = Recipe(simulation, config.device.eval_fraction, config.device.eval_examples)
        engine = Journal(folder / "outcomes.db", engines.build(recipe, self._say), recipe.digest)
        self._closing.callback(engine.close)
        self._store = Store(folder / "server", durable=False)
        self._closing.callback(self._store.close)
        self._journal = engine
        self._shares = np.asarray(fleet.shares, np.float64)
        floor = self._problem.floor(self._shares) if self._problem else None
        log.write(
            0.0, "fleet", seed=simulation.seed, base=simulation.base, devices=len(fleet.people), floor=floor,
            rounds=config.rounds.num_rounds, method=config.aggregator.method,
        )  # fmt: skip
        patience = config.rounds.progress_timeout
        self._tick = max(1.0, min(patience / 4, 60.0))
        host = Host(
            config, self._store, clock, poll=self._tick,
            announce=self._announce, deliver=self._deliver, record=self._record,
        )  # fmt: skip
        governor = config.governor
        thresholds = Thresholds(governor.pause_below_battery or None, governor.resume_above_battery or None)
        self._around = Surroundings(
            config, simulation.seed, clock, host, engine, planning, thresholds, log, self._trained, Spent(),
            patience / 3, None, {}, fleet.classes,
        )  # fmt: skip
        self._devices = {person.name: Device(person, self._around) for person in fleet.people}
        host.begin()
        for device in self._devices.values():
            clock.at(0.0, device.begin)
        clock.after(self._tick, self._ticks)
        if simulation.server_crashes_per_hour:
            self._next_server_crash(0)

    def run(
        self, *, stop: Callable[[], bool] = lambda: False, progress: Callable[[int, int], None] | None = None
    ) -> Outcome:
        """Let everything happen.

        Args:
            stop: asked after every event; True ends the run, which can be taken up again.
            progress: told of the rounds that are merged, and of all.

        Raises:
            KeyboardInterrupt: `stop` said so. What was computed is on the disk.
            QuorumError: nothing will happen any more, or the time is over, and rounds are left.
            EdgeRuntimeError: a device's training failed for good.
        """
        seen, rounds = -1, self._config.rounds.num_rounds
        try:
            while not self._over:
                self._step()
                if stop():
                    raise KeyboardInterrupt
                if progress is not None and seen != len(self._versions):
                    seen = len(self._versions)
                    progress(seen, rounds)
            return self._outcome()
        except QuorumError as error:
            self._say(str(error))
            return self._outcome(str(error))
        finally:
            self._closing.close()

    def _step(self) -> None:
        """The next event, and the crash that was asked for after it."""
        if not self._clock.step():
            raise QuorumError(f"nothing will happen any more; {self._standing}")
        self._kill(self._kills.get(self._clock.happened, ""))
        if self._clock.now > HOUR * self._simulation.max_hours:
            raise QuorumError(f"{self._simulation.max_hours:g} h of virtual time are over; {self._standing}")

    @property
    def _over(self) -> bool:
        phase = self._around.host.state.phase
        return phase == "over" or (phase == "finish" and not self._simulation.finish)

    @property
    def _standing(self) -> str:
        state = self._around.host.state
        return (
            f"round {state.round} of {self._config.rounds.num_rounds} is in phase '{state.phase}', with "
            f"{len(state.members)} devices, and waits for {in_words(state.late) or 'devices'}; give it more devices or "
            "other availability, or lower min_available_nodes or quorum in [rounds]"
        )

    def _ticks(self) -> None:
        patience = self._config.rounds.progress_timeout
        self._still = 0 if self._clock.pending(self._next_crash) else self._still + 1
        if self._still * self._tick > STILL * patience:
            raise QuorumError(f"nothing will happen any more; {self._standing}")
        self._clock.after(self._tick, self._ticks)
        self._around.host.turn()

    # ── between server and devices ────────────────────────────────────────────────────────────────────────────────

    def _announce(self, directive: Directive, size: int) -> None:
        around = self._around
        around.newest = directive, size
        facts = {"phase": directive.phase, "round": directive.round, "version": directive.version}
        around.log.write(self._clock.now, "directive", **facts)
        for device in self._listeners(directive):
            device.hear_later(directive, size)

    def _listeners(self, directive: Directive) -> list[Device]:
        """The devices that a Directive concerns: those that it asks, and those at work.

        What others would hear changes nothing but what they know, and they hear the newest one when they are asked.
        """
        if directive.phase != "train" or directive.sample is None:
            return list(self._devices.values())
        about = (directive.round, directive.sample)
        if self._asked[0] != about:
            self._asked = about, [device for name, device in self._devices.items() if directive.asks(name)]
        asked = self._asked[1]
        names = {device.name for device in asked}
        return [*asked, *(self._devices[name] for name in self._around.busy if name not in names)]

    def _deliver(self, client: str, message: Message, size: int) -> None:
        self._devices[client].hear_later(message, size)

    def _trained(self, directive: Directive, done: Done) -> None:
        self._judged.setdefault(directive.version, []).append((done.held_out, done.accuracy))

    def _record(self, event: Mapping[str, Any]) -> None:
        self._around.log.server(self._clock.now, event)
        if event["event"] == "update":
            self._devices[event["client"]].accounts.spent.rounds += 1
        elif event["event"] == "merge":
            self._merged(event)

    def _merged(self, event: Mapping[str, Any]) -> None:
        version = int(event["version"])
        loss = floor = None
        if self._problem is not None:
            loss = self._problem.loss(self._problem.dense(self._adapter(version)), self._shares)
            floor = self._problem.floor(self._shares)
        known = self._judged.pop(version - 1, [])
        total = self._around.total
        row = VersionRow(
            int(event["round"]), version, self._clock.now, loss, floor, _mean([loss for loss, _ in known]),
            max((layer["updates"] for layer in event["layers"].values()), default=0), float(event["truncation"]),
            total.bytes_up, total.bytes_down, total.joules,
            _mean([accuracy for _, accuracy in known if accuracy is not None]),
        )  # fmt: skip
        self._versions.append(row)
        self._around.log.write(self._clock.now, "version", **vars(row))

    def _adapter(self, version: int) -> Any:
        stored = self._store.version(version)
        if stored is None:
            raise QuorumError(f"version {version} is not in the store; report this as a bug")
        return published(load_state(stored.state))

    # ── crashes ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _kill(self, victim: str) -> None:
        if victim == "server":
            self._crash_server()
        elif victim:
            self._devices[victim].crash()

    def _crash_server(self) -> None:
        self._around.log.write(self._clock.now, "server crash")
        self._around.host.crash()

    def _next_server_crash(self, number: int) -> None:
        mean = HOUR / self._simulation.server_crashes_per_hour
        wait = float(named(self._simulation.seed, "server crash", number).exponential(mean))

        def happen() -> None:
            self._crash_server()
            self._next_server_crash(number + 1)

        self._next_crash = self._clock.after(wait, happen)

    # ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _outcome(self, problem: str = "") -> Outcome:
        now, version = self._clock.now, self._around.host.state.version
        for device in self._devices.values():
            device.close()
        for name, device in self._devices.items():
            if device.accounts.spent.joules:
                self._around.log.write(now, "spent", device=name, joules=device.accounts.spent.joules)
        why = problem or f"{len(self._versions)} rounds are merged"
        self._around.log.write(now, "end", finished=not problem, why=why)
        digest = self._adapter(version).digest() if self._store.version(version) else ""
        rows = [people.row_of(device, now) for device in self._devices.values()]
        return Outcome(not problem, why, now, self._versions, rows, self._clock.happened, self._journal.found, digest)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
