"""The `[simulation]` section of a fleet's file: frozen, validated, defaults here and nowhere else.

A fleet's file may have it and serve a real fleet as well: `edge_runtime.config` carries it along unread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from edge_runtime import config as fleets
from edge_runtime.config import Config, Device
from edge_runtime.errors import ConfigError, unknown_name
from edge_runtime.sections import Personal, Positive, Section
from profiles.terms import Overrides

PositiveNumber = Annotated[float, Field(gt=0)]
Number = Annotated[float, Field(ge=0)]

OWNED = ("round_seconds", "round_bytes", *(entry.name for entry in fields(Overrides)))
"""Keys of [device] that a group of simulated devices may have as its own."""


def _owned(found: object) -> object:
    for key in found if isinstance(found, Mapping) else ():
        if key not in OWNED:
            raise ValueError(unknown_name("key of [device] for a group", str(key), OWNED))
    return found


class Link(Section):
    """A device's link to the broker; what is absent is the catalogue's."""

    up_mbit_s: PositiveNumber | None = None
    down_mbit_s: PositiveNumber | None = None
    latency_ms: Number | None = None
    """Milliseconds of a small message to the broker and back."""
    loss: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the packets that are lost."""


class Site(Section):
    """A bottleneck that the devices of a site share, each its fair part; None for no bound."""

    up_mbit_s: PositiveNumber | None = None
    down_mbit_s: PositiveNumber | None = None


class Availability(Section):
    """When something is on: a device, or its plug. See `simulation.traces`."""

    kind: Literal["always", "exponential", "diurnal", "file"] = "always"
    on_hours: PositiveNumber = 8.0
    """Exponential: hours on, on average. Diurnal: hours of a day."""
    off_hours: PositiveNumber = 4.0
    """Exponential: hours off, on average."""
    from_hour: Annotated[float, Field(ge=0, lt=24)] = 22.0
    """Diurnal: when it goes on, by the clock of the simulation, which begins at midnight."""
    spread_hours: Number = 1.0
    """Diurnal: standard deviation of both edges, and of each day's."""
    file: Path | None = None
    """CSV or JSON; see `simulation.traces`."""


class Battery(Section):
    """A device's battery, and when it is on the plug."""

    capacity_wh: PositiveNumber
    charge_watts: PositiveNumber = 15.0
    level: Annotated[float, Field(ge=0, le=100)] = 80.0
    """Percent, when the simulation begins."""
    plugged: Availability = Availability(kind="diurnal")


class Devices(Section):
    """So many devices of one kind."""

    device: str
    """Of the catalogue, or the path of a TOML file in the same form, or of what `edge-runtime profile --json` said."""
    count: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$")] | None = None
    """Of the group; its devices are NAME-0, NAME-1 …; that of the catalogue when absent."""
    data_share: PositiveNumber = 1.0
    """Examples of a device of this group, relative to one of another."""
    link: Link = Link()
    site: str | None = None
    """A bottleneck in [simulation.sites]."""
    availability: Availability = Availability()
    battery: Battery | None = None
    memory_limit: Annotated[int, Field(ge=1 << 20)] | None = None
    """Bytes that training may use, below what the device can bear; as of [device]."""
    owner: Annotated[Device, BeforeValidator(_owned)] = Device()
    """What the owners of these devices do not leave to the plan: keys of [device], over those of the fleet's file."""
    idle_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Power of a device that sends or receives, as a share of that under load."""
    straggler_sigma: Number = 0.0
    """Of the logarithm of each round's slowdown, whose median is 1."""
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a device goes away while it trains, in each round."""
    dropout_hours: PositiveNumber = 1.0
    """For how long."""
    crashes_per_hour: Number = 0.0
    """Of work, on average: what was not on its disk is lost."""
    restart_seconds: Number = 60.0
    """Until a device that crashed is back."""


class Surrogate(Section):
    """The regression that stands for a base model; see `simulation.surrogate`."""

    layers: Annotated[int, Field(ge=1, le=256)] = 2
    width: Annotated[int, Field(ge=2, le=4096)] = 32
    rank: Positive = 8
    """Of the change that each class of examples asks for."""
    heterogeneity: Number = 0.5
    """How far classes are apart: the norm of what is a class's own, as a multiple of what all share."""
    noise: Number = 0.1
    """Standard deviation of the noise in a gradient, relative to it."""


class Partition(Section):
    """Who has which examples; see `simulation.partition`."""

    kind: Literal["natural", "dirichlet", "shards", "quantity"] = "dirichlet"
    alpha: PositiveNumber = 0.3
    """Dirichlet: concentration of a device's classes."""
    shards: Positive = 2
    """Shards: pieces of the examples, sorted by class, that each device has."""
    sigma: Number = 1.0
    """Quantity: of the logarithm of the devices' numbers of examples."""


class Simulation(Section):
    """The whole of `[simulation]`."""

    seed: int = 0
    trainer: Literal["surrogate", "real"] = "surrogate"
    engine: Literal["inline", "processes", "ray"] = "inline"
    """Where devices' rounds are computed; the outcome is the same."""
    workers: Positive | None = None
    """Rounds computed at a time, where the engine is not inline; as many as there are cores when absent."""
    ray_address: str | None = None
    """Of a Ray cluster, HOST:PORT or ray://HOST:PORT; auto for the one that this machine, or this Ray job, is part of;
    a cluster of this machine alone when absent."""
    base: str = "SmolLM2-135M"
    """The base model that plans, times and bytes are those of; real training needs its files."""
    data: tuple[Path, ...] = ()
    """Real trainer: JSONL files of examples, whose field `class_field` tells their class; * and ? stand for letters of
    a file's name."""
    class_field: str = "label"
    classes: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Surrogate: classes of examples."""
    examples: Positive = 100
    """Surrogate: examples of a device with a data_share of 1, on average."""
    example_tokens: Positive | None = None
    """Tokens of an example, on average: what steps take goes by it; those of the plan's longest ones when absent."""
    partition: Partition = Partition()
    surrogate: Surrogate = Surrogate()
    sites: Mapping[str, Site] = {}
    devices: Annotated[tuple[Devices, ...], Field(min_length=1)]
    precision: Literal["nf4", "int8", "bf16", "fp16", "fp32"] | None = None
    """Real trainer: of the base for all devices; that of each device's plan when absent."""
    threads: Positive = 1
    """Real trainer: of torch, in each process; what [device] says when absent, else 1."""
    finish: bool = False
    """Whether devices make their personal adapters at the end, as real ones do, or the last version is the end."""
    max_hours: PositiveNumber = 24.0 * 365
    """Of virtual time, after which a run is given up."""
    server_crashes_per_hour: Number = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Simulation:
        names = [name_of(group) for group in self.devices]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two groups of devices are called '{twice[0]}'; give one of them another name")
        for group in self.devices:
            if group.site is not None and group.site not in self.sites:
                raise ValueError(unknown_name("site", group.site, self.sites))
        if self.trainer == "real" and not self.data:
            raise ValueError("trainer = 'real' needs data, a list of JSONL files")
        if self.ray_address is not None and self.engine != "ray":
            raise ValueError(f"ray_address is for engine = 'ray'; found engine '{self.engine}'; change either")
        return self


def name_of(group: Devices) -> str:
    """What a group of devices is called."""
    return group.name or Path(group.device).stem


def files_of(simulation: Simulation) -> list[Path]:
    """The files of examples, those that a pattern stands for in the order of their names.

    Raises:
        ConfigError: a pattern for which no file is there.
    """
    found: list[Path] = []
    for path in simulation.data:
        meant = sorted(path.parent.glob(path.name)) if set(path.name) & set("*?") else [path]
        if not meant:
            raise ConfigError(
                f"simulation.data: no file is called {path}; expected at least one JSONL file of examples"
            )
        found += meant
    return found


def load(path: Path | None, overrides: Sequence[str] = ()) -> tuple[Config, Simulation]:
    """A fleet's file, and its `[simulation]`.

    Raises:
        ConfigError: as `edge_runtime.config.load`; or a key of [simulation] that there is not (lists those there are),
            or a value that cannot be.
    """
    config = fleets.load(path, overrides)
    source = str(path) if path else "--set"
    if not config.simulation.model_extra:
        raise ConfigError(f"{source} has no [simulation]; expected at least one table [[simulation.devices]]")
    _simulated(config.personal, source)
    asked = _nested(config.simulation.model_extra)
    if config.device.threads is not None:
        asked.setdefault("threads", config.device.threads)
    try:
        return config, Simulation.model_validate(asked)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_problem(error)}") from error


def _simulated(personal: Personal, source: str) -> None:
    asked = personal.model_dump(include={"way", "proximal", "rank", "every"}, exclude_defaults=True)
    for key, value in asked.items():
        if (key, value) != ("way", "finetune"):
            raise ConfigError(
                f"{source}: personal.{key} = {value!r} is not simulated: such devices fine-tune from the last global "
                "adapter on; leave it out"
            )


def _nested(found: Mapping[str, Any]) -> dict[str, Any]:
    """The section with what was set by dotted names, such as partition.alpha, in its tables."""
    tree: dict[str, Any] = {key: value for key, value in found.items() if "." not in key}
    for name, value in found.items():
        table, dot, key = name.partition(".")
        if dot:
            inner = tree.get(table, {})
            tree[table] = {**(inner if isinstance(inner, Mapping) else {}), key: value}
    return tree


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _keys_at(Simulation, where[:-1])
        return f"simulation.{'.'.join(where)}: {unknown_name('key', where[-1], known)}"
    problem = first["msg"][:1].lower() + first["msg"][1:]
    found = "" if first["type"] == "value_error" else f"; found {first['input']!r:.200}"
    return f"{'.'.join(['simulation', *where])}: {problem.removeprefix('value error, ')}{found}"


def _keys_at(model: type[BaseModel], where: Sequence[str]) -> list[str]:
    """The keys that a table of [simulation] may have."""
    for part in where:
        field = model.model_fields.get(part)
        inner = _models_in(field.annotation) if field else []
        model = inner[0] if inner else model
    return sorted(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models_in(part)]


def sweeps(asked: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every combination of what is to be tried, each as overrides.

    Args:
        asked: each `section.key=a,b,c`; an entry with commas of its own is written in brackets or quotes.

    Raises:
        ConfigError: not of that form, an unknown key (lists the known ones), or one that is named twice.
    """
    axes: dict[str, list[str]] = {}
    for text in asked:
        name, equals, values = text.partition("=")
        key = name.strip()
        if not equals or not values.strip():
            raise ConfigError(f"--sweep takes section.key=a,b,c; found {text!r}")
        if key in axes:
            raise ConfigError(f"--sweep names '{key}' twice; give all its values at once")
        check_key(key)
        axes[key] = [value.strip() for value in _split(values)]
    for chosen in itertools.product(*axes.values()):
        yield tuple(f"{key}={value}" for key, value in zip(axes, chosen, strict=True))


def check_key(name: str) -> None:
    """Refuse a key that no section has; `[aggregator]` leaves its own to the method, which is asked for later.

    Raises:
        ConfigError: lists the sections, or the keys of the section.
    """
    section, _, key = name.partition(".")
    sections = {**{part: field.annotation for part, field in Config.model_fields.items()}, "simulation": Simulation}
    if section not in sections:
        raise ConfigError(f"--sweep {name}: {unknown_name('section', section, sections)}")
    model: Any = sections[section]
    first, _, inner = key.partition(".")
    if model.model_config.get("extra") != "allow" and first not in model.model_fields:
        raise ConfigError(f"--sweep {name}: {unknown_name(f'key in [{section}]', first, model.model_fields)}")
    if inner:
        tables = _models_in(model.model_fields[first].annotation) if first in model.model_fields else []
        if not tables or inner not in tables[0].model_fields:
            known = tables[0].model_fields if tables else [f"{section}.{first} alone"]
            raise ConfigError(f"--sweep {name}: {unknown_name(f'key in [{section}.{first}]', inner, known)}")


def _split(values: str) -> list[str]:
    """At commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in values:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts
