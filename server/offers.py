"""Why an offer is refused. Pure."""

from __future__ import annotations

from edge_runtime.wire.messages import Offer, Rejected
from server.policy import Policy
from server.state import State, asks

MAX_CHUNKS = 1 << 18
"""Chunks of an update, at most: lists of them must stay small whatever a device offers."""


def refusal(state: State, offer: Offer, policy: Policy) -> Rejected | None:
    """Why an offer is refused, before any of its bytes arrive or when they all have, or None."""
    sha = offer.blob.sha256
    member = state.members.get(offer.client)
    if member is None:
        return Rejected(code="unknown-client", reason="say hello first", sha256=sha)
    if state.phase == "merging" and policy.mode == "buffered":
        # It is in time for the next buffer.
        return Rejected(code="quota", reason=f"buffer {state.round} is being merged; offer again later", sha256=sha)
    closed = _closed(state, offer, policy)
    if closed:
        return Rejected(code="round-closed", reason=closed, sha256=sha)
    if offer.round <= member.delivered:
        return Rejected(code="round-closed", reason="another update of yours is stored already", sha256=sha)
    return _unbearable(offer, policy)


def _closed(state: State, offer: Offer, policy: Policy) -> str:
    """Why there is no open round that an offer belongs to, or ''."""
    if offer.run not in {"", state.run}:
        return f"trained in the fleet's life '{offer.run}', and this is '{state.run}'; follow the current directive"
    behind, member = state.version - offer.version, state.members[offer.client]
    late = policy.mode == "buffered" and offer.round < state.round
    reached = state.phase == "train" and member.ended is None and (late or offer.round == state.round)
    if reached and (behind < 0 or (behind and not late)):
        return f"trained from version {offer.version}, not {state.version}"
    if reached and behind > policy.reach:
        return (
            f"trained from version {offer.version}, {behind} behind the fleet's {state.version}, and updates count up "
            f"to {policy.reach} behind; follow the current directive, or raise [rounds] max_staleness"
        )
    excused = not late and member.excused == state.round
    if not reached or excused or not asks(state, offer.client, offer.round):
        return (
            f"round {offer.round} takes no update of yours; the fleet is in phase '{state.phase}', "
            f"round {state.round}; follow the current directive"
        )
    return ""


def _unbearable(offer: Offer, policy: Policy) -> Rejected | None:
    """Why an update is more than this server takes, or none that it takes, or None."""
    sha = offer.blob.sha256
    if offer.kind == "increment" and not policy.increments:
        reason = (
            'this fleet merges slices and no increments; a gateway needs [aggregator] method = "increment" above it'
        )
        return Rejected(code="kind", reason=reason, sha256=sha)
    if offer.blob.size > policy.max_upload_bytes or offer.blob.chunks > MAX_CHUNKS:
        return Rejected(
            code="too-large",
            reason=f"an update has at most {policy.max_upload_bytes} bytes in {MAX_CHUNKS} chunks; this one has "
            f"{offer.blob.size} in {offer.blob.chunks}; use a smaller rank, a leaner codec or larger chunks",
            sha256=sha,
        )
    if offer.examples > policy.max_examples:
        return Rejected(
            code="examples",
            reason=f"an update counts for at most {policy.max_examples} examples; this one claims {offer.examples}; "
            "raise [server] max_examples if that is true",
            sha256=sha,
        )
    return None
