"""A seal holds for one message, one topic, one place in the order and one key; nothing else opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.errors import AuthenticityError, ConfigError
from edge_runtime.wire import signing, topics
from edge_runtime.wire.keys import (
    SigningKey,
    public_pem,
    read_public_keys,
    read_signing_key,
    write_secret,
)
from edge_runtime.wire.messages import MAX_MESSAGE_BYTES, Message, dump, load
from edge_runtime.wire.signing import MAX_COUNTER, SEAL_BYTES
from tests.strategies import all_messages, laws

KEY, OTHER = SigningKey.from_seed(b"a" * 32), SigningKey.from_seed(b"b" * 32)
TOPIC = topics.up("fleet", "a")
MESSAGE = b'{"v":1,"type":"welcome","client":"a","fleet":"fleet"}'

counters = st.integers(0, MAX_COUNTER)
keys = st.binary(min_size=32, max_size=32).map(SigningKey.from_seed)


def opened(topic: str, payload: bytes, public: bytes) -> tuple[bytes, int]:
    sealed = signing.take_apart(topic, payload)
    signing.verify(topic, sealed, public)
    return sealed.message, sealed.counter


@laws
@given(all_messages, counters, keys)
def test_what_is_sealed_opens_to_the_same_bytes(message: Message, counter: int, key: SigningKey) -> None:
    payload = signing.seal(TOPIC, dump(message), key, counter)

    assert opened(TOPIC, payload, key.public) == (dump(message), counter)


@laws
@given(all_messages, counters)
def test_a_sealed_message_is_still_the_message_that_a_person_reads(message: Message, counter: int) -> None:
    payload = signing.seal(TOPIC, dump(message), KEY, counter)
    shown = json.loads(payload)

    assert (shown.pop("by"), shown.pop("n")) == (KEY.id, counter)
    assert len(shown.pop("sig")) == 88
    assert shown == json.loads(dump(message))
    assert load(payload) == message, "an onlooker without keys reads it too"
    assert len(payload) - len(dump(message)) <= SEAL_BYTES


@laws
@given(all_messages, counters, st.data())
def test_no_bit_of_a_sealed_message_can_be_flipped(message: Message, counter: int, data: st.DataObject) -> None:
    payload = bytearray(signing.seal(TOPIC, dump(message), KEY, counter))
    at = data.draw(st.integers(0, len(payload) * 8 - 1))
    payload[at // 8] ^= 1 << at % 8

    with pytest.raises(AuthenticityError):
        opened(TOPIC, bytes(payload), KEY.public)


def test_no_bit_of_one_sealed_message_can_be_flipped() -> None:
    payload = signing.seal(TOPIC, MESSAGE, KEY, 1_790_000_000_000_000)
    for at in range(len(payload) * 8):
        changed = bytearray(payload)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(AuthenticityError):
            opened(TOPIC, bytes(changed), KEY.public)


@pytest.mark.parametrize(
    "topic",
    [
        topics.up("fleet", "b"), topics.up("other", "a"), topics.down("fleet", "a"), topics.status("fleet", "a"),
        topics.directive("fleet"), TOPIC + "x", "",
    ],
)  # fmt: skip
def test_a_sealed_message_cannot_be_moved_to_another_topic(topic: str) -> None:
    payload = signing.seal(TOPIC, MESSAGE, KEY, 7)

    with pytest.raises(AuthenticityError):
        opened(topic, payload, KEY.public)


def test_a_seal_is_worth_nothing_under_another_key() -> None:
    payload = signing.seal(TOPIC, MESSAGE, OTHER, 7)
    claiming = payload.replace(OTHER.id.encode(), KEY.id.encode())

    with pytest.raises(AuthenticityError, match=f"must be signed by key {KEY.id}; found key {OTHER.id}"):
        opened(TOPIC, payload, KEY.public)
    with pytest.raises(AuthenticityError, match="changed, moved or forged"):
        opened(TOPIC, claiming, KEY.public)


def test_a_counter_cannot_be_exchanged() -> None:
    payload = signing.seal(TOPIC, MESSAGE, KEY, 7)

    with pytest.raises(AuthenticityError):
        opened(TOPIC, payload.replace(b'"n":7', b'"n":8'), KEY.public)


@laws
@given(st.binary(max_size=400))
@example(MESSAGE)
@example(b"")
@example(b'{"a":1,"by":"0123456789abcdef","n":007,"sig":"' + b"A" * 86 + b'=="}')
@example(b'{"a":1,"by":"0123456789abcdef","n":9999999999999999,"sig":"' + b"A" * 86 + b'=="}')
@example(b'{"a":1,"by":"0123456789abcdef","n":7,"sig":"' + b"A" * 85 + b'B=="}')
def test_anything_else_is_refused_and_says_so(payload: bytes) -> None:
    with pytest.raises(AuthenticityError):
        opened(TOPIC, payload, KEY.public)


def test_megabytes_of_nonsense_are_looked_at_from_their_end_alone() -> None:
    with pytest.raises(AuthenticityError):
        signing.take_apart(TOPIC, b'{"a":1' + b',"by":"' * 1_000_000 + b"}")


def test_the_largest_message_fits_with_its_seal_what_small_brokers_take() -> None:
    assert MAX_MESSAGE_BYTES + SEAL_BYTES <= 128_000


@pytest.mark.parametrize(("message", "counter"), [(b"{}", 1), (b"[1]", 1), (b"", 1), (MESSAGE, -1), (MESSAGE, 1 << 53)])
def test_what_cannot_be_sealed_is_an_error_of_the_caller(message: bytes, counter: int) -> None:
    with pytest.raises(ValueError, match="a sealed message is"):
        signing.seal(TOPIC, message, KEY, counter)


# ── keys as files ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_comes_back_from_its_file_which_is_its_owners_alone(tmp_path: Path) -> None:
    key = SigningKey.generate()
    key.write(tmp_path / "deep" / "signing.key")

    assert (tmp_path / "deep" / "signing.key").stat().st_mode & 0o777 == 0o600
    assert read_signing_key(tmp_path / "deep" / "signing.key") == key
    with pytest.raises(FileExistsError):
        key.write(tmp_path / "deep" / "signing.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620])
def test_a_key_that_others_can_touch_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "signing.key"
    SigningKey.generate().write(path)
    path.chmod(mode)

    with pytest.raises(ConfigError, match=f"its mode is 0{mode:o}; run: chmod 600"):
        read_signing_key(path)


def test_no_way_of_showing_a_key_shows_its_secret(tmp_path: Path) -> None:
    secret = bytes(range(32))
    key = SigningKey.from_seed(secret)
    shown = f"{key} {key!r} {[key]} {vars(key).keys()}"

    assert key.id in shown
    assert secret.hex() not in shown
    assert repr(secret)[2:20] not in shown


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----"])
def test_a_file_that_is_no_key_is_named(tmp_path: Path, content: bytes) -> None:
    write_secret(tmp_path / "signing.key", content)

    with pytest.raises(ConfigError, match=r"signing\.key"):
        read_signing_key(tmp_path / "signing.key")
    with pytest.raises(ConfigError, match=r"absent\.key"):
        read_signing_key(tmp_path / "absent.key")


def test_a_file_of_public_keys_holds_one_or_during_a_change_two(tmp_path: Path) -> None:
    path = tmp_path / "server.pub"
    path.write_text(public_pem(KEY.public) + public_pem(OTHER.public), encoding="ascii")

    assert read_public_keys(path) == [KEY.public, OTHER.public]
    path.write_text("", encoding="ascii")
    with pytest.raises(ConfigError, match="found none"):
        read_public_keys(path)
