"""Who may join."""

from __future__ import annotations

from edge_runtime.wire.messages import group
from server.fleet import Member, admit
from tests.runtime.said import BASE, hello, slot


def test_another_base_model_is_refused_with_both_fingerprints() -> None:
    refusal = admit({}, "c" * 64, hello("a"))
    assert refusal is not None
    assert refusal.code == "fingerprint"
    assert "c" * 16 in refusal.reason
    assert BASE[:16] in refusal.reason


def test_the_first_device_fixes_base_and_shapes_and_its_like_are_welcome() -> None:
    members = {"a": Member(hello=hello("a"))}
    assert admit({}, None, hello("a")) is None
    assert admit(members, BASE, hello("b", groups=group(slot(rank=8)))) is None
    assert admit(members, BASE, hello("a")) is None, "a device may say hello again"


def test_other_shapes_are_refused_with_the_layer_and_both_shapes() -> None:
    members = {"a": Member(hello=hello("a"))}
    refusal = admit(members, BASE, hello("b", groups=group(slot(d_in=20))))
    assert refusal is not None
    assert refusal.code == "shape"
    assert "'model.layers.0.self_attn.q_proj' is (12, 16) in this fleet and (12, 20) on yours" in refusal.reason


def test_a_layer_that_the_fleet_does_not_have_is_refused() -> None:
    members = {"a": Member(hello=hello("a"))}
    extra = group(slot())[0].model_copy(update={"module": "self_attn.v_proj"})
    refusal = admit(members, BASE, hello("b", groups=(*group(slot()), extra)))
    assert refusal is not None
    assert "'model.layers.0.self_attn.v_proj' is absent in this fleet and (12, 16) on yours" in refusal.reason
