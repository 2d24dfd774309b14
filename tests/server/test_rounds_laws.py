"""Laws of the rounds over random lives of a fleet."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.events import Heard, PresenceChanged, Stage, Stored, Tick
from server.policy import Policy
from tests.runtime.said import hello, report
from tests.server.life import CLIENTS, TIMEOUT, Life, policy

synchronous = st.builds(
    policy,
    num_rounds=st.integers(1, 3),
    min_available_nodes=st.integers(1, 3),
    fraction_train=st.sampled_from([0.3, 0.5, 1.0]),
    quorum=st.sampled_from([0.3, 0.5, 1.0]),
    over_select=st.sampled_from([1.0, 1.5]),
)
buffered = st.builds(
    policy,
    mode=st.just("buffered"),
    num_rounds=st.integers(1, 5),
    min_available_nodes=st.integers(1, 3),
    fraction_train=st.sampled_from([0.5, 1.0, 1.0]),
    quorum=st.sampled_from([0.5, 1.0]),
    buffer_size=st.sampled_from([None, 1, 2, 3, 9]),
    max_staleness=st.integers(0, 3),
)
policies = synchronous | buffered

moves = st.lists(
    st.tuples(
        st.sampled_from(
            ["hello"] * 3 + ["offer", "offer", "stored", "stored", "refused", "report", "presence", "merged", "merged"]
            + ["moved", "tick", "tick", "restart", "stranger", "unmergeable"]
        ),
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    min_size=30,
    max_size=80,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(policies, moves)
def test_no_sequence_of_events_breaks_a_law_and_a_restart_may_come_at_any_point(
    rules: Policy, sequence: list[tuple[str, int, int]]
) -> None:
    """Runs every life twice, once through JSON before every step: behaviour must not differ by a byte."""
    life, stored = Life(rules), Life(rules, through_json=True)
    for move in sequence:
        life.move(*move)
        stored.move(*move)
    assert life.trace == stored.trace


@settings(max_examples=60, deadline=None)
@given(policies, moves)
def test_whatever_happened_a_fleet_whose_devices_come_back_finishes(
    rules: Policy, sequence: list[tuple[str, int, int]]
) -> None:
    life = Life(rules)
    for move in sequence:
        life.move(*move)
    merged = life.state.version
    for _ in range(12 * (rules.num_rounds + 1)):
        if life.phase == "over":
            break
        behave_well(life)
    assert life.phase == "over"
    # A round whose merge is refused closes all the same, and makes no version.
    assert merged <= life.state.version <= rules.num_rounds
    assert life.state.round == rules.num_rounds


def behave_well(life: Life) -> None:
    """Everybody comes back and does what is asked; now and then time passes."""
    for client in CLIENTS:
        life.happen(PresenceChanged(client, online=True))
        if client not in life.state.members or client in life.state.ended:
            life.happen(Heard(hello(client)))
    for client in life.state.asked:
        if life.phase == "train" and client not in life.state.stored:
            for action in life.happen(Heard(life.current(client))):
                if isinstance(action, Stage):
                    life.happen(Stored(action.offer))
    if life.pending_merge:
        life.merge_done()
    if life.phase == "finish":
        for client in life.state.members:
            life.happen(Heard(report(client, "done")))
    life.now += TIMEOUT + 1
    life.happen(Tick())
