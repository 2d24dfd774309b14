"""docs/methods.md, made from the table of methods: `python -m server.aggregators.page > docs/methods.md`.

Numbers that travel are counted from what a method's rounds ask for, on the layers of a reference model, and stand
relative to FedIT's. At equal codecs that is the ratio of bytes; a codec's own gains are in docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from edge_runtime.lora.factors import Factors, numbers_in
from server.aggregators import METHODS
from server.aggregators.method import Aggregator, Shapes
from server.aggregators.row import Row

REFERENCE: Shapes = {
    f"model.layers.{index}.self_attn.{module}": (d_out, 2048)
    for index in range(16)
    for module, d_out in (("q_proj", 2048), ("k_proj", 512), ("v_proj", 512), ("o_proj", 2048))
}
"""The attention projections of Llama-3.2-1B."""
RANK = 16
"""What every device of the reference fleet trains."""
PERIOD = 2
"""Rounds after which a method asks for the same again, at most."""

HEAD = """# Methods of aggregation

Made from the table in `server/aggregators/__init__.py` by `python -m server.aggregators.page > docs/methods.md`; a test
compares them. Each method is one file there, whose docstring has formula, source, cost and how it differs from its
paper; each is tested against that formula, and every row runs end to end over MQTT in a test.

"""

TAIL = """
- **Up** and **down**: numbers that a device sends and fetches in a round, relative to FedIT, once the first version is
  there: counted on the attention projections of Llama-3.2-1B, every device training rank 16, at equal codecs. Where
  devices may hold more than they train, *down* is that of one that holds all; one that holds no more than it trains
  fetches that much and no more. A frozen adapter has 32 directions unless `beside` says otherwise, and comes whole.
- **Exact**: the merge is the weighted mean of products, or of their changes, up to the truncation that is reported.
- **Unequal ranks**: whether devices may train different ranks; where not, a device of another rank is refused.
- **Idle**: whether a round in which nobody learns anything changes nothing although ranks are unequal. Where it does,
  directions that few devices hold fade.
- **Secure aggregation**: whether the server needs no more than sums over devices.
- **Gateways** need a method that takes increments.
"""


def page() -> str:
    """The page as Markdown."""
    head = (
        "method", "name in a fleet's file", "merges", "trained", "sent", "up", "down", "exact", "unequal ranks", "idle",
        "state at the server", "secure aggregation", "gateways", "source",
    )  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line(_cells(name, row)) for name, row in METHODS.items()]
    return HEAD + "\n".join(lines) + "\n" + TAIL


def traffic(method: Aggregator) -> tuple[float, float]:
    """Numbers that a device sends and fetches in a round of the reference fleet, the mean of a period."""
    held = (method.server_rank(RANK) if method.hold_more else RANK) + method.beside
    up = [numbers_in(_sizes(method, RANK), method.asks(number).sent) for number in range(1, PERIOD + 1)]
    down = [numbers_in(_sizes(method, held), _fetched(method, number)) for number in range(1, PERIOD + 1)]
    return sum(up) / PERIOD, sum(down) / PERIOD


def _fetched(method: Aggregator, number: int) -> Factors:
    """What the version that a round made has anew."""
    return method.asks(number).sent if method.apart else "ab"


def _sizes(method: Aggregator, rank: int) -> Mapping[str, tuple[int, int, int]]:
    shapes = dict.fromkeys(REFERENCE, (RANK, RANK)) if method.core else REFERENCE
    return {name: (*shape, min(rank, *shape)) for name, shape in shapes.items()}


def _cells(name: str, row: Row) -> list[str]:
    method, plain = row.build(), traffic(METHODS["fedit"].build())
    up, down = (mine / whole for mine, whole in zip(traffic(method), plain, strict=True))
    asks = [method.asks(number) for number in range(1, PERIOD + 1)]
    return [
        row.title,
        f"`{name}`",
        row.merges,
        _in_turns([_factors(each.trained) for each in asks]),
        _in_turns([_factors(each.sent) for each in asks]),
        f"{up:.2g}" if up < 0.1 else f"{up:.2f}",
        f"{down:.2g}" if down < 0.1 else f"{down:.2f}",
        "yes" if method.exact else f"no: {row.bias}",
        _yes(said=not method.equal_ranks),
        "n/a" if method.equal_ranks else _yes(said=row.idle),
        row.state,
        _yes(said=row.secure),
        _yes(said=method.increments),
        row.source,
    ]


def _factors(found: Factors) -> str:
    return {"ab": "`a`, `b`", "a": "`a`", "b": "`b`"}[found]


def _in_turns(each: list[str]) -> str:
    return each[0] if len(set(each)) == 1 else " / ".join(each) + " in turns"


def _yes(*, said: bool) -> str:
    return "yes" if said else "no"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(page())
