"""The board: what messages fold into."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.demo.board import Board, Row, bytes_as_fp32, fold, patterns
from edge_runtime.wire import topics
from edge_runtime.wire.messages import Accepted, Losses, Message, Presence, Welcome, dump, load
from tests.demo.fleet import board_of, life, slot
from tests.runtime import said
from tests.strategies import all_messages, laws


def folded(messages: list[Message]) -> Board:
    """The board after these messages."""
    board = Board()
    for message in messages:
        board = fold(board, message)
    return board


@laws
@given(st.lists(all_messages, max_size=8))
def test_any_messages_fold_and_a_row_is_what_its_own_device_said(messages: list[Message]) -> None:
    board = folded(messages)

    assert list(board.rows) == sorted(board.rows)
    for name, row in board.rows.items():
        assert row.client == name
        alone = folded([message for message in messages if getattr(message, "client", name) == name])
        assert alone.rows[name] == row


@laws
@given(st.lists(all_messages, max_size=6))
def test_a_message_that_comes_twice_changes_nothing(messages: list[Message]) -> None:
    """Brokers repeat themselves."""
    twice = [message for message in messages for _ in range(2)]

    assert folded(twice) == folded(messages)


def test_the_servers_answers_to_a_device_are_no_news_to_an_onlooker() -> None:
    board = board_of({"pi": life("pi")})

    for answer in (Welcome(client="pi", fleet="fleet"), Accepted(sha256="a" * 64, round=1)):
        assert fold(board, answer) is board


def test_the_newest_directive_stands() -> None:
    board = folded([said.directive("gather", 0), said.directive("train", 1), said.directive("finish", 2)])

    assert board.directive is not None
    assert (board.directive.phase, board.directive.round) == ("finish", 2)


def test_a_row_knows_what_its_device_holds_and_trains() -> None:
    row = board_of({"pi": life("pi", rank=2, layers=2)}).rows["pi"]

    assert row.slot == slot(4, 2, layers=2)
    assert (row.rank, row.held, row.layers) == (2, 4, 2)


def test_a_device_that_has_not_planned_holds_nothing() -> None:
    row = folded([Presence(client="pi", state="online")]).rows["pi"]

    assert (row.rank, row.held, row.layers, row.updates, row.online) == (0, 0, 0, (), True)


def test_an_update_that_is_offered_again_counts_once_and_the_newest_of_a_round_stands() -> None:
    messages: list[Message] = [said.offer("pi", 1), said.offer("pi", 1, payload=b"trained again"), said.offer("pi", 2)]

    assert folded([*messages, messages[2]]).rows["pi"].updates == (messages[1], messages[2])


def test_losses_are_kept_by_version_from_the_base_on() -> None:
    reports = [
        said.report("pi", "training", held_out=Losses(base=4.0)),
        said.report("pi", "training", held_out=Losses(base=4.0, merged=3.0, version=1)),
        said.report("pi", "done", held_out=Losses(base=4.0, merged=2.0, version=2, personal=1.0)),
    ]

    assert folded([*reports]).rows["pi"].held_out == ((0, 4.0), (1, 3.0), (2, 2.0))


def test_presence_follows_the_last_will() -> None:
    board = folded([Presence(client="pi", state="online"), Presence(client="pi", state="offline")])

    assert not board.rows["pi"].online


def test_an_onlooker_hears_everything_that_folds_and_no_blobs() -> None:
    heard = patterns("fleet")
    said_by_a_device = (topics.up("fleet", "pi"), topics.status("fleet", "pi"))

    assert topics.directive("fleet") in heard
    assert [topic.replace("/pi/", "/+/") in heard for topic in said_by_a_device] == [True, True]
    assert not any("blob" in pattern for pattern in heard)


def test_a_message_folds_alike_after_its_way_over_the_wire() -> None:
    messages = life("pi")

    assert folded([load(dump(message)) for message in messages]) == folded(messages)


def naive_bytes(row: Row) -> int:
    """Count every number of every exchange, one by one."""
    total = 0
    for _ in row.updates:
        for layer in row.slot.layers.values():
            total += sum(4 for _ in range(layer.trained) for _ in range(layer.d_in + layer.d_out))
    for _ in range(len(row.updates) + 1):
        for layer in row.slot.layers.values():
            total += sum(4 for _ in range(layer.held) for _ in range(layer.d_in + layer.d_out))
    return total


@laws
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4)), max_size=4))
def test_bytes_as_fp32_are_what_a_naive_count_finds(devices: list[tuple[int, int, int]]) -> None:
    lives = {
        f"device-{index}": life(f"device-{index}", rank=rank, layers=layers, rounds=rounds)
        for index, (rank, layers, rounds) in enumerate(devices)
    }
    board = board_of(lives)

    assert bytes_as_fp32(board) == sum(naive_bytes(row) for row in board.rows.values())


def test_a_fleet_that_exchanged_nothing_but_hellos_still_fetches_once() -> None:
    board = folded([said.hello("pi")])

    # Two layers of 12 by 16 at rank 2, four bytes each.
    assert bytes_as_fp32(board) == 4 * 2 * 2 * (12 + 16)
