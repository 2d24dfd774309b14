"""`edge-runtime export`: a personal or global adapter in the formats of inference engines, each tried in its own."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime import config as settings
from edge_runtime.cli import leaving as sources
from edge_runtime.cli import shell
from edge_runtime.config import Config
from edge_runtime.errors import ConfigError, DataError, EdgeRuntimeError, ExportError, missing_extra
from export import folders, get, origin
from export.card import in_words
from export.making import Made, make, summary
from export.reading import Leaving, base_named, base_spec, family_of
from export.subject import Subject

if TYPE_CHECKING:
    from edge_runtime.train.base import PreparedBase
    from export.verify import Reference

MIB = 2**20
Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What a person asked for.

    Attributes:
        out: a folder is made in it for each format.
        formats: keys of `export.FORMATS`; one text may name several, with commas.
        store: a server's store.
        version: of its global adapters; the newest when None.
        state_dir: a device's state.
        peft: a folder with an adapter, PEFT's or ours.
        base: the base model; what is known of the adapter says it when None.
        precision: of the base's weights. When None, bf16; of formats that need no base, what it was trained at.
        prompts: a file of texts to compare on, one a line.
        verify: whether each artefact is tried in its engine.
        force: whether earlier exports are replaced.
        json: whether the result is JSON.
    """

    out: Path
    formats: tuple[str, ...]
    store: Path | None = None
    version: int | None = None
    state_dir: Path | None = None
    peft: Path | None = None
    base: str | None = None
    precision: str | None = None
    prompts: Path | None = None
    verify: bool = True
    force: bool = False
    json: bool = False

    @property
    def names(self) -> list[str]:
        """The formats, each once, in the order given."""
        return list(dict.fromkeys(name.strip() for text in self.formats for name in text.split(",") if name.strip()))


def run(order: Order, file: Path | None, overrides: Sequence[str]) -> int:
    """Write the adapter in each format and say where it is.

    All that can be refused is refused before anything is written. If one format fails, the others are made all the
    same, and the first error is raised at the end.
    """
    if not order.names:
        raise ConfigError("--format takes at least one name, such as peft")
    for name in order.names:
        get(name)
    # Libraries that set logging up when they are imported let every file that gguf writes be told.
    logging.getLogger("gguf").setLevel(logging.WARNING)
    config = settings.load(file, overrides)
    say = shell.logger("export", as_json=order.json)
    found, what = _found(order, config, given=bool(file or overrides))
    spec = _base_of(order, found, config)
    say(f"{what}: {in_words(found.adapter)}")
    prepared = None
    if order.verify or any(get(name).needs_base for name in order.names):
        prepared, found = _prepared(order, found, spec, say)
    subject = Subject(found.adapter, found.scaling, spec, prepared, family_of(found.adapter))
    for name in order.names:
        get(name).refuse(subject)
        folders.check_free(order.out / name, force=order.force)
    about = found.origin.model_copy(update={"base": found.origin.base or base_named(spec)})
    order.out.mkdir(parents=True, exist_ok=True)
    return _report(order, _make_all(order, config, subject, about, say))


def _found(order: Order, config: Config, *, given: bool) -> tuple[Leaving, str]:
    """The adapter, and what it is in a few words.

    Raises:
        ExportError: not exactly one place to take it from, or nothing there.
    """
    if sum(place is not None for place in (order.store, order.state_dir, order.peft)) != 1:
        raise ExportError(
            "expected one of --store (a server's), --state-dir (a device's) and --peft (a folder); give exactly one"
        )
    if order.store is not None:
        return sources.of_server(order.store, order.version, config, given=given)
    return (
        sources.of_device(order.state_dir) if order.state_dir is not None else sources.of_folder(Path(str(order.peft)))
    )


def _base_of(order: Order, found: Leaving, config: Config) -> str:
    """The base model, in a word that `--base` would take.

    Raises:
        ExportError: nobody says which.
    """
    named = order.base or base_spec(found.origin, found.base) or (config.device.base if order.store else "")
    if not named:
        raise ExportError(
            f"expected to know the base model of this adapter; found {found.origin.base or 'nothing'}; give --base"
        )
    return named


def _prepared(order: Order, found: Leaving, spec: str, say: Say) -> tuple[PreparedBase, Leaving]:
    """The base itself, which must be that of the adapter; and the adapter, with what only the base knows.

    Raises:
        FingerprintMismatchError: the adapter belongs to another base.
        MissingExtraError: there is no torch here.
    """
    try:
        from edge_runtime.train.base import prepare
        from edge_runtime.train.source import resolve
        from export.licence import licence_of
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "client") from error
    needed = any(get(name).needs_base for name in order.names)
    precision = order.precision or ("" if needed else found.origin.precision) or "bf16"
    prepared = prepare(spec, precision=precision, cache=settings.cache_dir(), say=say)
    origin.check(found.origin, prepared.fingerprint, prepared.label)
    more = {
        "fingerprint": prepared.fingerprint,
        "licence": found.origin.licence or licence_of(resolve(spec)),
    }
    return prepared, replace(found, origin=found.origin.model_copy(update=more))


def _make_all(
    order: Order, config: Config, subject: Subject, about: origin.Origin, say: Say
) -> dict[str, tuple[Made, float] | EdgeRuntimeError]:
    """Format → what was made and in how many seconds, or why it was not."""
    made: dict[str, tuple[Made, float] | EdgeRuntimeError] = {}
    with folders.scratch(order.out) as scratch:
        known = _reference(order, config, subject, scratch, say) if order.verify else None
        for name in order.names:
            start = time.monotonic()
            try:
                done = make(name, subject, order.out / name, about, known, force=order.force)
            except EdgeRuntimeError as error:
                say(f"{name}: {error}")
                made[name] = error
            else:
                made[name] = done, time.monotonic() - start
                say(f"{name}: {_in_words(done)}; read by {get(name).readers}")
    return made


def _reference(order: Order, config: Config, subject: Subject, scratch: Path, say: Say) -> Reference:
    """What the live model says to the prompts."""
    from export import verify

    prompts, whence = _prompts(order, config, verify.tokenizer_of(subject))
    say(f"computing the live adapter's answers to {len(prompts)} prompts ({whence})")
    return verify.reference(subject, prompts, scratch)


def _prompts(order: Order, config: Config, tokenizer: Any) -> tuple[tuple[tuple[int, ...], ...], str]:
    """Token ids of what the artefacts are compared on, and where it comes from.

    Raises:
        DataError: no such file, or nothing in it.
    """
    from edge_runtime.train import data
    from export import verify

    if order.prompts is not None:
        try:
            lines = order.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"expected prompts, one a line, in {order.prompts}; found: {error}") from error
        found = verify.encode(tokenizer, [line for line in lines if line.strip()])
        if not found:
            raise DataError(f"expected prompts, one a line, in {order.prompts}; found none")
        return found, str(order.prompts)
    if config.device.data:
        examples = data.load_examples(config.device.data, limit=config.device.max_examples)
        held_out = data.split(examples, fraction=config.device.eval_fraction)[1][: verify.MOST_PROMPTS]
        rows = [data.tokenise_whole(example, tokenizer).input_ids for example in held_out]
        return tuple(row[: verify.PROMPT_TOKENS] for row in rows if row), "held out of this device's data"
    return verify.encode(tokenizer), "built in; --prompts FILE gives others"


def _in_words(made: Made) -> str:
    size = f"{made.folder}, {made.size / MIB:.1f} MiB"
    if made.parity is None:
        return f"{size}, not verified"
    found = made.parity.distance
    what = "|Δlogit|" if made.parity.of_logits else "|Δ log p|"
    return (
        f"{size}, max {what} {found.max_logit_diff:.1e}, KL {found.kl:.1e}, "
        f"{100 * made.parity.agreement:.1f} % of {made.parity.greedy_tokens} greedy tokens alike"
    )


def _report(order: Order, made: dict[str, tuple[Made, float] | EdgeRuntimeError]) -> int:
    """Print the result; raises the first error, if there is one."""
    if order.json:
        rows = {name: _row(name, found) for name, found in made.items()}
        print(json.dumps(rows))  # noqa: T201  this is the output
    for found in made.values():
        if isinstance(found, EdgeRuntimeError):
            raise found
    return 0


def _row(name: str, found: tuple[Made, float] | EdgeRuntimeError) -> dict[str, Any]:
    if isinstance(found, EdgeRuntimeError):
        return {"error": str(found), "exit_code": found.exit_code}
    made, seconds = found
    parity = {} if made.parity is None else summary(name, get(name), made.parity)
    return {"folder": str(made.folder), "bytes": made.size, "seconds": round(seconds, 3), **parity}
