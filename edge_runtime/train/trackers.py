"""Where the numbers of a run go: experiment trackers through accelerate, and a JSONL file that needs nothing at all.

`report_to` names them as Hugging Face's `TrainingArguments` does. Nothing leaves this machine unless its owner says so:
trackers that speak to a service are opened in their offline mode, and `options` is the way to open them otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError, DataError, MissingExtraError, missing_extra, unknown_name

Values = Mapping[str, float | int | str]
Options = Mapping[str, Any]

ALL, NONE, JSONL = "all", "none", "jsonl"
RECORDS = "metrics.jsonl"
"""The file that the tracker `jsonl` appends to."""


@dataclass(frozen=True)
class Tracker:
    """An open tracker, or several of them behind one pair of functions.

    Attributes:
        names: the trackers that are behind it.
        log: (values by name, step): record them.
        close: record no more, and let each tracker finish what it does in the background.
    """

    names: tuple[str, ...]
    log: Callable[[Values, int], None]
    close: Callable[[], None]


@dataclass(frozen=True)
class Kind:
    """One tracker that accelerate knows.

    Attributes:
        packages: PyPI names; any one of them suffices, the first is recommended.
        modules: what each of them is imported as.
        offline: options that keep it on this machine, given the folder of the run.
    """

    packages: tuple[str, ...]
    modules: tuple[str, ...]
    offline: Callable[[Path], Options]


# The trackers of accelerate 1.15 but clearml, which can only be told by a call of its own to stay offline.
KINDS: dict[str, Kind] = {
    "aim": Kind(("aim",), ("aim",), lambda _: {}),  # a folder
    "comet_ml": Kind(("comet_ml",), ("comet_ml",), lambda _: {"online": False}),
    "dvclive": Kind(("dvclive",), ("dvclive",), lambda folder: {"dir": str(folder / "dvclive")}),
    # A database in the working folder, or what MLFLOW_TRACKING_URI names; mlflow-skinny knows servers alone.
    "mlflow": Kind(("mlflow", "mlflow-skinny"), ("mlflow",), lambda _: {}),
    "swanlab": Kind(("swanlab",), ("swanlab",), lambda folder: {"mode": "offline", "logdir": str(folder / "swanlab")}),
    "tensorboard": Kind(("tensorboard", "tensorboardX"), ("tensorboard", "tensorboardX"), lambda _: {}),  # a folder
    "trackio": Kind(("trackio",), ("trackio",), lambda _: {}),  # a local database, unless a Space is named
    "wandb": Kind(("wandb",), ("wandb",), lambda folder: {"mode": "offline", "dir": str(folder)}),
}


def open_tracker(
    report_to: str | Sequence[str],
    project: str,
    config: Mapping[str, object],
    folder: Path,
    *,
    options: Mapping[str, Options] | None = None,
) -> Tracker:
    """Open the trackers that `report_to` names, and record the settings of the run.

    Args:
        report_to: "none", "all" (the JSONL file and whatever is installed), one name, or several.
        project: what the run belongs to; a folder or an experiment of that name, as each tracker has it.
        config: settings of the run; nested mappings become `outer.inner`.
        folder: for what is written; made when something is.
        options: for each tracker, arguments of its own `init`; they win over those that keep it offline.

    Raises:
        ConfigError: a name that is no tracker; lists those there are.
        MissingExtraError: the library of a tracker is not installed.
        DataError: the folder cannot be written.
    """
    names = names_of(report_to)
    given = options or {}
    for name in given:
        if name not in KINDS:
            raise ConfigError(unknown_name("tracker with options", name, KINDS))
    settings = flat(config)
    with ExitStack() as opened:  # of several trackers, none stays open when one of them cannot be opened
        trackers = []
        for name in names:
            tracker = _open(name, project, settings, folder, given.get(name, {}))
            opened.callback(tracker.close)
            trackers.append(tracker)
        closing = opened.pop_all()

    def log(values: Values, step: int) -> None:
        for tracker in trackers:
            tracker.log(values, step)

    return Tracker(names, log, closing.close)


def names_of(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """The trackers that `report_to` stands for, each once: none for "none", and what is installed for "all".

    Raises:
        ConfigError: a name that is no tracker (lists those there are), or "none" beside others.
    """
    asked = (report_to,) if isinstance(report_to, str) else tuple(report_to)
    for name in asked:
        if name not in {ALL, NONE, JSONL, *KINDS}:
            raise ConfigError(unknown_name("tracker", name, (ALL, NONE, JSONL, *KINDS)))
    if NONE in asked and set(asked) != {NONE}:
        raise ConfigError(f"expected report_to to be 'none' or trackers; found {', '.join(asked)}; drop 'none'")
    found = [name for name in asked if name not in {ALL, NONE}]
    if ALL in asked:
        found += [JSONL, *(name for name in KINDS if _is_installed(name))]
    return tuple(dict.fromkeys(found))


def _is_installed(name: str) -> bool:
    return any(importlib.util.find_spec(module) is not None for module in KINDS[name].modules)


def flat(config: Mapping[str, object], before: str = "") -> dict[str, bool | int | float | str]:
    """Settings as trackers take them: one level, and numbers, truth values or texts.

    Raises:
        DataError: two settings of one flat name.
    """
    found: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        inner = (
            flat(value, f"{before}{key}.")
            if isinstance(value, Mapping)
            else {f"{before}{key}": value if isinstance(value, bool | int | float | str) else str(value)}
        )
        if twice := found.keys() & inner.keys():
            raise DataError(f"expected settings of different names; found {min(twice)} twice; rename one")
        found.update(inner)
    return found


def _open(name: str, project: str, config: dict[str, bool | int | float | str], folder: Path, own: Options) -> Tracker:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if name == JSONL:
            return _open_jsonl(project, config, folder)
    except OSError as error:
        raise DataError(f"expected to write the run's records into {folder}; found: {error}; choose another") from error
    return _open_with_accelerate(name, project, config, folder, own)


def _open_jsonl(project: str, config: Mapping[str, object], folder: Path) -> Tracker:
    """One JSON object a line, written through at once; what was there is kept, so that a resumed run goes on."""
    file = (folder / RECORDS).open("a+b")
    if file.tell():
        file.seek(-1, 2)
        if file.read(1) != b"\n":  # a line that a power failure cut
            file.write(b"\n")

    def write(record: Mapping[str, object]) -> None:
        spoken = {key: _spoken(value) for key, value in record.items()}
        file.write(json.dumps(spoken, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        file.flush()

    write({"project": project, "config": dict(config)})
    return Tracker((JSONL,), lambda values, step: write({"step": step, **values}), file.close)


def _spoken(value: object) -> object:
    """JSON has no word for what is not finite; 'nan', 'inf' and '-inf' are read back by float()."""
    if isinstance(value, dict):
        return {key: _spoken(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _open_with_accelerate(
    name: str, project: str, config: dict[str, bool | int | float | str], folder: Path, own: Options
) -> Tracker:
    if not _is_installed(name):
        package = KINDS[name].packages[0]
        raise MissingExtraError(
            f"the tracker '{name}' needs '{package}', which is not installed; pip install {package}"
        )
    try:
        tracking: Any = importlib.import_module("accelerate.tracking")
        state: Any = importlib.import_module("accelerate.state")
    except ModuleNotFoundError as missing:
        raise missing_extra(missing.name or "accelerate", "client") from missing
    # Its trackers log through a logger that asks for this state. Of one process, it is a record and no more.
    state.PartialState()
    build = tracking.LOGGER_TYPE_TO_CLASS[name]
    settings = {**KINDS[name].offline(folder), **own}
    tracker = build(project, folder, **settings) if build.requires_logging_directory else build(project, **settings)
    if hasattr(tracker, "start"):  # older ones of accelerate start when they are built
        try:
            tracker.start()
        except ImportError as error:
            raise MissingExtraError(
                f"the tracker '{name}' is installed but cannot be loaded: {error}; install it again with what it needs"
            ) from error
    tracker.store_init_configuration(config)
    return Tracker((name,), lambda values, step: tracker.log(dict(values), step=step), tracker.finish)
