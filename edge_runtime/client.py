"""The shell around `agent`: transport, durable state and trainer on one side, the pure protocol on the other.

The trainer is a seam (`edge_runtime.trainer`); `edge_runtime.train.local` is the real one. The shell needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_runtime import agent, local_round, room, ways
from edge_runtime.conversation import Conversation
from edge_runtime.errors import (
    DeviceMemoryError,
    EdgeRuntimeError,
    FingerprintMismatchError,
    RejectedError,
)
from edge_runtime.identity import Identity, hello_of, will
from edge_runtime.keeper import Keeper, Watch
from edge_runtime.lora.adapter import Adapter
from edge_runtime.personalising import Job, Personalising
from edge_runtime.state import DeviceState
from edge_runtime.trainer import AdapterSpec, Delivered, Introduction, StepReport, Trainer, Training
from edge_runtime.wire import blobs, codec
from edge_runtime.wire.messages import Directive, Hello, Losses, Offer, Rejected, Report
from edge_runtime.wire.transport import Delivery, Transport

__all__ = ["FINISHED", "Client", "Identity", "refused", "will"]

FINISHED = "finished"
"""The fact that the last directive leaves, for the card of the personal adapter."""


@dataclass
class Progress:
    """What the reports say between two events."""

    losses: Losses = field(default_factory=Losses)
    round: int = 0


class Client:
    """One device of a fleet.

    Args:
        identity: its fleet and name.
        transport: connected, with `will(fleet, name, guard, instance)` as its last will.
        state: opened.
        trainer: plans and trains.
        deliver: exports the personal adapter of the live model and verifies it; called once, at the end.
        say: told a sentence for people whenever something happens.
        watch: where it looks while it works, clock and sensors among it.
        own: what this device's file says of its personal adapter.
    """

    def __init__(  # noqa: PLR0913 - one argument for each seam of a device
        self,
        identity: Identity,
        *,
        transport: Transport,
        state: DeviceState,
        trainer: Trainer,
        deliver: Callable[[], Delivered],
        say: Callable[[str], None],
        watch: Watch | None = None,
        own: ways.Own | None = None,
    ) -> None:
        self._identity, self._name = identity, identity.client
        self._transport, self._disk, self._trainer = transport, state, trainer
        watch = watch or Watch()
        self._deliver, self._say = deliver, say
        self._conversation = Conversation(
            identity, transport=transport, state=state, clock=watch.clock, say=say, perform=self._perform
        )
        self._intro: Introduction | None = None
        self._progress = Progress()
        self._personal = Personalising(trainer, state, own or ways.Own(), say)
        self._ended: Directive | None = None
        self._keeper = Keeper(state, watch, say=say)
        self._gate = self._keeper.gate(self._pauses)
        state.on_full = room.waiting(watch, say, self._pauses)
        self._stepped_down = self._keeper.woken()
        self._untold = ""

    @property
    def left(self) -> bool:
        """Whether its fleet life is over: the personal adapter is made and reported."""
        return self._conversation.state.left

    def run(self, stop: Callable[[], bool], *, poll: float = 0.5) -> None:
        """Take part until the fleet has finished, or `stop()` says so.

        Raises:
            FingerprintMismatchError: the fleet trains another base model.
            RejectedError: the server refused this device for another reason.
            EdgeRuntimeError: planning, training or export failed; the server was told.
        """
        self._conversation.begin()
        try:
            while not stop() and not self.left:
                delivery = self._transport.receive(poll)
                if delivery is not None:
                    self.handle(delivery)
                self._conversation.go_on()
        finally:
            self._conversation.end()

    def handle(self, delivery: Delivery) -> None:
        """Take one delivery. Nonsense is said and dropped; the device goes on."""
        self._conversation.handle(delivery)

    def _pauses(self, reason: str) -> None:
        self._report("paused", detail=reason[:1024])

    def _perform(self, action: agent.Action) -> None:
        match action:
            case agent.Say(Hello()) if self._untold:  # nobody listens to a device that has not said who it is
                told, self._untold = self._untold, ""
                self._report("planned", detail=told)
            case agent.MakePlan(spec, training):
                self._working("planning", lambda: self._introduce(spec, training))
            case agent.Fetch(directive):
                self._fetch(directive)
            case agent.Train(directive):
                self._working(f"training round {directive.round}", lambda: self._train(directive))
            case agent.Settle(number) if self._ended is not None and self._ended.round == number:
                directive, self._ended = self._ended, None
                if self._personal.due(directive) and self._is_here(directive):
                    self._working("going on with its personal adapter", lambda: self._go_on(directive))
            case agent.Adopt(run):
                self._disk.adopt(run)
            case agent.Finish(directive):
                self._working("making its personal adapter", lambda: self._finish(directive))
            case agent.Wait(refusal):
                self._say(f"the server cannot take this now and is asked again: {refusal.reason}")
            case agent.Leave(refusal):
                if refusal is not None:
                    raise refused(refusal)

    def _working(self, doing: str, work: Callable[[], agent.Event]) -> None:
        """Do a piece of work. If memory does not suffice, plan a smaller one; if it fails, tell the server and end."""
        self._keeper.begin(doing)
        try:
            event = self._stepping_down(work)
        except EdgeRuntimeError as error:
            self._keeper.end()
            self._report("failed", detail=str(error)[:1024])
            self._transport.flush(5.0)
            raise
        except KeyboardInterrupt:
            self._keeper.end()
            raise
        self._keeper.end()
        self._conversation.apply(event)

    def _stepping_down(self, work: Callable[[], agent.Event]) -> agent.Event:
        try:
            return work()
        except DeviceMemoryError as error:
            self._stepped_down = self._keeper.exhausted(error)
            return agent.Exhausted()

    def _introduce(self, spec: AdapterSpec, training: Training) -> agent.Event:
        self._personal.check(self._conversation.state.directive)
        intro = self._trainer.introduce(spec, training, self._keeper.ceiling, self._keeper.planned)
        self._intro = intro
        self._say(f"plan: {intro.plan}")
        # What made the plan smaller is said once, with the plan that it led to.
        why, self._stepped_down = self._stepped_down, ""
        self._untold = "; ".join(filter(None, (intro.plan, why)))[:1024]
        return agent.Planned(hello_of(self._name, intro))

    def _fetch(self, directive: Directive) -> None:
        self._progress.round = directive.round
        self._report("fetching")
        refs = {band.blob.sha256: band.blob for band in local_round.bands_of(directive, self._planned)}
        self._conversation.fetch(directive.version, refs)

    @property
    def _planned(self) -> Introduction:
        if self._intro is None:
            raise RejectedError("a directive was obeyed before there was a plan; report this as a bug")
        return self._intro

    def _is_here(self, directive: Directive) -> bool:
        """Whether its version is still whole on the disk.

        A fetch for the end of the rounds may have taken its place: that waits for no answer to the last update.
        """
        bands = local_round.bands_of(directive, self._planned)
        return all(self._disk.band(band.blob.sha256) is not None for band in bands)

    def _received(self, directive: Directive) -> Adapter:
        """The global adapter of a version, as far as this device holds it."""
        bands = local_round.bands_of(directive, self._planned)
        payloads = [(band, self._disk.band(band.blob.sha256)) for band in bands]
        decoded = ((band, codec.decode(payload)) for band, payload in payloads if payload is not None)
        return local_round.received(directive, self._planned, decoded, self._disk)

    def _evaluate_base(self) -> None:
        """The base's own held-out loss, once in a fleet's life: the global adapter of version 0 is a zero change."""
        known = self._disk.fact("loss_base")
        if known is None:
            self._report("evaluating")
            known = self._trainer.evaluate()
            self._disk.put_fact("loss_base", known)
        self._progress.losses = self._progress.losses.model_copy(update={"base": known})

    def _train(self, directive: Directive) -> agent.Event:
        self._wait_for_go()
        received = self._received(directive)
        self._trainer.receive(received)
        if directive.version == 0:
            self._evaluate_base()
        else:
            self._report("evaluating")
            self._evaluate(directive)
        made = local_round.contribute(
            directive, self._planned, received, self._trainer, self._disk,
            round_bytes=self._identity.round_bytes, on_step=self._step("training"), gate=self._gate,
        )  # fmt: skip
        result = made.result
        offer = Offer(
            client=self._name, run=directive.run, round=directive.round, version=directive.version,
            blob=blobs.describe(made.payload, self._conversation.chunk_bytes), examples=result.examples,
            loss_first=result.loss_first, loss_last=result.loss_last,
        )  # fmt: skip
        self._disk.put_outbox(offer, made.payload, made.residual, made.private, made.facts)
        moved = f"loss {result.loss_first:.3f} → {result.loss_last:.3f}"
        self._say(f"round {directive.round}: {moved}, update of {len(made.payload)} bytes, {made.how}")
        self._report("offering")
        self._ended = directive
        return agent.Trained(offer, directive.run)

    def _finish(self, directive: Directive) -> agent.Event:
        self._wait_for_go()
        received = self._received(directive)
        self._trainer.receive(received)
        self._report("evaluating")
        self._evaluate(directive)
        job = Job(directive, self._planned, received, directive.training.max_steps, at_end=True)
        made = self._personal.make(job, self._step("personalising"), self._gate)
        self._losses(**made.losses)
        self._report("exporting")
        self._disk.put_fact(FINISHED, finished(directive, self._progress.losses))
        delivered = self._deliver()
        self._personal.keep(made, {"merged": self._progress.losses.merged})
        self._say(
            f"{made.delivered} adapter in {delivered.folder}; max |Δlogit| {delivered.max_logit_diff:.1e} when reloaded"
        )
        left = {"export_max_logit_diff": delivered.max_logit_diff, "delivered": made.delivered}
        self._report("done", **left, way=made.way, detail=made.told[:1024])
        return agent.Finished()

    def _go_on(self, directive: Directive) -> agent.Event:
        """Personal training between two rounds, from the version of the one that ended."""
        self._wait_for_go()
        received = self._received(directive)
        self._trainer.receive(received)
        job = Job(directive, self._planned, received, directive.personal.steps, at_end=False)
        self._personal.keep(self._personal.make(job, self._step("personalising"), self._gate), {})
        return agent.Repeat()  # nothing was asked, so nothing is answered

    def _wait_for_go(self) -> None:
        """An evaluation cannot be interrupted, so a device that must pause does so before it."""
        if self._gate():
            raise KeyboardInterrupt

    def _step(self, state: str) -> Callable[[StepReport], None]:
        return lambda at: self._report(state, step=at.step, steps=at.steps, loss=at.loss)

    def _evaluate(self, directive: Directive) -> None:
        merged = self._trainer.evaluate()
        self._losses(base=self._disk.fact("loss_base"), merged=merged, version=directive.version)

    def _losses(self, **found: float | None) -> None:
        self._progress.losses = self._progress.losses.model_copy(update=found)

    def _report(self, state: Any, **facts: Any) -> None:
        """Say what this device is doing; progress for the server, a picture for people."""
        report = Report(
            client=self._name,
            state=state,
            round=self._progress.round,
            held_out=self._progress.losses,
            bytes_up=self._transport.bytes_sent,
            bytes_down=self._transport.bytes_received,
            peak_bytes=self._trainer.peak_bytes,
            **facts,
        )
        self._conversation.publish(report)


def finished(directive: Directive, losses: Losses) -> dict[str, Any]:
    """What is known of the fleet's life at its end; JSON-able, in the words of a model card."""
    found = {"base": losses.base, "global": losses.merged, "personal": losses.personal}
    return {
        "run": directive.run,
        "version": directive.version,
        "rounds": directive.round,
        "losses": {name: loss for name, loss in found.items() if loss is not None},
    }


def refused(refusal: Rejected) -> EdgeRuntimeError:
    """The error that a refusal for good is."""
    kinds: Mapping[str, type[EdgeRuntimeError]] = {"fingerprint": FingerprintMismatchError}
    return kinds.get(refusal.code, RejectedError)(f"the server refused this device: {refusal.reason}")
