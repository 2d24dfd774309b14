"""How updates of unequal rank become one global adapter: ONE FILE = ONE METHOD, and this literal table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.errors import ConfigError, unknown_name
from server.aggregators.fed_sb import fed_sb
from server.aggregators.fedex_lora import fedex_lora
from server.aggregators.fedit import fedit
from server.aggregators.fedsa_lora import fedsa_lora
from server.aggregators.ffa_lora import ffa_lora
from server.aggregators.flora import flora
from server.aggregators.florist import florist
from server.aggregators.glora import glora
from server.aggregators.hetlora import hetlora
from server.aggregators.increment import increment
from server.aggregators.layers import Engine, local
from server.aggregators.lora_fair import lora_fair
from server.aggregators.method import Aggregator
from server.aggregators.optimizers import OPTIMIZERS, optimised
from server.aggregators.pf2lora import pf2lora
from server.aggregators.raflora import raflora
from server.aggregators.rbla import rbla
from server.aggregators.robust import ROBUST
from server.aggregators.robust.guarding import guarded
from server.aggregators.robust.rule import Coordinatewise
from server.aggregators.rolora import rolora
from server.aggregators.row import Row
from server.aggregators.svd import svd
from server.aggregators.zero_pad import zero_pad

COVARIANCE = "lacks the weighted covariance of the factors"

BESIDE = "a frozen adapter, which devices hold too"

METHODS: Mapping[str, Row] = {
    "fed_sb": Row(
        fed_sb, "Fed-SB, LoRA-XS cores", "mean of r x r cores between drawn bases", "",
        "Singhal et al., arXiv 2502.15436; Bałazy et al., arXiv 2405.17604", secure=True,
    ),
    "fedex_lora": Row(
        fedex_lora, "FedEx-LoRA", "mean of both factors; what that lacks goes into a frozen adapter", "",
        "Singhal et al., ACL 2025, arXiv 2410.09432", BESIDE,
    ),
    "fedit": Row(
        fedit, "FedIT", "mean of both factors", COVARIANCE, "Zhang et al., arXiv 2305.05644", secure=True,
    ),
    "fedsa_lora": Row(
        fedsa_lora, "FedSA-LoRA", "mean of `a`; each device keeps its own `b`",
        "has no global product: it depends on the device", "Guo et al., ICLR 2025, arXiv 2410.01463", secure=True,
    ),
    "ffa_lora": Row(
        ffa_lora, "FFA-LoRA", "mean of `b` over one fixed `a`", "", "Sun et al., ICLR 2024, arXiv 2403.12313",
        secure=True,
    ),
    "flora": Row(
        flora, "FLoRA", "sum of what devices learnt, into a frozen adapter; every round begins anew", "",
        "Wang et al., NeurIPS 2024, arXiv 2409.05976", BESIDE,
    ),
    "florist": Row(
        florist, "FLoRIST", "as FLoRA, the leading directions of each round's sum", "drops the least of each change",
        "Ramesh and Dass, MLSys 2026, arXiv 2506.09199", BESIDE,
    ),
    "glora": Row(
        glora, "GLoRA", "mean of products within a consensus subspace", "lacks what lies outside the consensus",
        "Chen et al., arXiv 2605.06733, from its abstract", idle=False,
    ),
    "hetlora": Row(
        hetlora, "HetLoRA", "mean of padded factors by the norms of their products; devices prune ranks",
        f"{COVARIANCE}; dilutes what few devices hold; a large norm buys weight",
        "Cho et al., EMNLP 2024, arXiv 2401.06432", idle=False,
    ),
    "increment": Row(
        increment, "increment (ours)", "sum of what devices changed, in factored form", "",
        "this project; unbiased form of FedHL (Peng et al., 2025)", "tail of the last cut",
    ),
    "lora_fair": Row(
        lora_fair, "LoRA-FAIR", "mean of factors, `b` corrected towards the mean of products",
        "lacks what lies outside the rows of the mean `a`", "Bian et al., ICCV 2025, arXiv 2411.14961",
    ),
    "pf2lora": Row(
        pf2lora, "PF2LoRA, first-order", "mean of both factors; devices have own directions besides", COVARIANCE,
        "Hao et al., arXiv 2503.03920", secure=True,
    ),
    "raflora": Row(
        raflora, "raFLoRA", "truncated SVD of products, each direction averaged over those who have it",
        "is the mean of no client-weighted objective", "Wu et al., arXiv 2602.13486",
    ),
    "rbla": Row(
        rbla, "RBLA", "mean of factors, each direction over those who have it", f"{COVARIANCE}, direction by direction",
        "Chen et al., arXiv 2408.08699", secure=True,
    ),
    "rolora": Row(
        rolora, "RoLoRA", "mean of `b` in odd rounds, of `a` in even ones", "",
        "Chen et al., NeurIPS 2025, arXiv 2502.01755", secure=True,
    ),
    "svd": Row(
        svd, "FlexLoRA", "truncated SVD of the mean of products", "", "Bai et al., NeurIPS 2024, arXiv 2402.11505",
        idle=False,
    ),
    "zero_pad": Row(
        zero_pad, "zero-padding", "mean of factors padded with zeros", f"{COVARIANCE}; dilutes what few devices hold",
        "padding of HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432)", secure=True, idle=False,
    ),
}  # fmt: skip


def build(
    method: str,
    engine: Engine = local,
    /,
    *,
    robust: str | None = None,
    optimizer: str | None = None,
    **parameters: Any,
) -> Aggregator:
    """The method behind a robust rule and under a server optimiser, straight from the `[aggregator]` table.

    Args:
        method: see METHODS.
        engine: merges its layers.
        robust: see ROBUST; None for no rule.
        optimizer: see OPTIMIZERS; None for the method's own steps.
        parameters: of the rule or the optimiser, where it takes one of that name; of the method otherwise.

    Raises:
        ConfigError: no such method, rule or optimiser (lists those there are), a parameter that none of them takes, or
            a bad value.
    """
    builders = {name: row.build for name, row in METHODS.items()}
    parts: list[tuple[str, str, Mapping[str, Callable[..., Any]]]] = []
    if robust is not None:
        parts.append(("robust rule", robust, ROBUST))
    if optimizer is not None:
        parts.append(("server optimizer", optimizer, OPTIMIZERS))
    rest, built = dict(parameters), dict[str, Any]()
    for kind, name, table in (*parts, ("method", method, builders)):
        if name not in table:
            raise ConfigError(unknown_name("aggregation method" if kind == "method" else kind, str(name), table))
        taken = set(rest) if kind == "method" else set(rest) & set(inspect.signature(table[name]).parameters)
        own = {key: rest.pop(key) for key in taken}
        try:
            built[kind] = table[name](*([engine] if kind == "method" else []), **own)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"[aggregator] {kind} '{name}': {error}") from error
    merging: Aggregator = built["method"]
    if problem := _apart(merging, robust, built.get("robust rule"), optimizer):
        raise ConfigError(f"[aggregator] method '{method}' {problem}")
    if robust is not None:
        merging = guarded(merging, robust, built["robust rule"])
    return merging if optimizer is None else optimised(merging, built["server optimizer"])


def _apart(method: Aggregator, robust: str | None, rule: Any, optimizer: str | None) -> str:
    """Why a method whose factors do not travel together cannot be composed with that, or ''."""
    if method.private and robust is not None:
        return f"sees no products of updates, which robust = '{robust}' judges; leave that out, or take fedit"
    if not method.weighs and robust is not None:
        return f"weighs by norms, over which robust = '{robust}' has no say; leave that out, or take zero_pad"
    if method.apart and isinstance(rule, Coordinatewise):
        return f"needs a factor that stays as it is, and robust = '{robust}' makes both anew; take clip or krum with it"
    if method.beside and optimizer is not None:
        return f"has a frozen adapter, of which optimizer = '{optimizer}' knows nothing; take increment with it"
    if method.apart and optimizer is not None:
        return f"needs a factor that stays as it is, and optimizer = '{optimizer}' factorises anew; take fedit with it"
    return ""
