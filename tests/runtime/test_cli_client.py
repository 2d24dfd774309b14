"""What `edge-runtime client` refuses before it loads anything large."""

from __future__ import annotations

import json

import pytest

from edge_runtime.cli.client import NVIDIA
from tests.product import Launcher
from tests.runtime.test_cli import CONFIG_JSON, only_line, without


@pytest.mark.skipif(NVIDIA.exists(), reason="a machine with a card is let through")
def test_a_device_that_is_too_small_hears_so_before_it_imports_torch(product: Launcher) -> None:
    """The imports alone would be more than it may use: a kill without a word."""
    (product.folder / "config.json").write_text(json.dumps(CONFIG_JSON), encoding="utf-8")
    code, _, err = without(
        product.folder, ["torch"], "client", "--data", "good.jsonl", "--base", ".", "--memory-limit", "300M"
    )

    assert code == 10
    assert "MiB are missing" in only_line(err)


@pytest.mark.parametrize(
    ("choice", "words", "expected"),
    [
        ("device.rank=0", "device.rank", 2),
        ("device.precision=3bit", "'nf4', 'int8', 'bf16', 'fp16' or 'fp32'", 2),
        ("device.report_to=jsonl,wandd", "'wandd'; expected one of: aim, all", 2),
        ("device.task_metrics=rouge", "expected one of: exact_match, label_accuracy, rouge_l", 2),
        ("device.report_to=none,jsonl", "drop 'none'", 2),
        ("governor.resume_above_battery=10", "at least pause_below_battery, 30 %; found 10 %", 2),
        ("governor.pause_above_temperature=50", "at most pause_above_temperature, 50 °C; found 80 °C", 2),
    ],
)
def test_choices_of_the_owner_that_cannot_be_are_one_line_at_once(
    product: Launcher, choice: str, words: str, expected: int
) -> None:
    code, _, err = product.run("client", "--data", "good.jsonl", "--set", choice)

    assert code == expected
    assert words in only_line(err)
