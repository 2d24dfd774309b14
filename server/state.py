"""What the rounds remember: a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter

from edge_runtime.wire.messages import Model, Name, Report, Sample
from edge_runtime.wire.sampling import FULL, number_of
from server.fleet import Member
from server.rows import Rows


class Tally(Model):
    """How many members something is true of: kept beside them, because to count 100,000 takes long.

    Attributes:
        online: their presence says so.
        unfinished: online, and their fleet life is not over.
        asked: the open round waits for their update, or has it.
        late: the open round waits for their update.
    """

    online: int = 0
    unfinished: int = 0
    asked: int = 0
    late: int = 0


_MEMBERS: TypeAdapter[dict[str, Member]] = TypeAdapter(dict[Name, Member])


def _rows(found: object) -> Rows[Member]:
    return found if isinstance(found, Rows) else Rows(_MEMBERS.validate_python(found))


Members = Annotated[
    Rows[Member], PlainValidator(_rows), PlainSerializer(dict, return_type=dict[str, Member], when_used="always")
]
NOBODY, EVERYBODY = Sample(seed=0, below=0), Sample(seed=0, below=FULL)


class State(Model):
    """Everything the rounds remember; durable as JSON, see `server.standing`.

    Attributes:
        run: names this life of the fleet; a new store begins another.
        phase: see the drawing in `server.rounds`.
        round: the round that is open, or was last; 0 before the first. In buffered mode, that of the open buffer.
        version: of the global adapter that the current round trains from.
        base: fingerprint of the fleet's base; None until the first device, unless the fleet's file names one.
        members: device name → what is known of it.
        sample: whom the open round asks.
        past: whom the rounds before asked, the latest first; as many as an update may be versions behind.
        needed: updates that suffice without waiting for anybody; 0 for those of all that are asked.
        filled: updates that the open round has.
        tally: counts of members.
        progress_at: when something last moved.
    """

    run: Name
    phase: Literal["gather", "train", "merging", "finish", "over"] = "gather"
    round: int = 0
    version: int = 0
    base: str | None = None
    members: Members = Field(default_factory=Rows)
    sample: Sample = NOBODY
    past: tuple[Sample, ...] = ()
    needed: int = 0
    filled: int = 0
    tally: Tally = Tally()
    progress_at: float = 0.0

    # What follows looks at all members: for people, tests, and the few moments that concern all.

    @property
    def asked(self) -> tuple[Name, ...]:
        """The devices whose updates the open round waits for, or has."""
        return tuple(sorted(name for name, member in self.members.items() if counts(self, member).asked))

    @property
    def late(self) -> tuple[Name, ...]:
        """The devices whose updates the open round waits for."""
        return tuple(sorted(name for name, member in self.members.items() if counts(self, member).late))

    @property
    def stored(self) -> Mapping[Name, str]:
        """Device name → SHA-256 of its update of the open round, trained from the current version."""
        return {name: member.sha256 for name, member in self.members.items() if 0 < self.round == member.delivered}

    @property
    def ended(self) -> Mapping[Name, Report]:
        """Devices whose fleet life is over: their last report said done or failed."""
        return {name: member.ended for name, member in self.members.items() if member.ended is not None}

    @property
    def paused(self) -> Mapping[Name, float]:
        """Device name → when it first said that it pauses."""
        return {name: member.paused for name, member in self.members.items() if member.paused is not None}


def asks(state: State, name: str, round_number: int) -> bool:
    """Whether a round asks this device; of rounds that are too long ago, no."""
    back = state.round - round_number
    if not 0 <= back <= len(state.past):
        return False
    sample = state.past[back - 1] if back else state.sample
    return sample.below == FULL or number_of(sample.seed, round_number, name) < sample.below


def counts(state: State, member: Member | None) -> Tally:
    """What one member adds to the tally."""
    if member is None:
        return Tally()
    unfinished = member.online and member.ended is None
    here = member.ended is None and (member.online or member.there == state.round) and member.excused != state.round
    done = member.delivered >= state.round
    open_ = state.phase in {"train", "merging"} and (here or done) and asks(state, member.hello.client, state.round)
    return Tally(online=member.online, unfinished=unfinished, asked=open_, late=open_ and not done)


def put(state: State, member: Member) -> State:
    """The state in which this is what is known of a device."""
    name = member.hello.client
    before = state.members.get(name)
    if before == member:
        return state
    was, now = counts(state, before), counts(state, member)
    tally = {field: getattr(state.tally, field) + getattr(now, field) - getattr(was, field) for field in _FIELDS}
    return state.model_copy(update={"members": state.members.put(name, member), "tally": Tally(**tally)})


def recounted(state: State) -> State:
    """The state with a tally that is counted anew: after a change of what is counted."""
    sums = dict.fromkeys(_FIELDS, 0)
    for member in state.members.values():
        for field, value in counts(state, member):
            sums[field] += value
    return state.model_copy(update={"tally": Tally(**sums)})


_FIELDS = tuple(Tally.model_fields)
