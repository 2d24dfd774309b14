"""The page of methods says what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import aggregators
from server.aggregators.page import RANK, REFERENCE, page, traffic

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_the_one_that_the_table_makes() -> None:
    """If not, make it: python -m server.aggregators.page > docs/methods.md ."""
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page()


def test_every_method_is_exact_or_says_how_it_is_not() -> None:
    for name, row in aggregators.METHODS.items():
        assert aggregators.build(name).exact == (not row.bias), name


def test_numbers_are_counted_from_what_rounds_ask_for() -> None:
    whole = RANK * sum(d_out + d_in for d_out, d_in in REFERENCE.values())
    of_a = RANK * sum(d_in for _, d_in in REFERENCE.values())
    assert traffic(aggregators.build("fedit")) == (whole, whole)
    assert traffic(aggregators.build("ffa_lora")) == (whole - of_a, whole - of_a)
    assert traffic(aggregators.build("fedsa_lora")) == (of_a, of_a)
    assert traffic(aggregators.build("rolora")) == pytest.approx((whole / 2, whole / 2))
    assert traffic(aggregators.build("increment")) == (whole, 2 * whole)
