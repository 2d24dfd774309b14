"""Which states of its rounds a device keeps, where, and when one of them is the beginning of a round.

Two files: the round in progress, written every so many steps or seconds; and the last finished round. The second one
answers two questions. A device that was killed after its round and before its update was safe elsewhere is asked for
the same round again, and has it at once. And the next round may begin with the moments of this one.

A state is good for a round only if all that decides the round's result is the same: the round's key says so, and what
was carried into it counts as well. So a round ends in the same bytes however often it was interrupted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edge_runtime.lora.adapter import Matrix
from edge_runtime.train import round_file
from edge_runtime.train.carrying import carried
from edge_runtime.train.optimizer import Array
from edge_runtime.train.resume import RoundState

IN_PROGRESS = "round.safetensors"
FINISHED = "last-round.safetensors"

Beside = Callable[[RoundState, int], Mapping[str, Array]]
"""(the end of an earlier round, rounds from that one to this) → what stands beside the new round's state."""


@dataclass(frozen=True)
class Keeping:
    """Where states are kept, and how often: whichever of steps and seconds comes first.

    Attributes:
        folder: of this device alone.
        every_steps: optimiser steps that a kill may cost at most.
        every_seconds: seconds after which a step is followed by a write.
        clock: seconds, from any origin.
    """

    folder: Path
    every_steps: int = 10
    every_seconds: float = 60.0
    clock: Callable[[], float] = time.monotonic


def apart(keeping: Keeping | None) -> Keeping | None:
    """Where training is kept that is no round of the fleet's, so that no round goes on from it."""
    return keeping and replace(keeping, folder=keeping.folder / "personal-round")


@dataclass(frozen=True)
class RoundName:
    """Which round a state is of.

    Attributes:
        number: of the round in its fleet.
        key: of all that decides the round's result, but for the moments that it begins with; see `key_of`.
        lineage: of all that two rounds must share for the moments of one to mean something in the other.
        optimizer: of the round.
    """

    number: int
    key: str
    lineage: str
    optimizer: str


def key_of(*parts: object) -> str:
    """A digest of values whose `repr` tells them apart."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class _Held:
    """A state in memory, for a device that keeps none on disk."""

    labels: Mapping[str, str]
    state: RoundState


class KeptRounds:
    """The rounds of one trainer: on disk if it has a place there, in memory if not.

    A file that is damaged, of another program or of another round is told about and ignored; one that cannot be written
    is told about, and training goes on without it.

    Args:
        keeping: where and how often; None to keep in memory only what this process itself may come back to.
        say: told a sentence for people.
    """

    def __init__(self, keeping: Keeping | None, say: Callable[[str], None]) -> None:
        self._keeping, self._say = keeping, say
        self._interrupted: _Held | None = None
        self._last: _Held | None = None
        self._labels: Mapping[str, str] = {}
        self._steps, self._since = 0, 0.0
        self._finished = self._carry = False
        self._number = 0

    def begin(
        self,
        name: RoundName,
        parameters: Callable[[], dict[str, Matrix]],
        *,
        carry: bool,
        beside: Beside | None = None,
    ) -> RoundState | None:
        """What a round begins with: its own state, else what it takes over from the last one, else nothing.

        Args:
            name: the round.
            parameters: gives copies of those that are trained, as they are now.
            carry: whether moments of an earlier round are wanted.
            beside: makes what shall stand beside the new round's state from an earlier one; None where nothing shall.
        """
        self._carry = carry or beside is not None
        start = self._result_of(name)
        self._finished = start is not None
        if start is None:
            before = self._before(name) if self._carry else ""
            full = key_of(name.key, before)
            self._labels = {"key": name.key, "full": full, "lineage": name.lineage, "round": str(name.number)}
            start = self._resumed(full) or (self._following(name, parameters, carry, beside) if before else None)
        self._interrupted = None  # used up, or of no more use
        self._wrote()
        return start

    def stepped(self, state: Callable[[], RoundState]) -> None:
        """After each step: write the state if it is time to; only then is it asked for."""
        self._steps += 1
        keeping = self._keeping
        if keeping and (self._steps >= keeping.every_steps or keeping.clock() - self._since >= keeping.every_seconds):
            self._write(IN_PROGRESS, state())
            self._wrote()

    def interrupted(self, state: RoundState) -> None:
        """The round ends early, and may be taken up again: in this process or, with a place on disk, in another."""
        if state.reports and not self._write(IN_PROGRESS, state):
            self._interrupted = _Held(self._labels, state)

    def finished(self, state: RoundState) -> None:
        """The round is complete: its state is the last one from now on."""
        if self._finished:
            return  # it came from there
        if self._write(FINISHED, state):
            # In this order: between the two, the round is there twice, and never not at all.
            self._path(IN_PROGRESS).unlink(missing_ok=True)
        elif self._carry:
            self._last = _Held(self._labels, state)

    def forget(self) -> None:
        """Let go what memory holds of an interrupted round: it will not be taken up again."""
        self._interrupted = None

    def _path(self, file: str) -> Path:
        if self._keeping is None:
            raise ValueError("nothing is kept on disk here")
        return self._keeping.folder / file

    def _wrote(self) -> None:
        self._steps, self._since = 0, self._keeping.clock() if self._keeping else 0.0

    def _write(self, file: str, state: RoundState) -> bool:
        """Whether the state is on disk now."""
        if self._keeping is None:
            return False
        try:
            round_file.write(self._path(file), state, self._labels)
        except OSError as error:
            self._say(f"the round's state could not be kept ({error}); training goes on, a restart would begin it anew")
            return False
        return True

    def _result_of(self, name: RoundName) -> RoundState | None:
        """The end of this very round, if it was reached and then lost on its way to the server."""
        if self._keeping is None:
            return None
        path = self._path(FINISHED)
        if round_file.look(path).labels.get("key") != name.key:
            return None
        return self._told(round_file.read(path))

    def _before(self, name: RoundName) -> str:
        """What tells the last finished round from all others, if its moments may be carried into this one."""
        labels = self._last.labels if self._last else {}
        if self._keeping is not None and not labels:
            found = round_file.look(self._path(FINISHED))
            labels = found.labels
            if found.problem:
                self._say(found.problem)
        # A fleet that began anew counts from 1 again: what was learned of another life is not carried over.
        earlier = bool(labels) and labels.get("lineage") == name.lineage and int(labels["round"]) < name.number
        self._number = int(labels["round"]) if earlier else 0
        return labels["full"] if earlier else ""

    def _resumed(self, full: str) -> RoundState | None:
        held = self._interrupted
        if held is not None:
            return held.state if held.labels["full"] == full else None
        if self._keeping is None:
            return None
        path = self._path(IN_PROGRESS)
        found = round_file.look(path)
        if found.problem:
            self._say(found.problem)
        elif found.labels and found.labels.get("full") != full:
            self._say(
                f"{path} is of another round, plan or data set (round {found.labels.get('round')}); it is ignored"
            )
        elif found.labels:
            return self._told(round_file.read(path))
        return None

    def _following(
        self, name: RoundName, parameters: Callable[[], dict[str, Matrix]], carry: bool, beside: Beside | None
    ) -> RoundState | None:
        """The beginning of a round that takes something over from the last one."""
        last = self._last.state if self._last else self._told(round_file.read(self._path(FINISHED)))
        if last is None:
            return None
        start = RoundState((), parameters(), {}, 0)
        if carry:
            found = carried(last, start.parameters, name.optimizer)
            self._say(f"the optimiser remembers the last round in {found.kept} of {found.layers} layers")
            start = found.start
        return start if beside is None else replace(start, beside=beside(last, name.number - self._number))

    def _told(self, found: tuple[RoundState | None, str]) -> RoundState | None:
        state, problem = found
        if problem:
            self._say(problem)
        return state
