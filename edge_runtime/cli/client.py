"""`edge-runtime client`: join a fleet with this device, and leave it with a personal adapter."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime import config as settings
from edge_runtime.cli import shell
from edge_runtime.client import Client, Identity, will
from edge_runtime.config import Config
from edge_runtime.errors import INTERRUPTED, ConfigError, ExportError, missing_extra
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Delivered

if TYPE_CHECKING:
    from edge_runtime.train.local import LocalTrainer


def run(
    flags: Mapping[str, Any],
    broker: str | None,
    memory_limit: str | None,
    file: Path | None,
    overrides: Sequence[str],
    *,
    json: bool,
) -> int:
    """Take part until the fleet has finished; 130 when interrupted (the same command goes on)."""
    config = _configure(flags, broker, memory_limit, file, overrides)
    device = config.device
    name = device.name or re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:64] or "device"
    say = shell.logger(name, as_json=json)
    stop = shell.stop_on_signals()
    trainer = _trainer(config, say, stop)
    state = DeviceState(device.state_dir)
    fleet = config.fleet.name
    transport = shell.connect(config, f"edge-{fleet}-{name}", say, stop, will(fleet, name))
    try:
        client = Client(
            Identity(fleet, name, config.wire.chunk_bytes),
            transport=transport,
            state=state,
            trainer=trainer,
            deliver=lambda: _deliver(trainer, device.state_dir / "personal"),
            say=say,
        )
        client.run(stop)
    finally:
        transport.close()
        state.close()
    if not client.left:
        say("interrupted; the state is kept, the same command goes on from there")
        return INTERRUPTED
    return 0


def _configure(
    flags: Mapping[str, Any], broker: str | None, memory_limit: str | None, file: Path | None, overrides: Sequence[str]
) -> Config:
    config = shell.with_broker(settings.load(file, overrides), broker)
    given = {key: value for key, value in flags.items() if value is not None}
    if memory_limit is not None:
        given["memory_limit"] = shell.size(memory_limit)
    config = config.model_copy(update={"device": config.device.model_copy(update=given)})
    if not config.device.data:
        raise ConfigError("a device trains on its own data; give --data FILE.jsonl, or --data stdlib-docs:GROUP")
    return config


def _trainer(config: Config, say: Callable[[str], None], stop: Callable[[], bool]) -> LocalTrainer:
    """The real trainer; data and base are looked up first, so that a mistake shows at once and not after minutes."""
    try:
        from edge_runtime.train import data, source

        device = config.device
        examples = data.load_examples(device.data, limit=device.max_examples)
        data.split(examples, fraction=device.eval_fraction)
        source.resolve(device.base)
        from edge_runtime.train.local import LocalSettings, LocalTrainer
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "client") from error
    chosen = LocalSettings(
        base=device.base,
        examples=examples,
        eval_fraction=device.eval_fraction,
        eval_examples=device.eval_examples,
        memory_limit=device.memory_limit,
        threads=device.threads,
        batch_size=config.training.batch_size,
        cache=settings.cache_dir(),
    )
    return LocalTrainer(chosen, say=say, should_stop=stop)


def _deliver(trainer: LocalTrainer, folder: Path) -> Delivered:
    """Export the personal adapter as a PEFT folder, load it into a fresh model, and compare logits in fp32.

    Raises:
        ExportError: it could not be written, or does not compute what the live model computes.
    """
    from export import get, verify

    ready = trainer.ready
    prompts = verify.encode(ready.base.tokenizer)
    live = verify.live_logits(ready.live, prompts)
    prepared, scaling = ready.base.prepared, ready.spec.scaling
    get("peft").write(trainer.personal(), folder, base_name=str(prepared.folder), scaling=scaling)
    del ready
    # A small device has no room for two models: the live one goes before the fresh one comes.
    trainer.release()
    parity = verify.verify_peft(folder, prepared, prompts, live)
    if parity.max_abs > verify.TOLERANCE:
        raise ExportError(
            f"the adapter in {folder} changes logits by {parity.max_abs:.1e} against the live model, "
            f"expected at most {verify.TOLERANCE:.0e}; do not use it, and report this as a bug"
        )
    return Delivered(str(folder), parity.max_abs)
