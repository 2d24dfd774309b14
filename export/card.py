"""The model card: README.md of an exported folder, for people and for hubs.

It says what the adapter is for, where it comes from, what it is worth and how it is loaded. It never holds examples,
and what is not known is not said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping

from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.dense import is_dense
from export.origin import Origin
from export.parity import Parity
from export.usage import USAGE, Usage
from profiles.packaged import hub_name

FILE = "README.md"
_LOSSES: Mapping[str, str] = {"base": "the base", "global": "the fleet's adapter", "personal": "this device's adapter"}


def card(form: str, origin: Origin, adapter: Adapter, parity: Parity | None) -> str:
    """The text of a card.

    Args:
        form: a key of `export.FORMATS`.
        origin: where the adapter comes from.
        adapter: what was exported.
        parity: what verification found; None where it was switched off.
    """
    usage = USAGE[form]
    base = hub_name(origin.base)
    parts = [
        _front_matter(form, usage, base, origin),
        f"# {_title(origin, base)}",
        _introduction(form, origin, base),
        _table(("", ""), _facts(origin, adapter)),
        *_section("Held-out loss", _losses(origin)),
        *_section("Parity", [_parity(form, parity)]),
        *_section("How to load it", _loading(usage, base, adapter)),
    ]
    return "\n\n".join(parts) + "\n"


def in_words(adapter: Adapter) -> str:
    """Layers and ranks of an adapter, in a few words."""
    filled = {name: rank for name, rank in adapter.ranks.items() if rank}
    ranks = sorted({rank for name, rank in filled.items() if not is_dense(name)})
    if not ranks:
        return f"{len(filled)} tensors"
    layers = f"{sum(not is_dense(name) for name in filled)} layers"
    return f"{layers}, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")


def modules(adapter: Adapter) -> list[str]:
    """The kinds of layers it changes, such as q_proj."""
    return sorted({name.partition("#")[0].rpartition(".")[2] for name, rank in adapter.ranks.items() if rank})


def _front_matter(form: str, usage: Usage, base: str, origin: Origin) -> str:
    tags = [origin.family, form, "federated-learning", "edge-runtime"]
    lines = [f"base_model: {json.dumps(base)}", f"library_name: {usage.library}"]
    if origin.licence:
        lines.append(f"license: {json.dumps(origin.licence)}")
    lines += ["pipeline_tag: text-generation", "tags:", *(f"  - {json.dumps(tag)}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _title(origin: Origin, base: str) -> str:
    whose = {"personal": "A personal adapter for", "global": "A fleet's adapter for"}.get(origin.kind, "An adapter for")
    return f"{whose} {base.rpartition('/')[2]}"


def _introduction(form: str, origin: Origin, base: str) -> str:
    made = {
        "personal": "A device made it of what its fleet had learnt together and of its own data, which never left it.",
        "global": "The devices of a fleet learnt it together; none of their data left them.",
    }.get(origin.kind, "")
    return f"{made}\nFormat `{form}`, for the base model `{base}`.".strip()


def _facts(origin: Origin, adapter: Adapter) -> Iterator[tuple[str, str]]:
    """What is known, as rows of a table."""
    known = [
        ("Base", f"`{hub_name(origin.base)}`"),
        ("Fingerprint of the base", origin.fingerprint and f"`{origin.fingerprint}`"),
        ("Precision of the base while training", origin.precision),
        ("Licence of the base", origin.licence or "not stated by its files; ask its publisher"),
        ("Family", origin.family),
        ("Size", f"{in_words(adapter)}; {adapter.parameters:,} numbers"),
        ("Target modules", ", ".join(f"`{name}`" for name in modules(adapter))),
        ("Fleet", origin.fleet),
        ("Device", origin.device),
        ("Version of the global adapter", _number(origin.version)),
        ("Rounds", _number(origin.rounds)),
        ("Devices", _number(origin.devices)),
        ("Merged by", origin.method),
        ("Trained on", origin.data),
    ]
    return ((name, value) for name, value in known if value)


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _losses(origin: Origin) -> list[str]:
    rows = [
        (_LOSSES[key], f"{origin.losses[key]:.4f}", f"{math.exp(min(origin.losses[key], 50.0)):.2f}")
        for key in _LOSSES
        if key in origin.losses
    ]
    if not rows:
        return []
    whose = "of this device" if origin.kind == "personal" else "of the devices that reported, on average"
    return [
        f"Of completions that were held out, {whose}, in nats per token.", _table(("with", "loss", "perplexity"), rows)
    ]  # fmt: skip


def _parity(form: str, parity: Parity | None) -> str:
    if parity is None:
        return f"Not verified: the export was told not to open `{form}` in its engine."
    found = parity.distance
    what = "a logit" if parity.of_logits else "the logarithm of a probability"
    agreed = f"{100 * parity.agreement:.1f} % of {parity.greedy_tokens}"
    row = (f"{found.max_logit_diff:.1e}", f"{found.kl:.1e}", agreed)
    return (
        "Opened in its engine and compared with the live adapter, computed in float32, on held-out prompts and the "
        f"answers to them ({found.positions} positions). The adapter itself changes logits by up to "
        f"{parity.effect:.3g}.\n\n"
        + _table((f"largest difference of {what}", "mean KL divergence (nats)", "same greedy token"), [row])
    )


def _loading(usage: Usage, base: str, adapter: Adapter) -> list[str]:
    rank = max((rank for name, rank in adapter.ranks.items() if not is_dense(name)), default=1)
    return [
        f"{engine.name}:\n\n```{engine.language}\n"
        + engine.code.replace("{base}", base).replace("{rank}", str(rank))
        + "\n```"
        for engine in usage.engines
    ]


def _section(title: str, parts: list[str]) -> list[str]:
    return [f"## {title}", *parts] if parts else []


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
