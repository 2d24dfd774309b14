"""What a device's trackers are told: each step, each evaluation, and how well the personal adapter answers.

Nothing here may end a training: a tracker that fails is said once and dropped, and answers that cannot be judged are
said and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edge_runtime.errors import EdgeRuntimeError, first_line
from edge_runtime.train import generate, metrics, resume, trackers
from edge_runtime.train.data import Example
from edge_runtime.train.exhaustion import bearing
from profiles.plan import Plan


@dataclass(frozen=True)
class Reporting:
    """What the owner of a device wants to be told.

    Attributes:
        report_to: names as `trackers.open_tracker` takes them.
        folder: for what trackers write.
        project: what the run belongs to.
        config: settings to record with it.
        task_metrics: names in metrics.METRICS that the personal adapter's answers are judged by.
        task_examples: held-out examples that are answered for it, at most.

    Raises:
        ConfigError: a name that is no tracker or no metric; lists those there are.
    """

    report_to: tuple[str, ...] = (trackers.NONE,)
    folder: Path = Path("runs")
    project: str = "edge-runtime"
    config: Mapping[str, object] = field(default_factory=dict)
    task_metrics: tuple[str, ...] = ()
    task_examples: int = 8

    def __post_init__(self) -> None:
        trackers.names_of(self.report_to)
        for name in self.task_metrics:
            metrics.get(name)


SILENT = Reporting()


@dataclass(frozen=True, eq=False)
class Subject:
    """A model whose answers are judged.

    Attributes:
        model: a causal language model of transformers, adapted or not.
        tokenizer: of the base.
        held_out: examples with reference answers.
        plan: answers take no more prompts side by side, and no longer ones, than training takes examples.
    """

    model: Any
    tokenizer: Any
    held_out: Sequence[Example]
    plan: Plan


class Reports:
    """The open trackers of one device.

    Steps are counted through the rounds, so that all of them are one curve: step s of round r is
    (r - 1) · max_steps + s, and never below what was logged before. Steps that a killed round repeats are logged again.
    Names are those of Hugging Face's Trainer: `train/…` for steps, `eval/…` for the global adapter as received,
    `personal/…` for what this device made of it.

    Args:
        reporting: what is wanted.
        say: told a sentence for people.

    Raises:
        MissingExtraError: the library of a tracker is not installed.
        DataError: the folder cannot be written.
    """

    def __init__(self, reporting: Reporting, say: Callable[[str], None]) -> None:
        self._reporting, self._say = reporting, say
        self._open: dict[str, trackers.Tracker] = {}
        self._round, self._before_round, self._step = 0, 0, 0
        self._as_received = True
        for name in trackers.names_of(reporting.report_to):
            self._start(name)

    def received(self) -> None:
        """A global adapter is in the model; the next evaluation is of it, and those after it are personal."""
        self._as_received = True

    def stepped(self, at: resume.StepReport, round_number: int) -> None:
        """One optimiser step is complete."""
        if round_number != self._round:
            self._round, self._before_round = round_number, max(self._step, (round_number - 1) * at.steps)
        self._step, self._as_received = self._before_round + at.step, False
        self._log(
            {
                "train/loss": at.loss,
                "train/learning_rate": at.learning_rate,
                "train/grad_norm": at.gradient_norm,
                "train/tokens": at.tokens,
                "train/round": round_number,
            }
        )

    def evaluated(self, loss: float, subject: Callable[[], Subject]) -> None:
        """An evaluation is complete.

        Args:
            loss: mean over the held-out completion tokens, in nats.
            subject: what was evaluated; asked only where its answers are to be judged.
        """
        about, self._as_received = "eval" if self._as_received else "personal", False
        found = {"loss": loss, "perplexity": metrics.perplexity(loss)}
        if about == "personal" and self._reporting.task_metrics:
            found |= self._judged(subject())
        self._log({f"{about}/{name}": value for name, value in found.items()})

    def close(self) -> None:
        """Let each tracker finish; nothing is logged afterwards."""
        while self._open:
            name, tracker = self._open.popitem()
            self._attempt(name, tracker.close)

    def _start(self, name: str) -> None:
        asked = self._reporting
        try:
            self._open[name] = trackers.open_tracker(name, asked.project, asked.config, asked.folder)
        except EdgeRuntimeError:  # the owner can mend it; no other tracker stays open for it
            self.close()
            raise
        except Exception as error:  # noqa: BLE001 - as in `_attempt`
            self._drop(name, error)

    def _log(self, values: trackers.Values) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, partial(tracker.log, values, self._step))

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - of a foreign library, about a network or a disk: it may be anything
            self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        reason = first_line(error)
        self._say(f"the tracker '{name}' failed and is told no more: {reason[:300]}")

    def _judged(self, subject: Subject) -> dict[str, float]:
        """Task metrics by name; none where the answers cannot be made."""
        answered = [example for example in subject.held_out if example.messages][: self._reporting.task_examples]
        how = generate.Decoding(batch_size=subject.plan.micro_batch, max_prompt_tokens=subject.plan.max_length)
        try:
            with bearing("answering held-out prompts"):
                found = generate.task_metrics(
                    subject.model, subject.tokenizer, answered, self._reporting.task_metrics, how
                )
        except EdgeRuntimeError as error:
            self._say(f"task metrics are left out: {error}")
            return {}
        in_words = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        self._say(f"{len(answered)} held-out examples answered: {in_words}")
        return found
