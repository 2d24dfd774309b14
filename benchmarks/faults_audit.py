"""What a fleet that was killed again and again came to, by the devices' own records.

Every version is computed once more, from nothing but the updates that devices wrote down when they made them, the
method, and the answers that were given: an update that somebody was told is accepted must be in the aggregate, once,
and no other may be. The server's store is looked at only to compare.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from benchmarks.faults_part import shapes
from edge_runtime import config as settings
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import changed, cut
from edge_runtime.wire import bands, codec
from edge_runtime.wire.messages import Offer
from server import aggregators
from server.aggregators.method import Aggregator, State, Update, load_state, save_state
from server.store import Store

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        rounds: how many there should be.
        ended: rounds whose version is in the store and equals its recomputation, bit for bit.
        accepted: updates that were accepted.
        lost: accepted updates that a version lacks.
        doubled: updates that a version holds twice, and second updates of a device that a round accepted.
        unexplained: versions that differ otherwise.
        denied: accepted updates whose devices heard first that they were refused.
        left_out: (round, device) pairs without an accepted update, although the device lived all the while.
        missed: the same, where it was dead for a part of the round.
        finished: whether server and devices came to their end.
        resumed: uploads that were interrupted and went on.
        resumed_bytes: what the server had stored of them, each chunk once.
        resent_bytes: of these, what devices published again after it was stored.
        again_bytes: chunks of any upload that arrived at the server again after they were stored: what devices sent
            again, what their MQTT clients sent again, and what the broker delivered again.
        stored_bytes: chunks of all uploads, each once.
        mid_upload: times between the first and the last stored chunk of each upload.
    """

    rounds: int
    ended: int
    accepted: int
    lost: int
    doubled: int
    unexplained: int
    denied: int
    left_out: int
    missed: int
    finished: bool
    resumed: int
    resumed_bytes: int
    resent_bytes: int
    again_bytes: int
    stored_bytes: int
    mid_upload: tuple[tuple[float, float], ...]


def audit(folder: Path) -> Audit:
    """Audit a fleet in its folder; all its processes have ended."""
    made = json.loads((folder / "devices.json").read_text(encoding="utf-8"))
    journals = {name: list(read(folder / "journal" / f"{name}.jsonl")) for name in ("server", *made["ranks"])}
    config = settings.load(folder / "fleet.toml")
    answers = Answers.of(journals)
    store = Store(folder / "server")
    try:
        versions = {}
        for number in store.versions():
            stored = store.version(number)
            if stored is not None:
                versions[number] = stored.state
        saved = store.rounds()
    finally:
        store.close()
    method = aggregators.build(config.aggregator.method, **(config.aggregator.model_extra or {}))
    rank = config.aggregator.rank or method.server_rank(config.adapter.max_rank)
    state = method.init(shapes(made["layers"], made["width"]), rank, config.training.seed)
    book = Recomputed(config, method, folder / "journal" / "payloads")
    ended = lost = doubled = unexplained = 0
    for number in range(1, config.rounds.num_rounds + 1):
        sure, unsure = answers.of_round(number)
        doubled += len(sure) - len({offer.client for offer in sure})
        found = book.explain(state, sure, unsure, versions.get(number))
        ended += found.clean
        lost, doubled, unexplained = lost + found.lost, doubled + found.doubled, unexplained + found.unexplained
        if number not in versions:
            break
        state = load_state(versions[number])
    phase = json.loads(saved)["phase"] if saved else "nothing"
    clients = set(made["ranks"])
    kills = json.loads((folder / "kills.json").read_text(encoding="utf-8"))
    absent = [
        dead_during(client, span, kills, journals[client])
        for number, span in spans_of(journals["server"]).items()
        for client in clients - {offer.client for offer in answers.of_round(number)[0]}
    ]
    return Audit(
        rounds=config.rounds.num_rounds,
        ended=ended,
        accepted=len(answers.told),
        lost=lost,
        doubled=doubled,
        unexplained=unexplained,
        denied=len(answers.denied & answers.told),
        left_out=absent.count(False),
        missed=absent.count(True),
        finished=phase == "over" and all(any(line["what"] == "left" for line in journals[name]) for name in clients),
        **traffic(journals),
    )


def read(path: Path) -> Iterator[Line]:
    """The lines of a journal; one that a kill cut is none."""
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def spans_of(lines: Sequence[Line]) -> dict[int, tuple[float, float]]:
    """Of each round, when the last update of the one before was taken and when its own last one was."""
    last: dict[int, float] = {}
    for line in lines:
        if line["what"] in {"taking", "taken"}:
            last[line["round"]] = max(last.get(line["round"], 0.0), line["at"])
    return {number: (last.get(number - 1, 0.0), end) for number, end in last.items()}


def dead_during(client: str, span: tuple[float, float], kills: Sequence[Line], lines: Sequence[Line]) -> bool:
    """Whether a device was killed before or in that time, and not long back when it ended."""
    for kill in kills:
        began = [line["at"] for line in lines if line["what"] == "began" and line["at"] > kill["at"]]
        back = min(began, default=float("inf")) + 1.0  # it still has to plan, to say hello and to fetch
        if kill["name"] == client and kill["at"] < span[1] and back > span[0]:
            return True
    return False


# ── who was told what ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answers:
    """What was said of the updates that were made, by their SHA-256.

    Attributes:
        made: all of them.
        told: those that a device heard, or the server wrote down, to be accepted.
        begun: those that the server was about to take when it was killed, perhaps.
        denied: those of which a device heard first that they are refused. An offer that the broker repeats much later
            is refused as well, but then its device knows already.
    """

    made: Mapping[str, Offer]
    told: frozenset[str]
    begun: frozenset[str]
    denied: frozenset[str]

    @classmethod
    def of(cls, journals: Mapping[str, Sequence[Line]]) -> Answers:
        """From the journals of all processes."""
        every = list(itertools.chain.from_iterable(journals.values()))
        made = [Offer.model_validate(line["offer"]) for line in every if line["what"] == "made"]
        said = {
            what: frozenset(line["sha"] for line in every if line["what"] == what)
            for what in ("accepted", "taken", "taking")
        }
        first: dict[str, str] = {}
        for line in sorted(every, key=lambda line: float(line["at"])):
            if line["what"] in {"accepted", "rejected"}:
                first.setdefault(line["sha"], line["what"])
        denied = frozenset(sha for sha, what in first.items() if what == "rejected")
        by_sha = {offer.blob.sha256: offer for offer in made}
        return cls(by_sha, said["accepted"] | said["taken"], said["taking"], denied)

    def of_round(self, number: int) -> tuple[list[Offer], list[Offer]]:
        """Updates of a round that are accepted for sure, and those that may be."""
        mine = [offer for offer in self.made.values() if offer.round == number]
        sure = [offer for offer in mine if offer.blob.sha256 in self.told]
        unsure = [offer for offer in mine if offer.blob.sha256 in self.begun - self.told]
        return sure, unsure


# ── what must have come of it ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Explained:
    """How a version came about: all zero for one that holds exactly what it must."""

    lost: int = 0
    doubled: int = 0
    unexplained: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong with it."""
        return not (self.lost or self.doubled or self.unexplained)


@dataclass(frozen=True)
class Recomputed:
    """Merges once more what devices wrote down."""

    config: settings.Config
    method: Aggregator
    payloads: Path

    def explain(self, before: State, sure: Sequence[Offer], unsure: Sequence[Offer], found: bytes | None) -> Explained:
        """What a stored version holds, compared with what it must hold."""
        if found is None:
            return Explained(lost=len(sure))
        received = self._received(before)
        for count in range(len(unsure) + 1):
            for some in itertools.combinations(unsure, count):
                if self._merged(before, received, [*sure, *some]) == found:
                    return Explained()
        for offer in sure:
            rest = [other for other in sure if other is not offer]
            if rest and self._merged(before, received, rest) == found:
                return Explained(lost=1)
            if self._merged(before, received, sure, twice=offer) == found:
                return Explained(doubled=1)
        return Explained(unexplained=1)

    def _received(self, state: State) -> Adapter:
        """The version as devices decode it."""
        wire = self.config.wire
        cuts = bands.edges_for(max(state.adapter.ranks.values()), wire.band_edges)
        payloads = [codec.encode(bands.band(state.adapter, start, stop), wire.codec_down) for start, stop in cuts]
        return bands.join([codec.decode(payload) for payload in payloads])

    def _merged(
        self, before: State, received: Adapter, offers: Iterable[Offer], *, twice: Offer | None = None
    ) -> bytes:  # fmt: skip
        updates = []
        for offer in offers:
            change = codec.decode((self.payloads / offer.blob.sha256).read_bytes())
            mine = Adapter({name: cut(received[name], pair.rank) for name, pair in change.items()})
            after = Adapter({name: changed(mine[name], pair) for name, pair in change.items()})
            updates.append(Update(offer.client, float(offer.examples) * (1 + (offer is twice)), mine, after))
        if not updates:
            return b""
        with threadpool_limits(1):
            return save_state(self.method.combine(before, updates).state)


# ── what was sent twice ───────────────────────────────────────────────────────────────────────────────────────────


def traffic(journals: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """The figures of `Audit` that speak of bytes."""
    first: dict[tuple[str, int], Line] = {}
    lives: dict[str, set[int]] = defaultdict(set)
    sent: dict[tuple[str, int], list[Line]] = defaultdict(list)
    again = 0
    spans: dict[str, tuple[float, float]] = {}
    for line in journals["server"]:
        key = (str(line.get("sha")), int(line.get("chunk", -1)))
        if line["what"] == "stored":
            first.setdefault(key, line)
            lives[key[0]].add(line["life"])
            spans[key[0]] = (spans.get(key[0], (line["at"], 0.0))[0], line["at"])
        elif line["what"] == "arrived" and key in first:
            again += line["bytes"]
    for name, lines in journals.items():
        for line in lines:
            if name != "server" and line["what"] == "sent":
                sent[line["sha"], line["chunk"]].append(line)
                lives[line["sha"]].add(line["life"])
    resumed = {sha for sha, found in lives.items() if len(found) > 2}  # more than one device life and one server life
    resumed |= {sha for (sha, _), lines in sent.items() if len(lines) > 1}
    resent = sum(
        line["bytes"] for key, stored in first.items() for line in sent[key] if line["at"] > stored["at"]
    )  # fmt: skip
    return {
        "resumed": len(resumed),
        "resumed_bytes": sum(line["bytes"] for (sha, _), line in first.items() if sha in resumed),
        "resent_bytes": resent,
        "again_bytes": again,
        "stored_bytes": sum(line["bytes"] for line in first.values()),
        "mid_upload": tuple(sorted(spans.values())),
    }
