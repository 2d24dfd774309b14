"""A fleet's server that performs nothing: events happen to it, and every step is checked."""

from __future__ import annotations

import math
from typing import Any

from edge_runtime.wire.messages import Accepted, Hello, Offer, Rejected, Report, Welcome, group
from server import rounds, standing
from server.events import (
    Action,
    Announce,
    Event,
    Heard,
    Merge,
    MergeDone,
    MergeRefused,
    Moved,
    PresenceChanged,
    Refused,
    Reply,
    Stage,
    Stored,
    Tick,
)
from server.policy import Policy
from server.state import State, recounted
from tests.runtime.said import BASE, hello, offer, report, slot

CLIENTS = ("a", "b", "c", "d")
TIMEOUT = 10.0


def policy(**changes: Any) -> Policy:
    facts: dict[str, Any] = {
        "fleet": "fleet",
        "num_rounds": 2,
        "min_available_nodes": 2,
        "fraction_train": 1.0,
        "quorum": 0.5,
        "progress_timeout": TIMEOUT,
        "pause_timeout": 3 * TIMEOUT,
        "max_upload_bytes": 1000,
        "max_examples": 10**6,
        "max_members": 100,
        "seed": 0,
    }
    return Policy(**(facts | changes))


class Life:
    """A fleet's server that random events happen to: it performs nothing, and remembers what it would have to do."""

    def __init__(self, rules: Policy, *, through_json: bool = False) -> None:
        self.rules, self.through_json = rules, through_json
        self.now = 0.0
        self.staged: list[Offer] = []
        self.pending_merge = 0
        self.trace: list[tuple[str, list[Action]]] = []
        self.versions: dict[int, int] = {}
        self.accepted: list[tuple[str, int]] = []
        self.state, actions = rounds.begin("one", BASE, self.now)
        self.note(actions)

    @property
    def phase(self) -> str:
        """Where the rounds stand."""
        return self.state.phase

    @property
    def asked(self) -> str:
        """Whom the open round waits for."""
        return "".join(self.state.asked)

    def note(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Stage):
                self.staged.append(action.offer)
            elif isinstance(action, Merge):
                self.pending_merge = action.round
        self.trace.append((self.state.model_dump_json(), actions))

    def happen(self, event: Event) -> list[Action]:
        before = self.state
        dumped = before.model_dump_json()
        if self.through_json:
            before = State.model_validate_json(dumped)
        after, actions = rounds.step(before, event, self.now, self.rules)
        assert before.model_dump_json() == dumped, "the former state is a value"
        assert rounds.step(before, event, self.now, self.rules) == (after, actions), "the same gives the same"
        check_step(before, event, after, actions, self.now, self.rules)
        self.state = after
        self.versions[after.round] = after.version
        if isinstance(event, Stored) and after.filled > before.filled:
            self.accepted.append((event.offer.client, event.offer.round))
            assert len(set(self.accepted)) == len(self.accepted), "nothing is merged twice"
            assert after.version - event.offer.version <= self.rules.reach
        self.note(actions)
        return actions

    def restart(self) -> None:
        self.pending_merge = 0
        written = standing.dump(self.state)
        self.state, actions = rounds.resume(standing.load(written.text, written.members.items()), self.now)
        self.note(actions)

    def merge_done(self) -> None:
        self.pending_merge = 0
        self.happen(MergeDone(self.state.version + 1))

    def current(self, client: str, round_number: int | None = None, **changes: Any) -> Offer:
        """An offer of a round, the open one if none is said, trained from the version that was current then."""
        number = max(1, self.state.round if round_number is None else round_number)
        version = self.versions.get(number, self.state.version)
        return offer(client, number, **changes).model_copy(update={"version": version})

    def merge_refused(self) -> None:
        self.pending_merge = 0
        self.happen(MergeRefused())

    def move(self, kind: str, who: int, how: int) -> None:
        """One random event, as far as it can happen now."""
        client = CLIENTS[who]
        match kind:
            case "restart":
                self.restart()
            case "merged" if self.pending_merge:
                self.merge_done()
            case "unmergeable" if self.pending_merge:
                self.merge_refused()
            case "tick":
                self.now += (0.5, TIMEOUT / 2, TIMEOUT + 1)[how % 3]
                self.happen(Tick())
            case "stored" | "refused" | "moved" if self.staged:
                self.happen(self.of_upload(kind, self.staged[how % len(self.staged)]))
            case "hello" | "offer" | "report" | "presence" | "stranger":
                self.happen(self.of_device(kind, client, how))

    def of_upload(self, kind: str, staged: Offer) -> Event:
        corrupt = Rejected(code="corrupt", reason="bytes", sha256=staged.blob.sha256)
        events: dict[str, Event] = {
            "stored": Stored(staged),
            "refused": Refused(staged, corrupt),
            "moved": Moved(staged),
        }
        return events[kind]

    def of_device(self, kind: str, client: str, how: int) -> Event:
        number = max(0, self.state.round + (0, 0, 0, 1, -1, 0)[how])
        payload = b"x" * 2000 if how == 5 else f"{client} {number} {how % 2}".encode()
        events: dict[str, Event] = {
            "hello": Heard(hello(client, examples=1 + how // 2)),
            "offer": Heard(self.current(client, number, payload=payload)),
            "report": Heard(report(client, ("training", "done", "failed", "planned", "offering", "exporting")[how])),
            "presence": PresenceChanged(client, online=how % 2 == 0),
            "stranger": Heard(self.of_stranger(how)),
        }
        return events[kind]

    def of_stranger(self, how: int) -> Hello | Offer | Report:
        if how > 2 and self.state.members:  # the first member would fix the shapes
            return hello("f", groups=group(slot(d_in=20)))
        return (hello("e", base="c" * 64), offer("g"), report("h", "failed"))[how % 3]


def check_step(
    before: State, event: Event, after: State, actions: list[Action], now: float, rules: Policy
) -> None:  # fmt: skip
    """What every single step keeps to."""
    legal = {
        "gather": {"train"},
        "train": {"merging"},
        "merging": {"train", "finish"},
        "finish": {"over"},
        "over": set(),
    }
    path = {before.phase} | legal[before.phase] | {far for near in legal[before.phase] for far in legal[near]}
    assert after.phase in path
    if after.round != before.round:
        assert after.round == before.round + 1
        assert before.phase == "gather" or isinstance(event, MergeDone | MergeRefused)
    if isinstance(event, MergeDone):
        assert after.version == event.version
    else:
        assert after.version == before.version
    if rules.mode == "buffered":
        assert after.filled >= before.filled or after.round != before.round or after.phase == "finish"
    if after.round == before.round and after.phase != "finish":
        assert before.stored.items() <= after.stored.items(), "a stored update is lost"
    assert set(after.stored) >= set(before.stored) or isinstance(event, MergeDone | MergeRefused)
    assert set(after.asked) <= set(after.members)
    assert list(after.asked) == sorted(set(after.asked))
    assert recounted(after).tally == after.tally, "what is counted as it goes is what there is"
    assert after.tally.asked == len(after.asked)
    assert after.tally.late == len(after.late)
    if (after.phase, after.round) != (before.phase, before.round) and after.phase != "merging":
        assert announced(actions), "devices must hear where the fleet stands"
    for action in actions:
        if isinstance(action, Merge):
            check_merge(before, after, action, now, rules)
    check_answers(before, event, after, actions)


def announced(actions: list[Action]) -> bool:
    """Whether the fleet is told where it stands."""
    return any(isinstance(action, Announce) for action in actions)


def check_merge(before: State, after: State, action: Merge, now: float, rules: Policy) -> None:
    assert (after.phase, after.round, before.phase) == ("merging", action.round, "train")
    stalled = now - before.progress_at > rules.progress_timeout
    if not after.filled:
        here = [member for member in after.members.values() if member.online and member.ended is None]
        assert stalled
        assert here
        assert not after.asked
        return
    asked = max(1, len(after.asked))
    if rules.mode == "buffered":
        needed = rules.buffer_size or math.ceil(asked / 2)
        assert needed > 1 or after.filled == 1, "a full buffer waits for nobody"
    else:
        needed = after.needed or asked
        assert len(after.stored) == after.filled
    enough = max(1, math.ceil(rules.quorum * min(needed, asked)))
    all_there = set(after.asked) <= set(after.stored)
    full = (rules.mode == "buffered" or after.needed > 0) and after.filled >= needed
    assert all_there or full or (stalled and after.filled >= enough)


def takes(before: State, after: State, kept: Offer) -> bool:
    """Whether the open round has this update now, and did not have it before."""
    known = after.members[kept.client]
    if after.round == before.round and after.phase in {"train", "merging"}:
        assert after.filled - before.filled in {0, 1}
        return after.filled > before.filled and (known.delivered, known.sha256) == (kept.round, kept.blob.sha256)
    return False


def check_answers(before: State, event: Event, after: State, actions: list[Action]) -> None:
    """Whoever says hello or makes an offer hears exactly one answer, or is asked for the chunks."""
    answers = [action for action in actions if isinstance(action, Reply | Stage)]
    match event:
        case Heard(Hello() as said):
            [answer] = answers
            assert isinstance(answer, Reply)
            assert answer.client == said.client
            assert isinstance(answer.message, Welcome if after.members.get(said.client) else Rejected)
        case Heard(Offer() as said):
            [answer] = answers
            if isinstance(answer, Stage):
                assert answer.offer == said
            else:
                assert answer.client == said.client
                assert isinstance(answer.message, Accepted | Rejected)
                assert answer.message.sha256 == said.blob.sha256
        case Stored(kept):
            [answer] = answers
            assert isinstance(answer, Reply)
            assert answer.client == kept.client
            known = before.members[kept.client]
            again = (known.delivered, known.sha256) == (kept.round, kept.blob.sha256)
            accepted = answer.message == Accepted(sha256=kept.blob.sha256, round=kept.round)
            assert accepted == (again or takes(before, after, kept)), "accepted is what is merged, and nothing else"
        case _:
            pass
