"""`edge-runtime chat`: a personal adapter beside its base, in the terminal; the simplest proof for a person."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from edge_runtime import config as settings
from edge_runtime.cli import shell
from edge_runtime.errors import ConfigError, ExportError, missing_extra
from edge_runtime.lora.adapter import Adapter
from export import get, origin, reading
from export.subject import Engine, Subject

if TYPE_CHECKING:
    from edge_runtime.train.base import LoadedBase

ENDS = ("/quit", "/exit")
FRESH = "/new"

ENGINES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "onnx": (("onnx-adapter", "adapter.onnx_adapter"), ("onnx", "model.onnx")),
    "gguf": (("gguf", "adapter.gguf"), ("gguf-merged", "model.gguf")),
}
"""Flag → the formats that it opens, each with a file by which its folder is known."""

Reply = Callable[[Sequence[int]], Sequence[int]]
"""Token ids of a prompt → those of its answer."""


@dataclass(frozen=True)
class Order:
    """What a person asked for.

    Attributes:
        adapter: a folder with an adapter, PEFT's or ours.
        onnx: a folder that was exported for ONNX Runtime.
        gguf: a folder that was exported for llama.cpp.
        base: the base model; what is known of the adapter says it when None.
        precision: of the base's weights; when None, what the adapter was trained at, for engines bf16.
        max_tokens: of an answer, at most.
        json: whether an answer is JSON.
    """

    adapter: Path | None = None
    onnx: Path | None = None
    gguf: Path | None = None
    base: str | None = None
    precision: str | None = None
    max_tokens: int = 64
    json: bool = False


@dataclass
class Talk:
    """Two conversations of the same questions. Not frozen: they grow.

    Attributes:
        replies: who answers → how.
        turns: who answers → what was said so far, as a chat template takes it.
    """

    replies: dict[str, Reply]
    turns: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def ask(self, text: str, tokenizer: Any) -> dict[str, str]:
        """Everybody's answer to a question, which they remember."""
        answers: dict[str, str] = {}
        for name, reply in self.replies.items():
            turns = self.turns.setdefault(name, [])
            turns.append({"role": "user", "content": text})
            found = tokenizer.decode(reply(_tokens(turns, tokenizer)), skip_special_tokens=True)
            answers[name] = str(found).strip()
            turns.append({"role": "assistant", "content": answers[name]})
        return answers


def run(order: Order, prompt: str | None) -> int:
    """Answer one prompt, or as many as a person types."""
    console = Console()
    with _opened(order, shell.logger("chat", as_json=order.json)) as (replies, tokenizer):
        talk = Talk(replies)
        if prompt is not None:
            _show(console, talk.ask(prompt, tokenizer), as_json=order.json)
            return 0
        console.print(f"[dim]{FRESH} begins anew, {ENDS[0]} or Ctrl-D ends[/dim]", highlight=False)
        for text in _typed(console):
            if text == FRESH:
                talk.turns.clear()
            else:
                _show(console, talk.ask(text, tokenizer), as_json=order.json)
    return 0


def _tokens(turns: Sequence[dict[str, str]], tokenizer: Any) -> list[int]:
    """A conversation as the base was trained to see it; without a chat template, one line after the other."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    else:
        text = "\n".join(turn["content"] for turn in turns)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _typed(console: Console) -> Iterator[str]:
    """What a person types, until an end."""
    while True:
        try:
            text = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if text in ENDS:
            return
        if text:
            yield text


def _show(console: Console, answers: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answers))  # noqa: T201  what --json is for
        return
    width = max(20, (console.width - 2) // len(answers))
    # A model may say anything: its words are no markup.
    console.print(Columns(Panel(Text(answer), title=name, width=width) for name, answer in answers.items()))


@contextmanager
def _opened(order: Order, say: Callable[[str], None]) -> Iterator[tuple[dict[str, Reply], Any]]:
    """Whoever answers, by name, and the base's tokenizer.

    Raises:
        ConfigError: not exactly one folder.
        ExportError: a folder without what it should hold, or nobody says which base it belongs to.
        FingerprintMismatchError: it belongs to another base.
        MissingExtraError: its engine is not installed, or torch.
    """
    kind, folder = _chosen(order)
    about = origin.read(folder)
    found = reading.read(folder) if kind == "adapter" else None
    spec = order.base or _base_of(about or (found.origin if found else None), found.base if found else "")
    try:
        from edge_runtime.train.base import load, prepare
        from edge_runtime.train.convert import precision_named
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "client") from error
    trained_at = about.precision if about is not None and found is not None else ""
    prepared = prepare(spec, precision=order.precision or trained_at or "bf16", cache=settings.cache_dir(), say=say)
    origin.check(about, prepared.fingerprint, prepared.label)
    narrow = "bf16" in precision_named(prepared.precision).compute
    loaded = load(prepared, compute_dtype="bf16" if narrow else "fp32")
    if found is not None:
        yield _in_one_model(loaded, found, order.max_tokens), loaded.tokenizer
        return
    name = next(name for name, file in ENGINES[kind] if (folder / file).exists())
    say(f"opening {folder} as {name}")
    engine = get(name).open_engine(Subject(Adapter({}), 1.0, spec, prepared), folder)
    try:
        yield _in_two(loaded, engine, order.max_tokens), loaded.tokenizer
    finally:
        engine.close()


def _chosen(order: Order) -> tuple[str, Path]:
    """Which of the flags was given, and its folder."""
    given = {kind: folder for kind in ("adapter", *ENGINES) if (folder := getattr(order, kind)) is not None}
    if len(given) != 1:
        raise ConfigError("expected one of --adapter, --onnx and --gguf with a folder; give exactly one")
    ((kind, folder),) = given.items()
    if kind in ENGINES and not any((folder / file).exists() for _, file in ENGINES[kind]):
        files = " or ".join(file for _, file in ENGINES[kind])
        raise ExportError(f"expected an export for --{kind} in '{folder}', with {files}; found none; export it first")
    return kind, folder


def _base_of(about: origin.Origin | None, told: str) -> str:
    """The base model, in a word that `--base` would take.

    Raises:
        ExportError: nobody says which.
    """
    found = reading.base_spec(about, told)
    if not found:
        known = f"'{about.base}', which is a name and no place" if about is not None and about.base else "nothing"
        raise ExportError(f"expected to know the base model of this adapter; found {known}; give --base")
    return found


def _in_one_model(loaded: LoadedBase, found: reading.Leaving, count: int) -> dict[str, Reply]:
    """The base with the adapter in it, switched off for the base's own answers: one model in memory."""
    from edge_runtime.train import mixed
    from export.attached import attached

    live = attached(loaded.model, found.adapter, scaling=found.scaling)
    personal = _reply_of(live.model, loaded.tokenizer, count)

    def base(row: Sequence[int]) -> Sequence[int]:
        with mixed.without_adapter(live):
            return personal(row)

    return {"base": base, "personal": personal}


def _in_two(loaded: LoadedBase, engine: Engine, count: int) -> dict[str, Reply]:
    """The base in torch, and the personal adapter in its engine, which goes on behind an end: that is cut off here."""
    from edge_runtime.train.generate import stop_tokens

    ends = stop_tokens(loaded.model, loaded.tokenizer)

    def personal(row: Sequence[int]) -> Sequence[int]:
        found = engine.greedy(row, count)
        return found[: next((index for index, token in enumerate(found) if token in ends), len(found))]

    return {"base": _reply_of(loaded.model, loaded.tokenizer, count), "personal": personal}


def _reply_of(model: Any, tokenizer: Any, count: int) -> Reply:
    from edge_runtime.train.generate import generate, stop_tokens

    stop = stop_tokens(model, tokenizer)
    return lambda row: generate(model, [row], stop=stop, max_new_tokens=count)[0]
