"""`edge-runtime chat`: a personal adapter beside its base, in the terminal; the simplest proof for a person."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

from edge_runtime import config as settings
from edge_runtime.cli import shell
from edge_runtime.errors import ConfigError, ExportError, missing_extra
from edge_runtime.lora.adapter import Adapter
from export import get, origin
from export.card import hub_name
from export.subject import Subject
from profiles.packaged import ALIASES

if TYPE_CHECKING:
    from edge_runtime.train.base import LoadedBase, PreparedBase

ENDS = ("/quit", "/exit")
FRESH = "/new"

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
    console.print(
        Columns([Panel(console.render_str(answer, markup=False, highlight=False), title=name, width=width)
                 for name, answer in answers.items()])
    )  # fmt: skip


@contextmanager
def _opened(order: Order, say: Callable[[str], None]) -> Iterator[tuple[dict[str, Reply], Any]]:
    """Whoever answers, by name, and the base's tokenizer.

    Raises:
        ConfigError: not exactly one folder.
        ExportError: a folder without what it should hold, or nobody says which base it belongs to.
        FingerprintMismatchError: it belongs to another base.
        MissingExtraError: its engine is not installed, or torch.
    """
    given = {name: folder for name in ("adapter", "onnx", "gguf") if (folder := getattr(order, name)) is not None}
    if len(given) != 1:
        raise ConfigError("expected one of --adapter, --onnx and --gguf with a folder; give exactly one")
    ((kind, folder),) = given.items()
    try:
        from edge_runtime.train.base import load, prepare
        from edge_runtime.train.convert import precision_named
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "client") from error
    about = _about(folder)
    spec = _base_of(order, folder, about)
    trained_at = about.precision if about is not None and kind == "adapter" else ""
    precision = order.precision or trained_at or "bf16"
    prepared = prepare(spec, precision=precision, cache=settings.cache_dir(), say=say)
    origin.check(about, prepared.fingerprint, prepared.label)
    # As an answer is worth no more than its device: in bfloat16 wherever the weights may compute in it.
    compute = "bf16" if "bf16" in precision_named(precision).compute else "fp32"
    loaded = load(prepared, compute_dtype=compute)
    if kind == "adapter":
        yield _both(loaded, folder, order.max_tokens), loaded.tokenizer
        return
    with _engine(kind, folder, prepared, spec) as engine:
        base = _reply_of(loaded, order.max_tokens)
        ends = _ends(loaded)
        yield {"base": base, "personal": lambda row: _until(engine.greedy(row, order.max_tokens), ends)}, loaded.tokenizer
