"""`edge-runtime client`: join a fleet with this device, and leave it with a personal adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime import config as settings
from edge_runtime import sensors, ways
from edge_runtime.cli import delivering, guards, shell
from edge_runtime.client import FINISHED, Client
from edge_runtime.config import Config
from edge_runtime.errors import INTERRUPTED, ConfigError, missing_extra
from edge_runtime.governor import Thresholds
from edge_runtime.identity import Identity, instance_of, will
from edge_runtime.keeper import Watch
from edge_runtime.state import DeviceState
from edge_runtime.train import metrics, trackers
from edge_runtime.train.planning import Owner, owner_of
from edge_runtime.wire.bucket import Rates

NVIDIA = Path("/dev/nvidiactl")
"""There where a driver for cards with memory of their own is loaded."""

if TYPE_CHECKING:
    from edge_runtime.train.local import LocalTrainer


def run(
    flags: Mapping[str, Any],
    broker: str | None,
    memory_limit: str | None,
    file: Path | None,
    overrides: Sequence[str],
    *,
    insecure: bool,
    json: bool,
) -> int:
    """Take part until the fleet has finished; 130 when interrupted (the same command goes on)."""
    config = guards.with_insecure(_configure(flags, broker, memory_limit, file, overrides), insecure)
    guards.check(config)
    device = config.device
    name = shell.device_name(config)
    say = shell.logger(name, as_json=json)
    stop = shell.stop_on_signals()
    watch, owner = _watch(config.governor, stop), owner_of(device)
    _preflight(device)
    fleet = config.fleet.name
    with ExitStack() as closing:
        trainer = _trainer(config, owner, say)
        closing.callback(trainer.reports.close)
        state = DeviceState(device.state_dir)
        closing.callback(state.close)
        rates = Rates(device.max_upload_rate, device.max_download_rate)
        guard = closing.enter_context(guards.of_device(config))
        identity = Identity(fleet, name, config.wire.chunk_bytes, instance_of(state), guard, device.round_bytes)
        last_will = will(fleet, name, guard, identity.instance)
        transport = shell.connect(config, f"edge-{fleet}-{name}", say, stop, last_will, rates)
        closing.callback(transport.close)
        guards.enrol(config, name, transport, guard, say, stop)
        client = Client(
            identity,
            transport=transport,
            state=state,
            trainer=trainer,
            deliver=lambda: delivering.deliver(
                trainer,
                device.state_dir / "personal",
                base=device.base,
                names={"fleet": fleet, "device": name},
                facts=state.fact(FINISHED),
            ),
            say=say,
            watch=watch,
            own=_own(device),
        )
        client.run(stop)
    if not client.left:
        say("interrupted; the state is kept, the same command goes on from there")
        return INTERRUPTED
    return 0


def _configure(
    flags: Mapping[str, Any], broker: str | None, memory_limit: str | None, file: Path | None, overrides: Sequence[str]
) -> Config:
    config = shell.with_device(shell.with_broker(settings.load(file, overrides), broker), flags, memory_limit)
    if not config.device.data:
        raise ConfigError("a device trains on its own data; give --data FILE.jsonl, or --data stdlib-docs:GROUP")
    trackers.names_of(config.device.report_to)
    for name in config.device.task_metrics:
        metrics.get(name)
    return config


def _own(device: settings.Device) -> ways.Own:
    """What this device's file says of its personal adapter."""
    return ways.Own(
        way=device.personal_way,
        proximal=device.personal_proximal,
        rank=device.personal_rank,
        every=device.personal_every,
        keep_better=device.keep_better,
    )


def _watch(governor: settings.Governor, stop: Callable[[], bool]) -> Watch:
    """Where this device looks while it works.

    Raises:
        ConfigError: thresholds that contradict each other.
    """
    return Watch(
        thresholds=Thresholds(
            # A level of 0 switches a cause off.
            pause_below_battery=governor.pause_below_battery or None,
            resume_above_battery=governor.resume_above_battery or None,
            pause_above_temperature=governor.pause_above_temperature or None,
            resume_below_temperature=governor.resume_below_temperature or None,
            pause_on_user_activity=governor.pause_on_user_activity,
        ),
        sense=sensors.Sensors(user_idle_seconds=governor.user_idle_seconds, user_cpu_share=governor.user_cpu_share),
        check_every=governor.check_every,
        kernel=sensors.kernel,
        stop=stop,
    )


def _preflight(device: settings.Device) -> None:
    """Refuse in one line what could only end in a kill: importing torch alone takes hundreds of MiB.

    Lenient on purpose, because what the fleet asks for is not known yet: one module, one short example. A machine with
    a card of its own is let through: there the host's memory is not what fills up.

    Raises:
        PlanError: not even that fits.
        BaseModelError: no such base, or its headers cannot be read.
    """
    from profiles.find_card import find_card
    from profiles.plan import plan
    from profiles.probe import probe
    from profiles.terms import Task

    card = find_card(device.base)
    if NVIDIA.exists():
        return
    least = Task((next(iter(card.projections)),), max_rank=1, max_held=1, max_length=8, batch_size=1, steps=1)
    plan(probe(memory_limit=device.memory_limit, measure=False), card, least)


def _trainer(config: Config, owner: Owner, say: Callable[[str], None]) -> LocalTrainer:
    """The real trainer; data and base are looked up first, so that a mistake shows at once and not after minutes."""
    try:
        from edge_runtime.train import data, source

        device = config.device
        examples = data.load_examples(device.data, limit=device.max_examples)
        data.split(examples, fraction=device.eval_fraction)
        source.resolve(device.base)
        from edge_runtime.train.keeping import Keeping
        from edge_runtime.train.local import LocalSettings, LocalTrainer
        from edge_runtime.train.reporting import Reporting
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "client") from error
    chosen = LocalSettings(
        base=device.base,
        examples=examples,
        eval_fraction=device.eval_fraction,
        eval_examples=device.eval_examples,
        owner=owner,
        cache=settings.cache_dir(),
        keeping=Keeping(device.state_dir, device.checkpoint_steps, device.checkpoint_seconds),
        reporting=Reporting(
            device.report_to,
            folder=device.state_dir / "runs",
            project=config.fleet.name,
            config={"device": device.model_dump(mode="json", exclude_none=True)},
            task_metrics=device.task_metrics,
            task_examples=device.task_metrics_examples,
        ),
    )
    return LocalTrainer(chosen, say=say)
