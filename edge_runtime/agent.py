"""One device's protocol: event in → state and actions out. No I/O, no clock, no randomness.

    joining ──directive, plan──▶ hello ──train──▶ fetch ▶ train ▶ offer ⇄ need ▶ accepted ──▶ idle ──▶ … finish ▶ left
                  ▲                                         │
                  └───────── memory did not suffice ────────┘

`client` performs the actions and feeds back what happened; `simulation` does the same in virtual time. A device obeys
the Directive and never learns by which method the server merges. Whatever the broker forgets, the device says again on
`Repeat`; whatever comes twice has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from edge_runtime.trainer import AdapterSpec, Training
from edge_runtime.wire.messages import Accepted, Directive, Hello, Message, Need, Offer, Rejected, Welcome


@dataclass(frozen=True)
class State:
    """What a device remembers.

    Attributes:
        client: its name.
        run: the life of the fleet that `outbox` and `settled` belong to; durable. A server with a new store begins one.
        directive: the newest one; None before the first.
        hello: what it said of itself; None until it has planned.
        welcomed: whether the server answered that hello.
        outbox: the update that is not accepted yet; durable.
        settled: the last round whose update was accepted or given up; durable.
        busy: the work that the shell is doing now.
        work: the directive that it fetches for.
        left: its fleet life is over.
        instance: tells this process from another device of the same name.
    """

    client: str
    run: str = ""
    directive: Directive | None = None
    hello: Hello | None = None
    welcomed: bool = False
    outbox: Offer | None = None
    settled: int = 0
    busy: Literal["", "planning", "fetching", "training", "finishing"] = ""
    work: Directive | None = None
    left: bool = False
    instance: str = ""


# ── events ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Received:
    """A control message from the server."""

    message: Message


@dataclass(frozen=True)
class Planned:
    """The shell made a plan; this is how the device introduces itself."""

    hello: Hello


@dataclass(frozen=True)
class Fetched:
    """All bands of the version that this device holds are here and verified."""

    version: int


@dataclass(frozen=True)
class Trained:
    """Local training for this life of the fleet ended; the update is durable in the outbox."""

    offer: Offer
    run: str


@dataclass(frozen=True)
class Recut:
    """The update in the outbox travels in chunks of another size from now on; durable."""

    offer: Offer


@dataclass(frozen=True)
class Exhausted:
    """Memory did not suffice for the work under way; it needs a smaller plan, and then to be done again."""


@dataclass(frozen=True)
class Nothing:
    """This round gives no update, and is settled."""

    round: int


@dataclass(frozen=True)
class Finished:
    """The personal adapter is made and reported."""


@dataclass(frozen=True)
class Repeat:
    """Time passed, or the connection is new: say again what has not been answered."""


Event = Received | Planned | Fetched | Trained | Nothing | Recut | Exhausted | Finished | Repeat

# ── actions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Say:
    """Send this to the server."""

    message: Hello | Offer


@dataclass(frozen=True)
class MakePlan:
    """Probe, plan for this kind of adapter and rounds like these, and answer with Planned, or with Exhausted."""

    spec: AdapterSpec
    training: Training


@dataclass(frozen=True)
class Fetch:
    """Get the bands of the directive's version that this device holds, and answer with Fetched.

    Takes the place of a fetch that is under way. The directive need not be the newest one.
    """

    directive: Directive


@dataclass(frozen=True)
class Train:
    """Train as the directive says, put the update into the outbox, and answer with Trained, or with Exhausted."""

    directive: Directive


@dataclass(frozen=True)
class SendChunks:
    """Publish these chunks of the offered blob."""

    offer: Offer
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Settle:
    """Forget the outbox and remember, durably, that this round is settled; `arrived` says whether its update counts."""

    round: int
    arrived: bool = True


@dataclass(frozen=True)
class Adopt:
    """Remember, durably, that this is the fleet's life we are in, and forget what belonged to a former one."""

    run: str


@dataclass(frozen=True)
class Finish:
    """Make the personal adapter from the directive's version, report it, and answer with Finished, or Exhausted."""

    directive: Directive


@dataclass(frozen=True)
class Wait:
    """Tell people that the server cannot take it now; what was said is said again on `Repeat`."""

    refusal: Rejected


@dataclass(frozen=True)
class Leave:
    """The device's fleet life is over; `refusal` says why, if it was the server's will."""

    refusal: Rejected | None = None


Action = Say | MakePlan | Fetch | Train | SendChunks | Settle | Adopt | Finish | Wait | Leave


def start(client: str, run: str, outbox: Offer | None, settled: int, instance: str = "") -> State:
    """A device that starts, or starts again, with what its disk remembers."""
    return State(client=client, run=run, outbox=outbox, settled=settled, instance=instance)


def step(state: State, event: Event) -> tuple[State, list[Action]]:
    """The next state, and what must be done, for one event."""
    actions: list[Action] = []
    match event:
        case Received(message):
            state, actions = _received(state, message)
        case Planned(hello):
            # A new plan is news to the server, even if it knows the device.
            state, actions = replace(state, hello=hello, welcomed=False, busy=""), [Say(hello)]
        case Fetched(version):
            return _fetched(state, version)
        case Trained(offer, run):
            state = replace(state, busy="")
            # While it trained, the fleet may have begun anew; then there is nobody to take this update.
            if run == state.run:
                state, actions = replace(state, outbox=offer), [Say(offer)]
        case Nothing(number):
            state, actions = _settle(replace(state, busy=""), number, arrived=False)
        case Recut(offer) if state.outbox and state.outbox.blob.sha256 == offer.blob.sha256:
            state, actions = replace(state, outbox=offer), [Say(offer)]
        case Exhausted():
            # As for a device that comes new: the server must know its new rank before it trains with it.
            state = replace(state, hello=None, welcomed=False, busy="")
        case Finished():
            return replace(state, busy="", left=True), [Leave()]
        case Repeat():
            actions = _unanswered(state)
    after, more = _advance(state)
    return after, [*actions, *more]


def _received(state: State, message: Message) -> tuple[State, list[Action]]:
    match message:
        case Directive() as directive:
            return _directed(state, directive)
        case Welcome():
            # What waited in the outbox while we were strangers is offered now.
            return replace(state, welcomed=True), [Say(state.outbox)] if state.outbox else []
        case Need() as need if state.outbox and state.outbox.blob.sha256 == need.sha256:
            return state, [SendChunks(state.outbox, need.ranges)]
        case Accepted() as accepted if state.outbox and state.outbox.blob.sha256 == accepted.sha256:
            return _settle(state, state.outbox.round, arrived=True)
        case Rejected() as refusal:
            return _rejected(state, refusal)
        case _:
            return state, []


def _directed(state: State, directive: Directive) -> tuple[State, list[Action]]:
    before = state.directive
    if before and before.run == directive.run and _progress(directive) < _progress(before):
        return state, []  # a broker that repeats, or keeps an older memory, takes no fleet back
    state = replace(state, directive=directive)
    if state.busy == "fetching" and state.work is not None:
        work = _fetched_for(state.work, directive)
        state = replace(state, work=work, busy="fetching" if work else "")
    if before and before.adapter != directive.adapter:
        # The plan was made for another kind of adapter.
        state = replace(state, hello=None, welcomed=False)
    if directive.run == state.run:
        return state, []
    # The fleet began anew: nothing that was trained for its former life has a meaning in this one.
    state = replace(state, run=directive.run, outbox=None, settled=0, welcomed=False)
    return state, [Adopt(directive.run), *([Say(state.hello)] if state.hello else [])]


def _progress(directive: Directive) -> tuple[int, int]:
    """How far a life of the fleet has come: it never goes back."""
    return directive.round, directive.version


def _fetched_for(work: Directive, directive: Directive) -> Directive | None:
    """What the fetch under way is for after a new directive; None if another must begin."""
    if _wants(work) == _wants(directive):
        return directive
    # A slow device would never have a version whole if it began anew with each. What is out of reach may never come:
    # its bands are not published again.
    behind, train = directive.version - work.version, "train"
    alike = work.run == directive.run and work.adapter == directive.adapter and work.phase == directive.phase == train
    return work if alike and 0 < behind <= directive.max_staleness and _chunks(work) == _chunks(directive) else None


def _wants(directive: Directive) -> object:
    """What a fetch depends on: two directives that agree in it ask for the same bands."""
    return directive.run, directive.version, directive.adapter, directive.bands


def _chunks(directive: Directive) -> set[int]:
    """Into what bands are cut: when a broker takes less than before, the older versions are cut anew as well."""
    return {band.blob.chunk_bytes for band in directive.bands}


def _unanswered(state: State) -> list[Action]:
    said: list[Action] = []
    if state.hello and not state.welcomed:
        said.append(Say(state.hello))
    elif state.outbox:
        said.append(Say(state.outbox))
    return said


def _settle(state: State, round_number: int, *, arrived: bool) -> tuple[State, list[Action]]:
    return replace(state, outbox=None, settled=max(state.settled, round_number)), [Settle(round_number, arrived)]


def _rejected(state: State, refusal: Rejected) -> tuple[State, list[Action]]:
    match refusal.code:
        case "fingerprint" | "shape" | "not-enrolled" | "revoked" if not refusal.key:
            return replace(state, left=True), [Leave(refusal)]
        case "unknown-client":
            # The server lost its memory of us, or never heard us: introduce ourselves, then offer again.
            again: list[Action] = [Say(state.hello)] if state.hello else []
            return replace(state, welcomed=False), again
        case "duplicate" if refusal.instance == state.instance:
            return replace(state, left=True), [Leave(refusal)]
        case "quota" | "no-space" | "fleet-full" | "malformed":
            return state, [Wait(refusal)]
        case "round-closed" | "too-large" | "corrupt" | "norm" | "examples" | "kind":
            if state.outbox and state.outbox.blob.sha256 == refusal.sha256:
                return _settle(state, state.outbox.round, arrived=False)
    return state, []


def _advance(state: State) -> tuple[State, list[Action]]:
    """Begin the next piece of work, if the directive asks for one and none is under way."""
    directive = state.directive
    if directive is None or state.busy or state.left:
        return state, []
    if state.hello is None:
        return replace(state, busy="planning"), [MakePlan(directive.adapter, directive.training)]
    if _wanted(state, state.hello, directive):
        return replace(state, busy="fetching", work=directive), [Fetch(directive)]
    return state, []


def _wanted(state: State, hello: Hello, directive: Directive) -> bool:
    """Whether the directive asks this device for work that it has not done yet."""
    if directive.phase == "finish":
        # Directive and bands are retained, so whoever comes late can finish although the server may be gone.
        return state.welcomed or hello.base == directive.base
    due = directive.phase == "train" and directive.asks(state.client) and directive.round > state.settled
    return due and state.welcomed and state.outbox is None


def _fetched(state: State, version: int) -> tuple[State, list[Action]]:
    """Use a version that has arrived, unless the fleet has moved on in the meantime."""
    work = state.work
    if state.busy != "fetching" or state.hello is None or work is None or work.version != version:
        return state, []
    if state.left or not _wanted(state, state.hello, work):
        return _advance(replace(state, busy="", work=None))
    state = replace(state, work=None)
    if work.phase == "finish":
        return replace(state, busy="finishing"), [Finish(work)]
    return replace(state, busy="training"), [Train(work)]
