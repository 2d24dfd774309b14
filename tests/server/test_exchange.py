"""A family without a defined exchange under what the fleet's file says is refused at the start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from edge_runtime import config
from edge_runtime.config import Config
from edge_runtime.errors import ConfigError
from edge_runtime.lora import dense
from profiles import families
from server import aggregators, exchange

OTHERS = sorted(set(families.FAMILIES) - {"lora"})


def file_of(name: str, *overrides: str) -> Config:
    targets = f"adapter.target_modules={list(families.family(name).examples)}"
    return config.load(None, [f"adapter.family={name}", targets, *overrides])


def test_the_tables_of_names_agree() -> None:
    assert set(get_args(config.Adapter.model_fields["family"].annotation)) == set(families.FAMILIES)
    assert families.MARK == dense.MARK
    assert set(exchange.DENSE_METHODS) <= set(aggregators.METHODS)


def test_the_table_in_the_docs_has_every_family_with_its_formats() -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(rows) == set(families.FAMILIES)
    for name, row in rows.items():
        assert ("PEFT" in row) == ("peft" in families.family(name).exports)
        assert ", ".join(families.family(name).examples) in row


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
@pytest.mark.parametrize("method", exchange.DENSE_METHODS)
def test_what_has_a_meaning_is_let_through(name: str, method: str) -> None:
    exchange.check(file_of(name, f"aggregator.method={method}"))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("overrides", "works"),
    [
        (["aggregator.method=another"], "increment"),
        (["aggregator.robust=krum"], "no robust rule"),
        (["aggregator.optimizer=adam"], "no server optimizer"),
        (["adapter.slice=fresh"], "top, rotating"),
        (["adapter.slice=personal"], "top, rotating"),
        (["adapter.allocation=spectrum"], "uniform"),
        (["training.proximal=0.1"], "proximal = 0"),
        (["personal.proximal=0.1"], "proximal = 0"),
        (["personal.way=beside"], "finetune"),
        (["training.correction=0.1"], "correction = 0"),
        (["training.carry_moments=true"], "carry_moments = false"),
    ],
)
def test_what_has_none_is_refused_with_what_would_work(name: str, overrides: Sequence[str], works: str) -> None:
    with pytest.raises(ConfigError, match=works) as told:
        exchange.check(file_of(name, *overrides))
    assert f"family '{name}'" in str(told.value)


@pytest.mark.parametrize("name", OTHERS)
def test_targets_of_the_wrong_kind_are_refused_with_some_of_the_right_one(name: str) -> None:
    wrong = "input_layernorm" if families.family(name).modules == "linear" else "q_proj"
    for targets in (f'["{wrong}"]', '["input_layernorm", "q_proj"]'):
        with pytest.raises(ConfigError, match=families.family(name).examples[0]):
            exchange.check(file_of(name, f"adapter.target_modules={targets}"))


def test_a_different_rate_of_b_needs_a_b() -> None:
    exchange.check(file_of("dora", "training.lora_plus_ratio=4"))
    with pytest.raises(ConfigError, match="lora_plus_ratio = 1"):
        exchange.check(file_of("ia3", "training.lora_plus_ratio=4"))


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_no_row_is_in_the_global_adapter_that_nobody_may_train(name: str) -> None:
    method = aggregators.build("increment")
    expected = 32 if name in exchange.PAIRS else 16
    assert exchange.rank_of(file_of(name), method) == expected
    assert exchange.rank_of(file_of(name, "aggregator.rank=20"), method) == 20
