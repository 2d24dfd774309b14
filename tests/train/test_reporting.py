"""What trackers are told of a device's training, and that none of them can end it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import ConfigError, MissingExtraError
from edge_runtime.trainer import AdapterSpec, LocalResult, Training
from tests.story.fleet import TARGETS
from tests.train.tiny import random_adapter

pytest.importorskip("torch")

from edge_runtime.train import reporting, trackers
from edge_runtime.train.local import LocalSettings, LocalTrainer
from edge_runtime.train.reporting import Reporting, Reports
from edge_runtime.train.resume import StepReport
from edge_runtime.train.rows import Example
from profiles.terms import Overrides
from tests.train.devices import settings_in

pytestmark = pytest.mark.torch

SPEC = AdapterSpec(
    family="lora", target_modules=TARGETS, scaling=2.0, max_rank=8, max_held=16, hold_more=True, max_length=32
)
TRAINING = Training(
    max_steps=3, learning_rate=5e-3, batch_size=2, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=7
)
SMALL = Overrides(rank=2, held=2, layers_trained=2, precision="nf4", micro_batch=1, threads=1)


@pytest.fixture(scope="module")
def device(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalSettings:
    return settings_in(tmp_path_factory.mktemp("device"), tiny_base, SMALL)


def lived(device: LocalSettings, wanted: Reporting, said: list[str], rounds: int = 2) -> LocalResult:
    """Some rounds and the personal adapter after them; the result of the last."""
    trainer = LocalTrainer(replace(device, reporting=wanted), say=said.append)
    trainer.introduce(SPEC, TRAINING, None, lambda _: None)
    results = []
    for number in range(1, rounds + 1):
        trainer.receive(random_adapter(trainer.ready.slot, number, size=0.05))
        trainer.evaluate()
        results.append(trainer.train(TRAINING, number, lambda _: None, lambda: False))
    trainer.evaluate()
    trainer.reports.close()
    return results[-1]


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / trackers.RECORDS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def broken(name: str) -> trackers.Tracker:
    """A tracker whose service has gone."""

    def log(_values: trackers.Values, _step: int) -> None:
        raise ConnectionError("the service has gone\nand more")

    return trackers.Tracker((name,), log, lambda: None)


def test_every_step_and_every_evaluation_is_on_record(device: LocalSettings, tmp_path: Path) -> None:
    wanted = Reporting(("jsonl",), tmp_path, "greenhouses", {"device": {"rank": 2}}, ("rouge_l", "exact_match"), 2)
    said: list[str] = []
    result = lived(device, wanted, said)
    head, *logged = records(tmp_path)
    steps = [record for record in logged if "train/loss" in record]
    global_losses = [record for record in logged if "eval/loss" in record]
    (personal,) = (record for record in logged if "personal/loss" in record)

    assert head == {"project": "greenhouses", "config": {"device.rank": 2}}
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["train/round"] for record in steps] == [1, 1, 1, 2, 2, 2]
    assert steps[3]["train/loss"] == pytest.approx(result.loss_first)
    assert steps[3]["train/learning_rate"] == TRAINING.learning_rate
    assert all(record["train/grad_norm"] > 0 and record["train/tokens"] > 0 for record in steps)
    assert [record["step"] for record in global_losses] == [0, 3]
    assert all(record["eval/perplexity"] == pytest.approx(math.exp(record["eval/loss"])) for record in global_losses)
    assert personal["step"] == 6
    assert all(0 <= personal[f"personal/{name}"] <= 1 for name in ("rouge_l", "exact_match"))
    assert len(logged) == len(steps) + 3
    assert any("2 held-out examples answered: rouge_l" in line for line in said)


def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(
    device: LocalSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(name: str, *args: Any) -> trackers.Tracker:
        return broken(name) if name == "trackio" else real(name, *args)

    real = trackers.open_tracker
    monkeypatch.setattr(trackers, "open_tracker", opened)
    said: list[str] = []
    result = lived(device, Reporting(("trackio", "jsonl"), tmp_path), said, rounds=1)

    assert math.isfinite(result.loss_last)
    assert [line for line in said if "trackio" in line] == [
        "the tracker 'trackio' failed and is told no more: the service has gone"
    ]
    assert sum("train/loss" in record for record in records(tmp_path)) == TRAINING.max_steps


def test_what_trackers_are_told_changes_nothing_of_the_training(device: LocalSettings, tmp_path: Path) -> None:
    told = lived(device, Reporting(("jsonl",), tmp_path, task_metrics=("label_accuracy",)), [], rounds=1)
    untold = lived(device, reporting.SILENT, [], rounds=1)

    assert told.change.digest() == untold.change.digest()


def test_a_tracker_that_cannot_be_opened_is_said_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_service(*_: object) -> trackers.Tracker:
        raise TimeoutError

    monkeypatch.setattr(trackers, "open_tracker", no_service)
    said: list[str] = []
    Reports(Reporting(("wandb",), tmp_path), said.append).close()

    assert said == ["the tracker 'wandb' failed and is told no more: TimeoutError"]


def test_a_tracker_whose_library_is_missing_is_an_error_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda _: False)

    with pytest.raises(MissingExtraError, match="pip install trackio"):
        Reports(Reporting(("jsonl", "trackio"), tmp_path), lambda _: None)


@pytest.mark.parametrize(
    ("wanted", "known"),
    [
        ({"report_to": ("wandd",)}, r"wandd.*jsonl.*tensorboard.*wandb"),
        ({"task_metrics": ("rouge",)}, r"rouge.*exact_match.*label_accuracy.*rouge_l"),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(wanted: dict[str, tuple[str, ...]], known: str) -> None:
    with pytest.raises(ConfigError, match=known):
        Reporting(**wanted)  # type: ignore[arg-type]  # one of two fields, both tuples of names


def test_steps_go_on_where_the_round_before_ended_even_when_rounds_have_unequal_lengths(tmp_path: Path) -> None:
    """Personal rounds are shorter, and a step that a round repeats keeps its number."""
    reports = Reports(Reporting(("jsonl",), tmp_path), lambda _: None)
    for number, steps, done in ((3, 10, (9, 10, 10)), (4, 2, (1, 2))):
        for step in done:
            reports.stepped(StepReport(step, steps, 1.0, 5, 1e-3, 0.5), number)
    reports.close()

    assert [record["step"] for record in records(tmp_path)[1:]] == [29, 30, 30, 31, 32]


@pytest.mark.parametrize("held_out", [[], [Example((), "a text without turns")]])
def test_answers_that_cannot_be_judged_are_said_and_left_out(
    held_out: Sequence[Example], device: LocalSettings, tmp_path: Path
) -> None:
    trainer = LocalTrainer(device, say=lambda _: None)
    trainer.introduce(SPEC, TRAINING, None, lambda _: None)
    ready, said = trainer.ready, list[str]()
    reports = Reports(Reporting(("jsonl",), tmp_path, task_metrics=("rouge_l",)), said.append)
    for _ in range(2):
        reports.evaluated(2.0, lambda: reporting.Subject(ready.live.model, ready.base.tokenizer, held_out, ready.plan))

    assert [line.partition(":")[0] for line in said] == ["task metrics are left out"]
    assert records(tmp_path)[-1].keys() == {"step", "personal/loss", "personal/perplexity"}
