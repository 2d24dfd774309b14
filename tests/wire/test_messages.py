"""Control messages: they come back as they went, and nothing from outside does more than raise an error of the wire."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge_runtime.errors import CorruptPayloadError, TooLargeError, VersionMismatchError, WireError
from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.wire import messages
from edge_runtime.wire.messages import LayerGroup, Message, dump, group, load, ungroup
from edge_runtime.wire.sampling import FULL, number_of
from tests.strategies import all_messages, laws, models, slots

KINDS = get_args(Message)

types = st.sampled_from([kind.__name__.lower() for kind in KINDS])


def test_the_tag_of_a_message_is_its_name() -> None:
    assert [kind.model_fields["type"].default for kind in KINDS] == [kind.__name__.lower() for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@laws
@given(st.data())
def test_what_is_dumped_is_loaded_again(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(models(kind))

    assert load(dump(message)) == message
    assert dump(load(dump(message))) == dump(message)


@laws
@given(all_messages)
def test_a_message_on_the_wire_is_json_that_a_person_can_read(message: Message) -> None:
    payload = dump(message)

    assert json.loads(payload)["type"] == type(message).__name__.lower()
    assert json.loads(payload)["v"] == messages.PROTOCOL


def with_extras(value: object) -> object:
    """The same JSON with a field that nobody knows in every object."""
    match value:
        case dict():
            return {"zz_new": {"v": 7, "deep": [1, None]}, **{key: with_extras(inner) for key, inner in value.items()}}
        case list():
            return [with_extras(inner) for inner in value]
        case _:
            return value


@laws
@given(all_messages)
def test_fields_of_a_later_version_are_ignored_at_every_depth(message: Message) -> None:
    assert load(json.dumps(with_extras(json.loads(dump(message)))).encode()) == message


@laws
@given(all_messages, st.integers().filter(lambda v: v != messages.PROTOCOL) | st.sampled_from(["1", None, [], {}, 1.5]))
def test_another_protocol_version_is_named_as_such(message: Message, version: object) -> None:
    other = {**json.loads(dump(message)), "v": version}

    with pytest.raises(VersionMismatchError, match="protocol 1"):
        load(json.dumps(other).encode())


@pytest.mark.parametrize("future", [{"v": 2, "type": "gossip"}, {"v": 2, "kind": "hello"}, {"v": 2}])
def test_another_protocol_version_is_named_also_where_its_types_are_unknown(future: dict[str, object]) -> None:
    with pytest.raises(VersionMismatchError, match="found 2"):
        load(json.dumps(future).encode())


def test_a_nested_field_that_is_called_v_is_not_the_protocol_version() -> None:
    offer = {"type": "offer", "v": 1, "client": "a", "round": 1, "version": 0, "examples": 1, "loss_first": 1.0,
             "loss_last": 1.0, "blob": {"v": 2}}  # fmt: skip

    with pytest.raises(CorruptPayloadError, match=r"blob\.sha256"):
        load(json.dumps(offer).encode())


@laws
@given(all_messages, st.data())
def test_a_missing_field_is_named(message: Message, data: st.DataObject) -> None:
    required = [name for name, field in type(message).model_fields.items() if field.is_required()]
    gone = data.draw(st.sampled_from(required))
    rest = {key: value for key, value in json.loads(dump(message)).items() if key != gone}

    with pytest.raises(CorruptPayloadError, match=gone):
        load(json.dumps(rest).encode())


@laws
@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode(errors="surrogatepass")))
@example(b"")
@example(b"null")
@example(b"[" * 100_000)
@example(b'{"type":' * 10_000)
@example(b'{"type":"welcome","type":"hello"}')
@example(b"\xef\xbb\xbf{}")
@example(b'{"type":"accepted","sha256":"\\ud800","round":1}')
def test_garbage_is_refused_as_an_error_of_the_wire(payload: bytes) -> None:
    with pytest.raises(WireError):
        load(payload)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@laws
@given(json_values | st.fixed_dictionaries({"type": types | json_values}, optional={"v": json_values}))
def test_json_that_is_no_message_is_refused_as_an_error_of_the_wire(value: object) -> None:
    with pytest.raises(WireError):
        load(json.dumps(value).encode())


@laws
@given(all_messages, st.data())
def test_a_message_with_a_field_of_any_other_value_loads_or_is_an_error_of_the_wire(
    message: Message, data: st.DataObject
) -> None:
    fields = json.loads(dump(message))
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(json_values)

    try:
        loaded = load(json.dumps(fields).encode())
    except WireError:
        return
    dump(loaded)


@laws
@given(all_messages, st.data())
def test_a_damaged_message_loads_or_is_an_error_of_the_wire(message: Message, data: st.DataObject) -> None:
    payload = bytearray(dump(message))
    for at in data.draw(st.lists(st.integers(0, len(payload) - 1), min_size=1, max_size=3)):
        payload[at] = data.draw(st.integers(0, 255))

    try:
        load(bytes(payload[: data.draw(st.integers(0, len(payload)))]))
    except WireError:
        return


def offer(**changed: Any) -> bytes:
    """A sound offer as JSON, with some fields changed."""
    sound = {
        "type": "offer", "v": 1, "client": "pi", "round": 1, "version": 0, "examples": 9, "loss_first": 2.0,
        "loss_last": 1.0, "blob": {"sha256": "0" * 64, "size": 10, "chunk_bytes": 4},
    }  # fmt: skip
    return json.dumps({**sound, **changed}).encode()


def test_the_offers_below_are_wrong_by_nothing_else() -> None:
    assert isinstance(load(offer()), messages.Offer)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"loss_last": float("nan")}, id="a loss of NaN"),
        pytest.param({"loss_first": float("inf")}, id="an infinite loss"),
        pytest.param({"examples": 0}, id="no examples"),
        pytest.param({"examples": 10**400}, id="more examples than a float can count"),
        pytest.param({"round": -1}, id="a negative round"),
        pytest.param({"round": 1 << 41}, id="a round that never comes"),
        pytest.param({"client": "a/b"}, id="a client with a slash"),
        pytest.param({"client": "#"}, id="a client that is a wildcard"),
        pytest.param({"client": "a\n"}, id="a client with a line end"),
        pytest.param({"client": "x" * 65}, id="a long client"),
        pytest.param({"blob": {"sha256": "../../x", "size": 1, "chunk_bytes": 1}}, id="no digest"),
        pytest.param({"blob": {"sha256": "0" * 64, "size": 1 << 28, "chunk_bytes": 1}}, id="chunks without end"),
    ],
)
def test_values_that_would_do_harm_later_are_refused_at_once(changed: dict[str, object]) -> None:
    with pytest.raises(CorruptPayloadError, match=next(iter(changed))):
        load(offer(**changed))


def test_a_payload_larger_than_any_message_is_refused_unread() -> None:
    with pytest.raises(TooLargeError, match=str(messages.MAX_MESSAGE_BYTES)):
        load(b" " * (messages.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(CorruptPayloadError):
        load(b" " * messages.MAX_MESSAGE_BYTES)


def hello(groups: tuple[LayerGroup, ...]) -> messages.Hello:
    """A hello whose slot has these groups."""
    return messages.Hello(
        client="pi", base="x", examples=1, groups=groups, device="", precision="nf4", plan="", software=""
    )


def test_a_message_too_large_for_a_broker_is_not_sent() -> None:
    part = LayerGroup(prefix="a.", module="m" * 128, layers=((0, 1),), d_out=1, d_in=1, held=1, trained=1)

    with pytest.raises(TooLargeError, match="hello"):
        dump(hello((part,) * 1000))


@laws
@given(all_messages)
def test_messages_are_frozen(message: Message) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        message.v = 1


@laws
@given(models(messages.Directive), st.none() | st.integers(0, FULL))
def test_a_directive_asks_everybody_or_those_below_its_threshold(
    directive: messages.Directive, below: int | None
) -> None:
    sample = None if below is None else messages.Sample(seed=3, below=below)
    directive = directive.model_copy(update={"sample": sample})
    assert directive.asks("a") == (below is None or number_of(3, directive.round, "a") < below)


@laws
@given(slots())
def test_a_slot_in_groups_is_the_same_slot(slot: Slot) -> None:
    assert ungroup(group(slot)) == slot


@laws
@given(slots())
def test_a_slot_survives_the_wire(slot: Slot) -> None:
    loaded = load(dump(hello(group(slot))))

    assert isinstance(loaded, messages.Hello)
    assert ungroup(loaded.groups) == slot


def test_a_model_of_many_equal_layers_is_a_handful_of_groups() -> None:
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    slot = Slot(
        {
            f"model.layers.{i}.{module}": LayerSlot(576, 576, 32, 8 if i >= 10 else 0)
            for i in range(120)
            for module in modules
        }
    )
    groups = group(slot)

    assert len(groups) == 2 * len(modules)
    assert {part.layers for part in groups} == {((0, 10),), ((10, 120),)}


def part(**changed: Any) -> LayerGroup:
    """A sound group, with some fields changed."""
    sound = {"prefix": "h.", "module": "q", "layers": ((0, 3),), "d_out": 4, "d_in": 4, "held": 2, "trained": 1}
    return LayerGroup.model_validate({**sound, **changed})


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param((part(layers=((0, 1 << 40),)),), id="one endless range"),
        pytest.param(tuple(part(prefix=f"h{i}.", layers=((0, 60_000),)) for i in range(3)), id="long ranges"),
        pytest.param((part(layers=((0, 3), (2, 4))),), id="overlapping ranges"),
        pytest.param((part(), part(layers=((1, 2),))), id="overlapping groups"),
        pytest.param((part(prefix="", layers=((0, 2),)),), id="a layer without an index, twice"),
        pytest.param((part(held=1, trained=2),), id="trains more than it holds"),
    ],
)
def test_groups_that_cannot_be_a_slot_are_refused(groups: tuple[LayerGroup, ...]) -> None:
    with pytest.raises(CorruptPayloadError):
        ungroup(groups)


@pytest.mark.parametrize(
    "changed",
    [{"d_out": 0}, {"d_in": 1 << 25}, {"held": 5000}, {"trained": -1}, {"module": ""}, {"module": "a/b"},
     {"prefix": "a b."}, {"layers": ((-1, 2),)}, {"layers": ((0, 1),) * 1025}],
    ids=str,
)  # fmt: skip
def test_a_group_out_of_all_proportion_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changed))):
        part(**changed)


@pytest.mark.parametrize("ranges", [((3, 1),), (), ((5, 5),)])
def test_empty_ranges_name_no_layers(ranges: tuple[tuple[int, int], ...]) -> None:
    assert ungroup((part(layers=ranges),)) == Slot({})
