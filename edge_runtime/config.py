"""Configuration: one TOML file, `--set section.key=value` over it, defaults here and nowhere else.

This module is the only reader of configuration files and of the environment. Doors (the verbs of `cli`) call `load`;
rooms receive values. Names follow the ecosystem: PEFT's, TrainingArguments', Flower's and Mosquitto's.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_runtime import toml
from edge_runtime.errors import ConfigError
from edge_runtime.open_section import OpenSection
from edge_runtime.sections import Fraction, Names, Personal, Positive, Section, Way

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Fleet(Section):
    """Who belongs together."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "fleet"
    """One level of every topic."""
    base: str | None = None
    """Fingerprint of the base model that devices must have; the first device's, when absent."""


class Broker(Section):
    """Which MQTT broker, and how to get in."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 1883
    username: str | None = None
    password_file: Path | None = None
    """A file whose first line is the password; passwords have no place in a fleet's file."""
    cafile: Path | None = None
    certfile: Path | None = None
    keyfile: Path | None = None
    patience: Annotated[float, Field(gt=0)] | None = None
    """Seconds to go on trying before the first connection; None tries for ever."""
    insecure: bool = False
    """Whether less than TLS and signatures will do although the broker is on another machine."""


class Security(Section):
    """The keys that messages are signed with; `edge-runtime provision` makes them."""

    signing_key: Path | None = None
    """This end's private key."""
    server_key: Path | None = None
    """A device: the server's public key, or the old and the new one while it changes."""
    roster: Path | None = None
    """A server: the devices of the fleet and their public keys."""
    token_file: Path | None = None
    """A device without a key: the one-time token with which it enrols the one that it makes."""
    ledger: Path | None = None
    """Where the counters of messages are kept; beside the signing key when absent."""


class Rounds(Section):
    """How the fleet moves from version to version."""

    num_rounds: Positive = 3
    min_available_nodes: Positive = 2
    """Devices that must have said hello before the first round."""
    fraction_train: Fraction = 1.0
    """Share of the devices that a round asks."""
    over_select: Annotated[float, Field(ge=1)] = 1.0
    """Times as many are asked, and the first updates suffice; so many as `fraction_train` says."""
    mode: Literal["synchronous", "buffered"] = "synchronous"
    """Whether a round waits for those it asks, or merges whenever `buffer_size` updates have come, old ones as well."""
    buffer_size: Positive | None = None
    """Updates that fill a buffer; half of those that are asked, when absent."""
    max_staleness: Annotated[int, Field(ge=0, le=1000)] = 4
    """Buffered: versions that an update may be behind. As many stay on the broker."""
    staleness_exponent: Annotated[float, Field(ge=0)] = 0.5
    """Buffered: an update that is s versions behind counts (1 + s) to the power of minus this."""
    quorum: Fraction = 0.5
    """Share of the asked devices whose updates suffice once progress has stopped."""
    progress_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without any sign of progress after which the missing devices are given up for this round."""
    pause_timeout: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds for which a device that says it pauses (battery, heat, a person at it) counts as progress."""


class Adapter(Section):
    """What is trained."""

    family: Literal["lora", "dora", "ia3", "bitfit", "layer_norm", "sparse", "bottleneck", "prompt", "prefix"] = "lora"
    """What a device trains beside its frozen base; see `profiles.families`."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "k_proj", "v_proj", "o_proj")
    scaling: Annotated[float, Field(gt=0)] = 2.0
    """PEFT's lora_alpha / r: one number at every rank, so that unequal devices move at equal speed."""
    max_rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Largest rank that a device may train."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Tokens of an example, at most."""
    regained: Annotated[int, Field(ge=0, le=1024, description="of what a quantised base lost, beside it")] = 0
    slice: Literal["top", "rotating", "fresh", "personal"] = "top"
    """Which of the directions that it holds a device trains; see `edge_runtime.lora.slices`."""
    allocation: Literal["uniform", "spectrum"] = "uniform"
    """Whether all trained layers have the plan's rank, or share what that takes by the spectrum of what was learnt."""


class Aggregator(BaseModel):
    """How updates are merged; `robust` names a rule; other keys go to the builders."""

    model_config = ConfigDict(frozen=True, extra="allow")

    method: str = "increment"
    rank: Positive | None = None
    """Rank of the global adapter; twice `adapter.max_rank` when absent."""


class Training(Section):
    """One local round on a device."""

    max_steps: Positive = 24
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    rate_exponent: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A device that trains r of `adapter.max_rank` directions takes (max_rank / r) to this power times the rate."""
    batch_size: Positive = 4
    """Examples of one optimiser step; the device's plan splits them into micro-batches."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """How the learning rate falls after its warm-up."""
    fleet_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How it falls from round to round, to nearly nothing in the last of `rounds.num_rounds`."""
    lora_plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Learning rate of `b` over that of `a`: LoRA+, arXiv 2402.12354."""
    carry_moments: bool = False
    """Whether a device's optimiser begins a round with the moments of its last one, rotated onto the new factors."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """Strength of the pull back to what was received: FedProx, on products; see `edge_runtime.train.terms`."""
    correction: Annotated[float, Field(ge=0)] = 0.0
    """Strength of the push against a device's own drift: SCAFFOLD's, on products; 1 is all of it."""
    personal_steps: Annotated[int, Field(ge=0)] = 16
    """Steps from the last global adapter to the personal one."""


class Wire(Section):
    """What the bytes look like."""

    codec_up: str = "int8"
    """A codec of `wire.codec`, or auto: bits and ranks go where they matter, within a budget of bytes."""
    error_feedback: bool = True
    """Whether a device adds to an update what the codec lost of the last one."""
    upload_bytes: Positive | None = None
    """Bytes that an update may have with codec_up auto; two bits a number when absent."""
    codec_down: str = "int8"
    chunk_bytes: Annotated[int, Field(ge=1024, le=8 << 20)] = 120 * 1024
    band_edges: tuple[Positive, ...] = (4, 8, 16, 32, 64, 128)
    max_upload_bytes: Positive = 256 << 20
    """Largest update that the server will stage: the bound of each device."""


class Device(Section):
    """This device; read by `edge-runtime client` only."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """Its client id; the host name when absent."""
    base: str = "smollm2"
    data: str = ""
    state_dir: Path = Path("edge-state")
    memory_limit: Annotated[int, Field(ge=1 << 20)] | None = None
    """Bytes that training may use, below what the machine would allow."""
    round_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds that a round of training may take, as planned."""
    round_bytes: Positive | None = None
    """Bytes that a round may move up and down, as planned; what the download leaves of it also bounds `auto`."""
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Directions to train; this key and those below overrule the plan, which still must fit."""
    held: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Directions of the global adapter to hold."""
    layers_trained: Positive | None = None
    """The last so many layers are trained."""
    trained_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Those of `adapter.target_modules` that this device trains; it holds all."""
    precision: Literal["nf4", "int8", "bf16", "fp16", "fp32"] | None = None
    """Of the base's linear weights."""
    compute_dtype: Literal["bf16", "fp32"] | None = None
    """Of activations."""
    product_dtype: Literal["bf16", "fp32"] | None = None
    """In which linear layers multiply; what was measured to be faster, when absent."""
    micro_batch: Positive | None = None
    """Examples that pass through the model at once."""
    gradient_checkpointing: bool | None = None
    """Recompute activations instead of keeping them: of all trained layers, or of none."""
    recomputed_layers: Annotated[int, Field(ge=0)] | None = None
    """Recompute those of so many trained layers, and keep those of the others."""
    optimizer: Literal["adamw", "adamw_8bit"] | None = None
    """8-bit moments take a quarter of the memory; without a GPU their update takes some twenty times as long."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens of an example, at most; not above the fleet's."""
    threads: Positive | None = None
    """Of torch."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the examples held out for evaluation, always the same ones."""
    eval_examples: Positive = 24
    """Held-out examples that are really evaluated, at most."""
    max_examples: Positive | None = None
    personal_way: Way | None = None
    """This key and the four below overrule those of [personal] on this device."""
    personal_proximal: Annotated[float, Field(ge=0)] | None = None
    personal_rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    personal_every: Annotated[int, Field(ge=0)] | None = None
    keep_better: bool | None = None
    max_upload_rate: Positive | None = None
    """Bytes a second that this device sends to the broker, on average; no limit when absent."""
    max_download_rate: Positive | None = None
    """Bytes a second that it reads from the broker, on average."""
    checkpoint_steps: Positive = 10
    """Optimiser steps between two writes of a round's state: what a kill costs at most."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds after which the next complete step is written in any case."""
    report_to: Names = ("none",)
    """Experiment trackers, as in `edge_runtime.train.trackers`; their files go into `state_dir`/runs."""
    task_metrics: Names = ()
    """What the personal adapter's answers are judged by at the end, as in `edge_runtime.train.metrics`."""
    task_metrics_examples: Positive = 8
    """Held-out examples that are answered for it, at most."""


class Governor(Section):
    """When this device pauses its training, and when it goes on; a level of 0 switches that cause off."""

    pause_below_battery: Annotated[float, Field(ge=0, le=100)] = 30.0
    """Percent, while nothing charges it."""
    resume_above_battery: Annotated[float, Field(ge=0, le=100)] = 40.0
    """Percent; or as soon as something charges it."""
    pause_above_temperature: Annotated[float, Field(ge=0, le=150)] = 85.0
    """Degrees Celsius, of the hottest processor or board sensor."""
    resume_below_temperature: Annotated[float, Field(ge=0, le=150)] = 80.0
    """Degrees Celsius."""
    pause_on_user_activity: bool = False
    """Whether a person at the device comes first."""
    user_idle_seconds: Annotated[float, Field(gt=0)] = 300.0
    """A person is there while the last key in a terminal is no older than this."""
    user_cpu_share: Fraction = 0.5
    """A person is there while other programs take more than this share of all processors."""
    check_every: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two looks at the sensors."""


class Server(Section):
    """The server's own disk, and what it bears from devices."""

    store: Path = Path("edge-server")
    max_staged_bytes: Positive = 4 << 30
    """Bytes of all uploads under way together; who comes when they are taken is told to offer again later."""
    upload_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without a new chunk after which an upload gives its room to another that needs it."""
    max_members: Positive = 1000
    """Devices that may say hello."""
    max_examples: Positive = 1_000_000
    """Largest weight that an update may claim."""
    max_norm_ratio: Annotated[float, Field(gt=1)] = 20.0
    """An update that moves the model this many times as far as the median of the accepted ones is refused."""
    max_update_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest Frobenius norm of the change of all layers together; no such limit when absent."""
    engine: str = "local"
    """Where layers are merged: local, threads, processes or ray; see `server.engines`."""
    workers: Positive | None = None
    """Layers merged at a time, where the engine is not local; as many as there are cores when absent."""
    ray_address: str | None = None
    """Of a Ray cluster, HOST:PORT or ray://HOST:PORT; auto for the one that this machine is part of; one of this
    machine alone when absent."""


class Config(Section):
    """The whole of `fleet.toml`."""

    fleet: Fleet = Fleet()
    broker: Broker = Broker()
    security: Security = Security()
    rounds: Rounds = Rounds()
    adapter: Adapter = Adapter()
    aggregator: Aggregator = Aggregator()
    training: Training = Training()
    personal: Personal = Personal()
    wire: Wire = Wire()
    device: Device = Device()
    governor: Governor = Governor()
    server: Server = Server()
    simulation: OpenSection = OpenSection()


ANCHORED: Mapping[str, Sequence[str]] = {
    "broker": ("password_file", "cafile", "certfile", "keyfile"),
    "security": tuple(Security.model_fields),
}
"""Section → keys whose paths, in a file, begin at the folder of that file."""


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a TOML file with `section.key=value` overrides applied.

    Args:
        path: the file; None means defaults only.
        overrides: each `section.key=value`; the value is TOML, or text where it is not TOML.

    Raises:
        ConfigError: no such file, not TOML, an unknown section or key (lists the known ones), or a bad value.
    """
    tree = _anchored(_read(path), path.parent) if path else {}
    for override in overrides:
        _apply(tree, override)
    return _validate(tree, str(path) if path else "--set")


def dump(config: Config, *, defaults: bool = True) -> str:
    """The configuration as TOML that `load` reads back, from any folder.

    Args:
        config: what to write; keys that are None are left out.
        defaults: whether keys that have their default value are written as well.
    """
    lines: list[str] = []
    tree = config.model_dump(mode="json", exclude_none=True, exclude_defaults=not defaults)
    for section, values in _anchored(tree, Path()).items():
        lines += [f"[{section}]", *(f"{toml.key(name)} = {toml.value(found)}" for name, found in values.items()), ""]
    return "\n".join(lines)


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where converted base models and device profiles are kept: $EDGE_RUNTIME_CACHE, or the XDG cache directory."""
    env = os.environ if environ is None else environ
    if env.get("EDGE_RUNTIME_CACHE"):
        return Path(env["EDGE_RUNTIME_CACHE"])
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-runtime"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file expected at {path}; found none; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not a readable TOML file: {error}") from error


def _anchored(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tree with the paths of its secrets starting at a folder, so that a device's folder can be moved whole."""
    for section, keys in ANCHORED.items():
        table = tree.get(section)
        if isinstance(table, dict):
            found = {key: str(folder.absolute() / table[key]) for key in keys if isinstance(table.get(key), str)}
            tree[section] = table | found
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise ConfigError(f"--set takes section.key=value; found {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = tree.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"'{section}' must be a table; found {table!r}")
    table[key] = value


def _validate(tree: Mapping[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{source}: {_unknown(where)}") from error
        # A pattern in the message is not to be changed; only its first letter stands in the middle of a sentence now.
        problem = first["msg"][:1].lower() + first["msg"][1:]
        raise ConfigError(f"{source}: {'.'.join(where)}: {problem}; found {first['input']!r}") from error


def _unknown(where: Sequence[str]) -> str:
    section, key = (None, where[0]) if len(where) == 1 else (where[0], where[1])
    model = Config if section is None else Config.model_fields[section].annotation
    known = sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    what = "section" if section is None else f"key in [{section}]"
    return f"unknown {what} '{key}'{hint}; expected one of: {', '.join(known)}"
