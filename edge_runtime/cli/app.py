"""The verbs and their flags. The work is done in the module of each verb, imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="edge-runtime",
    help="Fine-tune language models on devices that are not alike, over MQTT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="The fleet's TOML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value over the file; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Base = Annotated[str, typer.Option(help="smollm2, a hub id, a local folder, or a GGUF file.")]
Rank = Annotated[int | None, typer.Option(help="Directions to train, instead of what the plan would choose.")]
Held = Annotated[int | None, typer.Option(help="Directions to hold, instead of what the plan would choose.")]
Layers = Annotated[int | None, typer.Option(help="Train the last so many layers, whatever the plan would choose.")]
Precision = Annotated[
    str | None, typer.Option(help="Of the base: nf4, int8, bf16, fp16 or fp32; the plan's choice if absent.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Go without TLS and signatures although others share the network.")
]
MemoryLimit = Annotated[str | None, typer.Option(help="What training may use, such as 900M or 2G.")]


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(help="Rounds of training.", min=1)] = 3,
    device: Annotated[
        list[str] | None,
        typer.Option(help="NAME:MEMORY:DATA, such as pi:900M:stdlib-docs:text; repeatable."),
    ] = None,
    base: Base = "smollm2",
    method: Annotated[str, typer.Option(help="As docs/methods.md names it, such as increment.")] = "increment",
    broker: Annotated[str, typer.Option(help="nats or mosquitto (started here), or HOST:PORT of your own.")] = "nats",
    out: Annotated[Path, typer.Option(help="Folder for plots, metrics, logs and adapters.")] = Path("edge-demo"),
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> int:
    """Everything on this machine: broker, server, three unlike devices, report."""
    from edge_runtime.cli import demo as verb

    return verb.run(rounds, device or [], base, method, broker, out, config, overrides or [])


@app.command()
def profile(
    base: Annotated[str | None, typer.Option(help="Also show the plan for this base model.")] = None,
    as_device: Annotated[str | None, typer.Option(help="Plan as a device of the catalogue, or of a file.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Memory and time part by part, and the next step up.")
    ] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure anew what is remembered.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Also test the link to the broker.")] = False,
    broker: Annotated[str | None, typer.Option(help="HOST[:PORT], for --link.")] = None,
    memory_limit: MemoryLimit = None,
    rank: Rank = None,
    held: Held = None,
    layers: Layers = None,
    precision: Precision = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    json: Json = False,
) -> int:
    """What this device is, and the plan it would follow for a base model."""
    from edge_runtime.cli import profile as verb

    asked = verb.Asked(base, as_device, memory_limit, refresh, explain, link, json)
    flags = {"rank": rank, "held": held, "layers_trained": layers, "precision": precision}
    return verb.run(asked, flags, broker, config, overrides or [])


@app.command()
def prepare(
    base: Base = "smollm2",
    precision: Annotated[str, typer.Option(help="nf4, int8, bf16, fp16 or fp32.")] = "nf4",
    regained: Annotated[int, typer.Option(min=0, help="Directions of what it lost to regain; nf4 only.")] = 0,
) -> int:
    """Convert a base model once, into this user's cache."""
    from edge_runtime.cli import prepare as verb

    return verb.run(base, precision, regained)


@app.command()
def client(
    name: Annotated[str | None, typer.Option(help="Client id; the host name when absent.")] = None,
    data: Annotated[str | None, typer.Option(help="A JSONL file, or stdlib-docs:GROUP.")] = None,
    base: Annotated[str | None, typer.Option(help="smollm2, a hub id, a local folder, or a GGUF file.")] = None,
    broker: Annotated[str | None, typer.Option(help="HOST[:PORT].")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Folder for all that this device remembers.")] = None,
    memory_limit: MemoryLimit = None,
    rank: Rank = None,
    held: Held = None,
    layers: Layers = None,
    precision: Precision = None,
    insecure: Insecure = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    json: Json = False,
) -> int:
    """Join a fleet with this device."""
    from edge_runtime.cli import client as verb

    flags = {
        "name": name, "data": data, "base": base, "state_dir": state_dir,
        "rank": rank, "held": held, "layers_trained": layers, "precision": precision,
    }  # fmt: skip
    return verb.run(flags, broker, memory_limit, config, overrides or [], insecure=insecure, json=json)


@app.command()
def server(
    broker: Annotated[str | None, typer.Option(help="HOST[:PORT].")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of the fleet's durable state.")] = None,
    insecure: Insecure = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    json: Json = False,
) -> int:
    """Run a fleet."""
    from edge_runtime.cli import server as verb

    return verb.run(broker, store, config, overrides or [], insecure=insecure, json=json)


@app.command()
def gateway(
    upstream: Annotated[
        Path, typer.Option(help="TOML file of this gateway as a device of the fleet above: its broker, keys, name.")
    ],
    name: Annotated[str | None, typer.Option(help="Client id in the fleet above; the host name when absent.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of the subtree's durable state.")] = None,
    insecure: Insecure = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    json: Json = False,
) -> int:
    """Serve the devices of a site, as one device of the fleet above; --config is the site's file."""
    from edge_runtime.cli import gateway as verb

    return verb.run(upstream, name, store, config, overrides or [], insecure=insecure, json=json)


@app.command()
def broker(
    kind: Annotated[str, typer.Option(help="nats or mosquitto.")] = "nats",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.", min=1, max=65535)] = 1883,
    store: Annotated[Path, typer.Option(help="Folder of the broker's durable state.")] = Path("edge-broker"),
    provisioned: Annotated[
        Path | None, typer.Option(help="The folder 'broker' of a provisioned fleet: its certificates and rules.")
    ] = None,
    insecure: Insecure = False,
    hub: Annotated[
        int | None, typer.Option(help="Be a hub: brokers of other sites connect to this port.", min=1, max=65535)
    ] = None,
    leaf_of: Annotated[
        str | None, typer.Option(help="Be another site's broker: HOST:PORT of the hub, which keeps everything.")
    ] = None,
) -> int:
    """Run the embedded broker alone."""
    from edge_runtime.cli import broker as verb

    verb_order = verb.Order(kind, host, port, store, provisioned, hub=hub, leaf_of=leaf_of)
    return verb.run(verb_order, insecure=insecure)


@app.command()
def provision(
    folder: Annotated[Path, typer.Argument(metavar="FLEET_DIR", help="Folder of the fleet's secrets.")],
    devices: Annotated[str, typer.Option(help="Devices to add, with commas.")] = "",
    host: Annotated[list[str] | None, typer.Option(help="Name or address of the broker; repeatable.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port of the broker; 8883.", min=1, max=65535)] = None,
    fleet: Annotated[str | None, typer.Option(help="The fleet's name.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="New devices make their key and enrol it once.")] = False,
    renew: Annotated[str, typer.Option(help="Devices that get new keys, with commas; the old are revoked.")] = "",
    revoke: Annotated[str | None, typer.Option(help="A device that no longer belongs to the fleet.")] = None,
    why: Annotated[str, typer.Option(help="Told to a revoked device.")] = "by its operator",
    broker_folder: Annotated[
        Path | None, typer.Option(help="Where the folder 'broker' will lie on the broker's machine.")
    ] = None,
) -> int:
    """Keys, certificates, broker configuration and access rules for a fleet."""
    from edge_runtime.cli import provision as verb
    from edge_runtime.provision.bundle import Order

    def names(text: str) -> list[str]:
        return [name for name in map(str.strip, text.split(",")) if name]

    order = Order(folder, fleet, tuple(host or ()), port, names(devices), tokens, names(renew), broker_folder)
    return verb.run(order, revoke, why)


@app.command()
def simulate(
    file: Annotated[
        Path | None, typer.Argument(metavar="FLEET_TOML", help="The fleet's TOML file, with [simulation].")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="section.key=a,b,c: a run for each; repeatable, all combinations.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for events, tables and what was computed.")] = Path(
        "edge-simulation"
    ),
    report: Annotated[
        Path | None, typer.Option(help="Folder of runs that have ended: write their report, simulate nothing.")
    ] = None,
    target: Annotated[list[float] | None, typer.Option(help="A loss whose cost the report tells; repeatable.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="hours=2, mib=500, joules=1e5: what is reached within it; repeatable.")
    ] = None,
    draw: Annotated[bool, typer.Option(help="Write report.html and figures at the end.")] = True,
    deal: Annotated[
        Path | None, typer.Option(help="Folder for each device's data and configuration: run it for real.")
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> int:
    """A fleet of unlike devices in virtual time; Ctrl-C and go on later."""
    from edge_runtime.cli import simulate as verb
    from edge_runtime.errors import ConfigError
    from simulation.report import protocols

    asked = protocols.questions(target or [], budget or [])
    if file is None and report is not None:
        return verb.report(report, asked, json=json)
    if file is None or report is not None:
        found = "neither" if file is None else "both"
        raise ConfigError(f"simulate takes FLEET_TOML, or --report FOLDER of runs that have ended; found {found}")
    if deal is not None:
        if sweep:
            raise ConfigError("--deal hands out one fleet, and --sweep has several; choose with --set instead")
        return verb.deal(file, deal, overrides or [], json=json)
    return verb.run(file, sweep or [], out, overrides or [], json=json, drawn=draw, asked=asked)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder to write; each format gets a folder of its own in it.")],
    store: Annotated[Path | None, typer.Option(help="A server's store: export a global adapter.")] = None,
    version: Annotated[int | None, typer.Option(help="Which version; the newest when absent.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="A device's state: export its personal adapter.")] = None,
    peft: Annotated[Path | None, typer.Option(help="A folder with an adapter of PEFT's or of this runtime.")] = None,
    format: Annotated[  # noqa: A002  the flag's name
        list[str] | None, typer.Option("--format", help="As docs/exports.md names it; repeatable, or with commas.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model; what is known of the adapter when absent.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the base: bf16, fp16 or fp32; nf4 and int8 for adapters alone.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Texts to verify with, one a line.")] = None,
    verify: Annotated[bool, typer.Option(help="Open each export in its engine and compare with the adapter.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace earlier exports once new ones are whole.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    json: Json = False,
) -> int:
    """A personal or global adapter in the formats of inference engines, each proven equal."""
    from edge_runtime.cli import export as verb

    order = verb.Order(
        out, tuple(format or ["peft"]), store=store, version=version, state_dir=state_dir, peft=peft, base=base,
        precision=precision, prompts=prompts, verify=verify, force=force, json=json,
    )  # fmt: skip
    return verb.run(order, config, overrides or [])


@app.command()
def chat(
    adapter: Annotated[Path | None, typer.Option(help="A folder with an adapter of PEFT's or of this runtime.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="An export in the format onnx or onnx-adapter.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="An export in the format gguf or gguf-merged.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model; what is known of the adapter when absent.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the base: nf4, int8, bf16, fp16 or fp32.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and end.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 64,
    json: Json = False,
) -> int:
    """Try a personal adapter against its base, side by side."""
    from edge_runtime.cli import chat as verb

    order = verb.Order(adapter, onnx, gguf, base=base, precision=precision, max_tokens=max_tokens, json=json)
    return verb.run(order, prompt)


@app.command()
def backup(
    out: Annotated[Path, typer.Option(help="File to write; an older one of that name is replaced once it is whole.")],
    store: Annotated[Path | None, typer.Option(help="A server's store.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> int:
    """A fleet's whole state in one file; its server may run."""
    from edge_runtime.cli import backup as verb

    return verb.backup(store, out, config, overrides or [])


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `backup` wrote.")],
    store: Annotated[Path | None, typer.Option(help="Where the server will look for its store.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Even if a store is there; it is kept as fleet.db.before-restore.")
    ] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> int:
    """Bring a fleet's state back; devices follow by themselves."""
    from edge_runtime.cli import backup as verb

    return verb.restore(file, store, config, overrides or [], replace=replace)


def verbs() -> list[str]:
    """The names of all verbs, in the order of the help."""
    return [str(command.callback.__name__) for command in app.registered_commands if command.callback]
