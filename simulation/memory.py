"""What a simulated device has on its disk, and what it has spent: values of one device, without any I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edge_runtime.state import OF_THE_DEVICE
from edge_runtime.wire.messages import Offer
from simulation.stored import Blob
from simulation.work import Done


@dataclass(eq=False)
class Disk:
    """What outlives a crash; the meanings are those of `edge_runtime.state.DeviceState`.

    Attributes:
        run: the life of the fleet that it is in.
        settled: the last round whose update was accepted or given up.
        outbox: the update that is not accepted yet.
        owed: what updates owe.
        once_accepted: what they will owe when the update in the outbox is accepted.
        kept: what the device keeps for itself.
        facts: that it remembers.
        bands: SHA-256 → payload of what it has fetched.
        progress: key of the task under way, and the seconds of it that are on the disk.
        uploading: SHA-256 of the update that is being sent. This and the next the server remembers for it.
        uploaded: bytes of it that are there.
    """

    run: str = ""
    settled: int = 0
    outbox: tuple[Offer, Blob] | None = None
    owed: Blob | None = None
    once_accepted: Blob | None = None
    kept: Blob | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    bands: dict[str, bytes] = field(default_factory=dict)
    progress: tuple[str, float] = ("", 0.0)
    uploading: str = ""
    uploaded: float = 0.0

    def put_outbox(self, offer: Offer, done: Done) -> None:
        """Keep an update until `settle`, with what follows from its round."""
        self.outbox, self.once_accepted = (offer, done.payload), done.residual
        self.kept = self.kept if done.private is None else done.private
        self.facts.update(done.facts)
        self.progress = ("", 0.0)

    def settle(self, number: int, *, arrived: bool) -> None:
        """The update is accepted, or given up: then what was owed before is owed still."""
        if arrived and self.outbox is not None:
            self.owed = self.once_accepted
        self.outbox = self.once_accepted = None
        self.settled = max(number, self.settled)

    def adopt(self, run: str) -> None:
        """Begin another life of the fleet."""
        facts = {name: value for name, value in self.facts.items() if name in OF_THE_DEVICE}
        for name, value in vars(Disk(run=run, facts=facts)).items():
            setattr(self, name, value)


@dataclass(eq=False)
class Spent:
    """What a device has spent since the simulation began: seconds by kind, bytes, joules.

    Attributes:
        seconds: kind of span → seconds.
        bytes_up: sent.
        bytes_down: received.
        joules: of its work for the fleet.
        crashes: of it.
        rounds: whose updates were accepted.
        held_out: loss of the last version that it trained from.
        personal: loss of its personal adapter.
        accuracy: of that version; None where no tokens are said.
        personal_accuracy: of its personal adapter, likewise.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    joules: float = 0.0
    crashes: int = 0
    rounds: int = 0
    held_out: float | None = None
    personal: float | None = None
    accuracy: float | None = None
    personal_accuracy: float | None = None

    def judged(self, done: Done) -> None:
        """Remember how good what it received was, and what it has made of it for itself."""
        self.held_out, self.accuracy = done.held_out, done.accuracy
        self.personal, self.personal_accuracy = done.personal, done.personal_accuracy
