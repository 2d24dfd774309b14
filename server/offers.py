"""Why an offer is refused. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_runtime.wire.messages import Offer, Rejected
from server.policy import Policy

if TYPE_CHECKING:
    from server.rounds import State

MAX_CHUNKS = 1 << 18
"""Chunks of an update, at most: lists of them must stay small whatever a device offers."""


def refusal(state: State, offer: Offer, policy: Policy) -> Rejected | None:
    """Why an offer is refused before any of its bytes arrive, or None."""
    sha = offer.blob.sha256
    if offer.client not in state.members:
        return Rejected(code="unknown-client", reason="say hello first", sha256=sha)
    if offer.run not in {"", state.run}:
        reason = f"trained in the fleet's life '{offer.run}', and this is '{state.run}'; follow the current directive"
        return Rejected(code="round-closed", reason=reason, sha256=sha)
    if state.phase != "train" or offer.round != state.round or offer.client not in state.asked:
        return Rejected(
            code="round-closed",
            reason=f"round {offer.round} takes no update of yours; the fleet is in phase '{state.phase}', "
            f"round {state.round}; follow the current directive",
            sha256=sha,
        )
    if offer.client in state.stored:
        return Rejected(code="round-closed", reason="another update of yours is stored already", sha256=sha)
    if offer.version != state.version:
        return Rejected(
            code="round-closed", reason=f"trained from version {offer.version}, not {state.version}", sha256=sha
        )
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
