"""The state of the rounds on disk: one JSON text, and a row for each member, of which only what changed is written.

A fleet may have 100,000 members. To write all of them for every message would cost more than all that the message is
about, so a `Standing` carries the rows in which a state differs from the one that was written before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from edge_runtime.wire.messages import LayerGroup
from server.fleet import Member
from server.rows import Rows
from server.state import EVERYBODY, NOBODY, State, recounted
from server.store import Standing


def dump(state: State, before: State | None = None) -> Standing:
    """What is written of a state.

    Args:
        state: to be written.
        before: the one that was written last, in the same life of the process; None writes every member.
    """
    changed = state.members if before is None else state.members.since(before.members)
    rows = {name: member.model_dump_json() for name, member in changed.items()}
    return Standing(state.model_dump_json(exclude={"members"}), rows)


def load(text: str, rows: Iterable[tuple[str, str]]) -> State:
    """The state that was written.

    Args:
        text: the JSON text.
        rows: name and JSON of every member. Of a store of the second layout there are none: its text has them.
    """
    found = json.loads(text)
    if "asked" in found:
        return _former(found)
    share = _sharing()
    members = {name: share(Member.model_validate_json(row)) for name, row in rows}
    return State.model_validate({**found, "members": Rows(members)})


def _sharing() -> Callable[[Member], Member]:
    """Members that say the same of their layers share it: most of a fleet of 100,000 would otherwise be copies."""
    known: dict[tuple[LayerGroup, ...], tuple[LayerGroup, ...]] = {}

    def share(member: Member) -> Member:
        groups = known.setdefault(member.hello.groups, member.hello.groups)
        return member.model_copy(update={"hello": member.hello.model_copy(update={"groups": groups})})

    return share


def _former(found: Mapping[str, Any]) -> State:
    """The state that a text of the second layout means.

    It named whom the open round asks; now a threshold says so. The open round asks everybody from here on, but for
    those that have not delivered and were not asked: those it excuses.
    """
    members: dict[str, Member] = {}
    for name, row in found["members"].items():
        facts = {"paused": found["paused"].get(name), "ended": found["ended"].get(name)}
        if name in found["stored"]:
            facts |= {"delivered": found["round"], "sha256": found["stored"][name]}
        elif name in found["merged"]:
            facts |= {"delivered": max(0, found["round"] - 1), "sha256": found["merged"][name]}
        facts |= {"there" if name in found["asked"] else "excused": found["round"]}
        members[name] = Member.model_validate({**row, **facts})
    kept = {field: found[field] for field in ("run", "phase", "round", "version", "base", "progress_at")}
    sample = EVERYBODY if found["phase"] in {"train", "merging"} else NOBODY
    state = State.model_validate({**kept, "members": members, "sample": sample, "filled": len(found["stored"])})
    return recounted(state)
