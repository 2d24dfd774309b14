"""Whether a fleet's method has a meaning for its family of adapters, and how large the global adapter then is. Pure.

Dense tensors are merged entry by entry under the methods named here (see `aggregators.dense`). Whatever goes by
directions of a product or by single factors has no meaning for a row of a tensor, so it is refused at the start.
"""

from __future__ import annotations

from edge_runtime.config import Config
from edge_runtime.errors import ConfigError
from profiles.families import EMBEDDING, family
from server.aggregators.method import Aggregator

DENSE_METHODS = ("increment", "svd", "zero_pad")
"""Methods under which dense tensors are merged entry by entry."""

DENSE_SLICES = ("top", "rotating")
"""Slice policies that choose rows; the others look for directions of a spectrum, or append some."""

PAIRS = ("lora", "dora")
"""Families with low-rank pairs; in the first there is nothing else."""


def rank_of(config: Config, method: Aggregator) -> int:
    """The rank of the global adapter of a fleet that `check` does not refuse.

    Rows of a tensor have no order by weight, so rows that no device may train would never be learnt: where there are no
    pairs, the global adapter has as many as the largest device may train, unless the file says otherwise.

    Raises:
        ConfigError: as `check`.
    """
    check(config)
    most = config.adapter.max_rank
    return config.aggregator.rank or (method.server_rank(most) if config.adapter.family in PAIRS else most)


def check(config: Config) -> None:
    """Refuse what has no meaning together.

    Raises:
        ConfigError: says what would work.
    """
    chosen, adapter, training = family(config.adapter.family), config.adapter, config.training
    name = adapter.family
    if name == "lora":
        return
    extra = config.aggregator.model_extra or {}
    for wrong, key, works in (
        (config.aggregator.method not in DENSE_METHODS, f"[aggregator] method '{config.aggregator.method}'",
         f"one of: {', '.join(DENSE_METHODS)}; or family = 'lora'"),
        (bool(extra.get("robust")), "[aggregator] robust", "no robust rule; or family = 'lora'"),
        (bool(extra.get("optimizer")), "[aggregator] optimizer", "no server optimizer; or family = 'lora'"),
        (adapter.slice not in DENSE_SLICES, f"[adapter] slice '{adapter.slice}'", f"one of: {', '.join(DENSE_SLICES)}"),
        (adapter.allocation != "uniform", f"[adapter] allocation '{adapter.allocation}'", "allocation = 'uniform'"),
        (config.personal.way == "beside", "[personal] way 'beside'", "way = 'finetune'"),
        (config.personal.proximal > 0, "[personal] proximal", "proximal = 0"),
        (training.proximal > 0, "[training] proximal", "proximal = 0"),
        (training.correction > 0, "[training] correction", "correction = 0"),
        (training.carry_moments, "[training] carry_moments", "carry_moments = false"),
        (training.lora_plus_ratio != 1 and name not in PAIRS, "[training] lora_plus_ratio", "lora_plus_ratio = 1"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(f"[adapter] family '{name}' has no defined exchange with {key}; expected {works}")
    kinds = {_kind(target) for target in adapter.target_modules}
    if kinds != {chosen.modules} or (name == "prefix" and set(adapter.target_modules) != set(chosen.examples)):
        raise ConfigError(
            f"[adapter] family '{name}' does not go with target_modules = {list(adapter.target_modules)}; "
            f"expected such as {list(chosen.examples)}"
        )


def _kind(target: str) -> str:
    return "embedding" if target == EMBEDDING else "norm" if target.endswith("norm") else "linear"
