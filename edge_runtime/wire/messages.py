"""Control messages: frozen, versioned, JSON, so that `mosquitto_sub -v -t 'edge/#'` shows a person what goes on.

A device says hello, offer and report; the server answers welcome, need, accepted and rejected; the Directive is
retained and says what the current round asks for. A Directive is pure data: a device obeys it and never learns by
which method the server merges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from edge_runtime.errors import CorruptPayloadError, TooLargeError, VersionMismatchError
from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.lora.factors import Factors, Private
from edge_runtime.trainer import AdapterSpec, PersonalSpec, Training
from edge_runtime.wire.blobs import BlobRef, as_ranges
from edge_runtime.wire.sampling import FULL, number_of

PROTOCOL: Final = 1
MAX_MESSAGE_BYTES = 120 * 1024
"""A control message fits the smallest broker limit, as a chunk does."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Examples = Annotated[int, Field(ge=1, le=1 << 40)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
LayerName = Annotated[str, Field(max_length=256)]


# An index as Python writes it; "007" is a name, or it would come back as "7".
_INDEX = re.compile(r"(0|[1-9][0-9]{0,8})\Z")


class Model(BaseModel):
    """Frozen. Unknown fields are ignored, so that a server may be updated before its devices."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LayerGroup(Model):
    """Layers that a device treats alike; 120 layers of a model are a handful of groups.

    A layer's full name is `prefix + index + "." + module`, as in `model.layers.` `3` `.self_attn.q_proj`; that of a
    dense tensor ends in `#` and the tensor's name.
    """

    prefix: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_.]*$")]
    module: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_.]+(#[a-z_]+)?$")]
    layers: Annotated[tuple[tuple[Count, Count], ...], Field(max_length=1024)]
    d_out: Annotated[int, Field(ge=1, le=1 << 24)]
    d_in: Annotated[int, Field(ge=1, le=1 << 24)]
    held: Annotated[int, Field(ge=0, le=4096)]
    trained: Annotated[int, Field(ge=0, le=4096)]


class Band(Model):
    """Directions start..stop of the global adapter, in every layer, as one blob; both factors, or one of them."""

    start: Count
    stop: Count
    blob: BlobRef
    factor: Factors = "ab"


class Sample(Model):
    """Asks the devices whose number in the round is below `below`; see `edge_runtime.wire.sampling`."""

    seed: int
    below: Annotated[int, Field(ge=0, le=FULL)]


class Directive(Model):
    """What the current round asks for. Retained, so a late device needs nothing from the server process.

    phase "gather": plan and say hello. "train": fetch the bands you hold, train, offer. "finish": fetch the bands,
    make the personal adapter, report. `sample` None means everybody who said hello. `run` names one life of the fleet:
    a server with a new store begins another. `increments` says whether an offer may be of that kind. So many versions
    behind this one as `max_staleness` says, an update still counts, and bands can still be fetched.

    An update has the factors `sent`; those that `training` trains and nobody sends have no effect on others. A factor
    that is `private` each device keeps for itself, from round to round, and has in the place of the fleet's.
    """

    v: Literal[1] = PROTOCOL
    type: Literal["directive"] = "directive"
    fleet: Name
    run: Name
    phase: Literal["gather", "train", "finish"]
    round: Count
    version: Count
    num_rounds: Count
    base: str | None = None
    adapter: AdapterSpec
    training: Training
    bands: tuple[Band, ...]
    sample: Sample | None = None
    codec: str
    error_feedback: bool = False
    upload_bytes: Count | None = None
    increments: bool = False
    max_staleness: Count = 0
    sent: Factors = "ab"
    private: Private = ""
    personal: PersonalSpec = PersonalSpec()

    def asks(self, client: str) -> bool:
        """Whether this device takes part in the round."""
        return self.sample is None or number_of(self.sample.seed, self.round, client) < self.sample.below


class Hello(Model):
    """A device introduces itself: what it can bear and which base it has."""

    v: Literal[1] = PROTOCOL
    type: Literal["hello"] = "hello"
    client: Name
    base: str
    examples: Examples
    groups: Annotated[tuple[LayerGroup, ...], Field(min_length=1, max_length=4096)]
    device: Annotated[str, Field(max_length=256)]
    precision: Annotated[str, Field(max_length=16)]
    plan: Annotated[str, Field(max_length=1024)]
    software: Annotated[str, Field(max_length=256)]


class Offer(Model):
    """A device has an update, trained from the version that it received in this `run`.

    kind "slice": the blob is the change of both factors of the slice that it trained. "increment": of each layer, the
    pair whose product is the change: what a gateway's devices changed together. `weights` names the layers that fewer
    than `examples` were trained on, because only some of those devices train them.
    """

    v: Literal[1] = PROTOCOL
    type: Literal["offer"] = "offer"
    client: Name
    run: Name | Literal[""] = ""
    round: Count
    version: Count
    blob: BlobRef
    examples: Examples
    loss_first: Finite
    loss_last: Finite
    kind: Literal["slice", "increment"] = "slice"
    weights: Annotated[tuple[tuple[LayerName, Examples], ...], Field(max_length=1 << 16)] = ()


class Losses(Model):
    """Held-out completion loss, nats per token: of the base, of that merged version, of the personal adapter."""

    base: Finite | None = None
    merged: Finite | None = None
    version: Count = 0
    personal: Finite | None = None


class Report(Model):
    """What a device is doing; for people, and to show progress. The last one, of state "done", ends its fleet life."""

    v: Literal[1] = PROTOCOL
    type: Literal["report"] = "report"
    client: Name
    state: Literal[
        "planned",
        "fetching",
        "evaluating",
        "training",
        "paused",
        "offering",
        "waiting",
        "personalising",
        "exporting",
        "done",
        "failed",
    ]
    round: Count
    step: Count = 0
    steps: Count = 0
    loss: Finite | None = None
    held_out: Losses = Losses()
    bytes_up: Count = 0
    bytes_down: Count = 0
    peak_bytes: Count = 0
    export_max_logit_diff: Finite | None = None
    way: Annotated[str, Field(max_length=64)] = ""
    delivered: Literal["", "personal", "global"] = ""
    """Of state "done": how the personal adapter was made, and which one it left with."""
    detail: Annotated[str, Field(max_length=1024)] = ""


class Welcome(Model):
    """The server has recorded a hello."""

    v: Literal[1] = PROTOCOL
    type: Literal["welcome"] = "welcome"
    client: Name
    fleet: Name


class Need(Model):
    """Chunks of an offered blob that the server lacks, as half-open ranges."""

    v: Literal[1] = PROTOCOL
    type: Literal["need"] = "need"
    sha256: str
    ranges: Annotated[tuple[tuple[Count, Count], ...], Field(max_length=4096)]


class Accepted(Model):
    """The server has durably stored the update, or needs it no more; the device may forget it."""

    v: Literal[1] = PROTOCOL
    type: Literal["accepted"] = "accepted"
    sha256: str
    round: Count


class Rejected(Model):
    """The server refuses a hello or an offer. `code` is stable; `reason` is for people.

    `quota`, `no-space` and `fleet-full` are for now: the device keeps what it has and says it again. `malformed` says
    that something did not parse. `duplicate` is meant for the device of that `instance` alone. All others are for good.
    """

    v: Literal[1] = PROTOCOL
    type: Literal["rejected"] = "rejected"
    code: Literal[
        "fingerprint",
        "shape",
        "duplicate",
        "round-closed",
        "too-large",
        "corrupt",
        "norm",
        "examples",
        "kind",
        "unknown-client",
        "quota",
        "no-space",
        "fleet-full",
        "malformed",
        "not-enrolled",
        "revoked",
    ]
    reason: Annotated[str, Field(max_length=1024)]
    sha256: str = ""
    instance: str = ""
    key: str = ""
    """Of a refused enrolment: the public key that asked. Whoever has another one is not meant."""


class Presence(Model):
    """Retained status of a device; "offline" is its last will.

    `instance` tells two devices of one name apart, `session` counts its connections; a last will has no session.
    """

    v: Literal[1] = PROTOCOL
    type: Literal["presence"] = "presence"
    client: Name
    state: Literal["online", "offline"]
    instance: Annotated[str, Field(max_length=128)] = ""
    session: Count = 0


class Enrol(Model):
    """A device shows its new public key, and that it has the token it was given for it."""

    v: Literal[1] = PROTOCOL
    type: Literal["enrol"] = "enrol"
    client: Name
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    proof: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Enrolled(Model):
    """The server knows this device by this key from now on."""

    v: Literal[1] = PROTOCOL
    type: Literal["enrolled"] = "enrolled"
    client: Name
    key: str


Message = Directive | Hello | Offer | Report | Welcome | Need | Accepted | Rejected | Presence | Enrol | Enrolled

_ANY: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def dump(message: Message) -> bytes:
    """A message as compact JSON.

    Raises:
        TooLargeError: beyond MAX_MESSAGE_BYTES, so some broker would drop the connection.
    """
    payload = message.model_dump_json(exclude_none=True).encode()
    if len(payload) > MAX_MESSAGE_BYTES:
        raise TooLargeError(
            f"a control message has at most {MAX_MESSAGE_BYTES} bytes; this {message.type} has {len(payload)}; "
            "use fewer target modules"
        )
    return payload


def load(payload: bytes) -> Message:
    """The message in a payload from outside.

    Raises:
        TooLargeError: larger than any message of ours.
        VersionMismatchError: another protocol version.
        CorruptPayloadError: not JSON, or not a message; says which field.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise TooLargeError(f"a control message has at most {MAX_MESSAGE_BYTES} bytes; found {len(payload)}")
    try:
        return _ANY.validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        version = _version(first["type"], first["loc"], first["input"])
        if version != PROTOCOL:
            raise VersionMismatchError(
                f"this end speaks protocol {PROTOCOL}; found {version!r:.40}; update the older end"
            ) from error
        raise CorruptPayloadError(f"a message does not parse: {where}: {first['msg']}") from error


def is_absence(payload: bytes) -> bool:
    """Whether a status says that its device is away; who said it is not asked.

    Raises:
        WireError: it is no message.
    """
    found = load(payload)
    return isinstance(found, Presence) and found.state == "offline"


def _version(problem: str, where: tuple[int | str, ...], found: Any) -> object:
    """The protocol version of a payload that does not validate, as far as the problem shows it."""
    if where[-1:] == ("v",):
        return found
    # Another version may have types that this one lacks.
    no_such_type = problem in {"union_tag_invalid", "union_tag_not_found"} and isinstance(found, Mapping)
    return found.get("v", PROTOCOL) if no_such_type else PROTOCOL


def group(slot: Slot) -> tuple[LayerGroup, ...]:
    """A slot in the compact form that travels: equal layers of one module become ranges of indices."""
    alike: dict[tuple[str, str, LayerSlot], list[int]] = {}
    for name, layer in slot.layers.items():
        prefix, index, module = _split(name)
        alike.setdefault((prefix, module, layer), []).append(index)
    return tuple(
        LayerGroup(
            prefix=prefix, module=module, layers=as_ranges(indices),
            d_out=layer.d_out, d_in=layer.d_in, held=layer.held, trained=layer.trained,
        )
        for (prefix, module, layer), indices in alike.items()
    )  # fmt: skip


def ungroup(groups: tuple[LayerGroup, ...]) -> Slot:
    """The slot that groups describe.

    Raises:
        CorruptPayloadError: more than 65,536 layers, a layer named twice, or one that trains more than it holds.
    """
    layers: dict[str, LayerSlot] = {}
    for part in groups:
        for start, stop in part.layers:
            if stop - start + len(layers) > 65_536:
                raise CorruptPayloadError(f"a slot has at most 65536 layers; found {stop - start} in one range")
            for index in range(start, stop):
                name = f"{part.prefix}{index}.{part.module}" if part.prefix else part.module
                if name in layers:
                    raise CorruptPayloadError(f"a slot names each layer once; found '{name}' twice")
                try:
                    layers[name] = LayerSlot(part.d_out, part.d_in, part.held, part.trained)
                except ValueError as error:
                    raise CorruptPayloadError(f"layer '{name}': {error}") from error
    return Slot(layers)


def _split(name: str) -> tuple[str, int, str]:
    """Prefix, index and module of a layer's name, at its first numeric level; ("", 0, name) where there is none."""
    levels = name.split(".")
    for at, level in enumerate(levels):
        if _INDEX.match(level) and 0 < at < len(levels) - 1:
            return ".".join(levels[:at]) + ".", int(level), ".".join(levels[at + 1 :])
    return "", 0, name
