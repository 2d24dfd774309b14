"""Hostile inputs: messages, blobs and topics that began as sound ones, changed by somebody who knows their form.

A mutation works on what is inside: a value of the JSON, a shape in the safetensors header, the tag of the codec, the
numbers of a tensor, the size that a zstd frame declares; and sometimes on the bare bytes. The seeds run over the whole
table of codecs and over every kind of message, so whatever is added there is covered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import zstandard

from edge_runtime.errors import WireError
from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.trainer import AdapterSpec, Training
from edge_runtime.wire import blobs, codec, topics
from edge_runtime.wire.messages import (
    Accepted,
    Band,
    Directive,
    Hello,
    Message,
    Need,
    Offer,
    Presence,
    Rejected,
    Report,
    Sample,
    Welcome,
    dump,
    group,
)

FLEET, DEVICE = "fleet", "a"
SLOT = Slot({f"model.layers.{index}.self_attn.q_proj": LayerSlot(12, 16, 4, 2) for index in range(2)})
BASE = "b" * 64

NASTY: Sequence[Any] = (
    None, True, False, 0, -1, 1, 2**12, 2**24, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308,
    -1e308, 1e-320,
    "", "a", "0", "-1", "NaN", "Infinity", "\x00", "\ud7ff", "é" * 70, "x" * 5000, "../../x", "edge/+/#", "finish",
    "train", "offer", "hello", "int8", "fp32", [], {}, [[]], [None], {"": None}, [0] * 3000, [[0, 1 << 40]], [[5, 2]],
    {"a": {"a": {"a": {}}}}, "a" * 64, "f" * 64,
)  # fmt: skip
RAW = (b"NaN", b"-Infinity", b"1e999", b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\x00", b'"\\ud800"', b"9" * 5000)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "nonsense")


def adapter(seed: int = 0, rank: int = 2) -> Adapter:
    """A small one with a slice for each layer of SLOT."""
    draw = np.random.default_rng(seed)
    return Adapter(
        {
            name: Pair(
                draw.standard_normal((rank, layer.d_in)).astype(np.float32),
                draw.standard_normal((layer.d_out, rank)).astype(np.float32),
            )
            for name, layer in SLOT.layers.items()
        }
    )


def sound_messages() -> list[Message]:
    """One of each kind, or several."""
    spec = AdapterSpec(
        family="lora", target_modules=("q_proj",), scaling=2.0, max_rank=4, max_held=8, hold_more=True, max_length=128
    )
    training = Training(
        max_steps=1, learning_rate=0.1, batch_size=1, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=0
    )
    payload = codec.encode(adapter(), "int8")
    ref = blobs.describe(payload, 64)
    first = Directive(
        fleet=FLEET, run="one", phase="gather", round=0, version=0, num_rounds=3, base=BASE,
        adapter=spec, training=training, bands=(Band(start=0, stop=4, blob=ref), Band(start=4, stop=8, blob=ref)),
        codec="int8",
    )  # fmt: skip
    directives = [
        first,
        first.model_copy(update={"phase": "train", "round": 1}),
        first.model_copy(update={"phase": "train", "round": 2, "version": 1, "sample": Sample(seed=1, below=1 << 47)}),
        first.model_copy(update={"phase": "finish", "round": 3, "version": 3}),
    ]
    return [
        *directives,
        Hello(
            client=DEVICE, base=BASE, examples=10, groups=group(SLOT), device="d", precision="nf4", plan="p",
            software="s",
        ),
        Offer(
            client=DEVICE, round=1, version=0, blob=ref, examples=10, loss_first=2.0, loss_last=1.0
        ),
        *(Report(client=DEVICE, state=state, round=1, steps=2, loss=1.0) for state in ("training", "paused", "done")),
        Welcome(client=DEVICE, fleet=FLEET),
        Need(sha256=ref.sha256, ranges=((0, 2), (3, 4))),
        Accepted(sha256=ref.sha256, round=1),
        *(
            Rejected(code=code, reason="why", sha256=ref.sha256)
            for code in ("round-closed", "corrupt", "unknown-client")
        ),
        Presence(client=DEVICE, state="online"),
    ]  # fmt: skip


def sound_blobs() -> list[bytes]:
    """One for each row of the table of codecs, and one without layers."""
    found = []
    for name in codec.CODECS:
        for one in (adapter(1), adapter(2, rank=4), Adapter({})):
            try:
                found.append(codec.encode(one, name))
            except WireError:
                continue
    return found


def sound_topics() -> list[str]:
    """One of each kind."""
    sha = "0" * 64
    return [
        topics.directive(FLEET),
        topics.broadcast(FLEET, sha, 3),
        topics.status(FLEET, DEVICE),
        topics.up(FLEET, DEVICE),
        topics.down(FLEET, DEVICE),
        topics.upload(FLEET, DEVICE, sha, 0),
        topics.link(FLEET, DEVICE, 1),
    ]


# ── mutations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def mutated_bytes(payload: bytes, draw: Random) -> bytes:
    """Bits turned over, parts cut out, put in twice, or put in from elsewhere."""
    found = bytearray(payload)
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(found))
        match draw.randrange(5):
            case 0 if found:
                found[at % len(found)] ^= 1 << draw.randrange(8)
            case 1:
                del found[at : at + draw.randint(1, 32)]
            case 2:
                found[at:at] = found[at : at + draw.randint(1, 64)]
            case 3:
                found[at:at] = draw.choice(RAW)
            case _:
                found[at : at + 8] = draw.randbytes(8)
    return bytes(found)


def mutated_json(value: Any, draw: Random, strangers: Sequence[Any] = ()) -> Any:
    """The value with one place in it changed, renamed, removed, doubled, or taken from another message."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        changed = dict(value)
        match draw.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[draw.choice((key + "x", "v", "type", ""))] = changed.pop(key)
            case 2 if strangers:
                other = draw.choice(strangers)
                changed |= {k: v for k, v in other.items() if draw.random() < 0.5}
            case _:
                changed[key] = mutated_json(changed[key], draw, strangers)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        inside = mutated_json(value[at], draw, strangers)
        # The input shall be hostile to whoever reads it, and not to whoever makes it.
        many = draw.choice((1, 1, 2, 50, 2000)) if len(str(inside)) < 200 else 1
        return [*value[:at], *[inside] * many, *value[at + draw.randrange(2) :]]
    return draw.choice(NASTY)


def mutated_message(seeds: Sequence[Any], draw: Random) -> bytes:
    """A message, changed once or several times."""
    value = draw.choice(seeds)
    if draw.random() < 0.85:
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            value = mutated_json(value, draw, seeds)
    try:
        payload = json.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        payload = b"{}"
    return payload if draw.random() < 0.8 else mutated_bytes(payload, draw)


def mutated_blob(seeds: Sequence[bytes], draw: Random) -> bytes:
    """A blob, changed outside or inside of its compression."""
    blob = draw.choice(seeds)
    kind = draw.randrange(10)
    if kind == 0:
        return mutated_bytes(blob, draw)
    if kind == 1:
        return blob + draw.choice(seeds)
    raw = zstandard.decompress(blob)
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if kind == 2:
        body = mutated_bytes(body, draw)
    elif kind == 3:
        body = _spoiled(body, draw)
    else:
        for _ in range(draw.choice((1, 1, 2, 3))):
            header = _mutated_header(header, len(body), draw)
    text = json.dumps(header).encode()
    claimed = len(text) if draw.random() < 0.95 else draw.choice((0, 1, 2**31, 2**63, len(text) + 1))
    content = claimed.to_bytes(8, "little") + text + body
    if draw.random() < 0.05:
        content = mutated_bytes(content, draw)
    packed = zstandard.compress(content)
    if draw.random() < 0.05:  # a frame that declares another size, 4 to 12 bytes from its beginning
        return packed[:4] + mutated_bytes(packed[4:12], draw) + packed[12:]
    return packed


def _spoiled(body: bytes, draw: Random) -> bytes:
    """Numbers that are none: NaN, infinity, the largest of each kind."""
    found = bytearray(body)
    for _ in range(draw.randint(1, 8)):
        value = draw.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x7c", b"\xff" * 4))
        at = draw.randint(0, max(0, len(found) - 4)) & ~1
        found[at : at + len(value)] = value
    return bytes(found[: len(body)])


def _mutated_layout(tag: str, draw: Random) -> str:
    """A blob's tag: its rows changed, or something else in its place."""
    version, _, text = tag.partition(":")
    if draw.random() < 0.2 or not text:
        return draw.choice(
            (*(f"1:{name}" for name in codec.CODECS), f"3:{text}", "2:", "2:no-such", "", "2:[[]]", "2:{}")
        )
    try:
        rows = json.loads(text)
    except ValueError:
        return f"{version}:{text[: draw.randint(0, len(text))]}"
    for _ in range(draw.choice((1, 1, 2, 4))):
        rows = mutated_json(rows, draw)
    return f"{version}:{json.dumps(rows)}"


def _mutated_header(header: Any, size: int, draw: Random) -> Any:
    if not isinstance(header, dict) or not all(isinstance(found, dict) for found in header.values()):
        return mutated_json(header, draw)
    names = [name for name, found in header.items() if {"shape", "dtype"} <= found.keys()]
    changed = json.loads(json.dumps(header))
    if not names or draw.random() < 0.2:
        found = changed.get("__metadata__", {}).get("edge")
        tag = _mutated_layout(found if isinstance(found, str) else "", draw)
        changed["__metadata__"] = draw.choice(
            ({"edge": tag}, {"edge": tag}, {"edge": tag}, {}, {"edge": tag, "x": "y"})
        )
        return changed
    name = draw.choice(names)
    tensor = changed[name]
    match draw.randrange(6):
        case 0:
            tensor["dtype"] = draw.choice(DTYPES)
        case 1:
            tensor["shape"] = draw.choice(
                ([], [0], [0, 5], [size], [2**32, 2**32], [-1, 4], [1] * 40, [16, 2], [2, 16], [1, 2, 16])
            )
        case 2:
            tensor["data_offsets"] = sorted(draw.choice((0, 1, size // 2, size, size + 1, 2**40)) for _ in range(2))
        case 3:
            layer, colon, rest = name.partition(":")
            new = draw.choice(("a", "b", "", "c", "a:scale", "a:x", ":", "b:" + "y" * 300))
            changed[f"{layer}{colon}{new}" if draw.random() < 0.8 else f"{rest}:{new}"] = changed.pop(name)
        case 4:
            del changed[name]
        case _:
            return mutated_json(changed, draw)
    return changed


def mutated_topic(seeds: Sequence[str], draw: Random) -> str:
    """A topic with a level changed, or of other characters."""
    levels = draw.choice(seeds).split("/")
    at = draw.randrange(len(levels))
    match draw.randrange(4):
        case 0:
            levels[at] = draw.choice(
                ("", "+", "#", "..", "x" * 70, "0" * 64, "٣", "007", "9" * 11, "a\n", "\x00", "up")
            )
        case 1:
            del levels[at]
        case 2:
            levels.insert(at, draw.choice(levels))
        case _:
            levels[at] = "".join(chr(draw.randrange(1, 0x2FF)) for _ in range(draw.randint(0, 12)))
    return "/".join(levels)


Maker = Callable[[Random], bytes]
"""Draws one input."""


def makers() -> dict[str, Maker]:
    """How the inputs of each kind are drawn: messages, blobs and topics."""
    said = [json.loads(dump(message)) for message in sound_messages()]
    stored, named = sound_blobs(), sound_topics()
    return {
        "message": lambda draw: mutated_message(said, draw),
        "blob": lambda draw: mutated_blob(stored, draw),
        "topic": lambda draw: mutated_topic(named, draw).encode("utf-8", "surrogatepass"),
    }
