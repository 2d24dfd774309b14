"""A device in virtual time: the shell around `edge_runtime.agent` that does in virtual time what `client` does.

The agent decides; this performs. Messages take the time of the device's link, training that of its plan, and what is
computed is `simulation.work`'s, to which the same task is given as a real device would do it. A device that is away
neither works nor talks, and goes on afterwards; one that crashes loses what is not on its disk.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from edge_runtime import agent, local_round
from edge_runtime.conversation import REPEAT_SECONDS
from edge_runtime.identity import Identity, hello_of, offline, online
from edge_runtime.wire import blobs, topics
from edge_runtime.wire.messages import Directive, Losses, Message, Offer, Report, dump
from server.resuming import QUIET_SECONDS
from simulation import partition
from simulation.battery import Charge, Outcome, rested
from simulation.clock import Event
from simulation.computing import Work, foreseen, on_disk, work_of
from simulation.fleet import Planned
from simulation.hauling import Hauling
from simulation.links import BITS
from simulation.memory import Disk
from simulation.stored import whole
from simulation.surroundings import Accounts, Person, Surroundings
from simulation.traces import FOREVER, HOUR
from simulation.work import Done, Task


class Device:
    """One device.

    Args:
        person: who it is.
        around: what all devices share.
    """

    def __init__(self, person: Person, around: Surroundings) -> None:
        self.person, self._around, self._clock = person, around, around.clock
        self.name, self._group = person.name, person.group
        self.disk, self.accounts = Disk(), Accounts(person.name, around)
        self._charge = person.charge or Charge(100.0)
        self._since_away: float | None = 0.0
        self._departure: Event | None = None
        self._heard_until = self._said_until = 0.0
        self._life = 0
        self._boot()

    def _boot(self) -> None:
        """What a start of its process makes of what the disk remembers."""
        outbox = self.disk.outbox
        self.agent = agent.start(self.name, self.disk.run, outbox[0] if outbox else None, self.disk.settled)
        self.planned: Planned | None = None
        self._work: Work | None = None
        self._hauling = Hauling(
            self.person, self._around, self.disk, self.accounts, lambda version: self.apply(agent.Fetched(version))
        )
        self._timer: Event | None = None
        self._alive: Event | None = None

    # ── here and away ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def here(self) -> bool:
        """Whether it is there."""
        return self._since_away is None

    def begin(self) -> None:
        """Be there as soon as its trace says so."""
        self._return_at(0.0)

    def _return_at(self, when: float) -> None:
        trace = self.person.here
        if not trace.is_on(when):
            when = trace.next_change(when)
        if when < FOREVER:
            self._clock.at(when, self._arrive)

    def _arrive(self) -> None:
        now, around = self._clock.now, self._around
        if self._since_away is not None:
            self.accounts.span("away", self._since_away, now, self._round)
        self._since_away = None
        leaves = self.person.here.next_change(now)
        self._departure = self._clock.at(leaves, partial(self._depart, leaves)) if leaves < FOREVER else None
        if self.agent.hello is not None:
            around.host.say(*online(Identity(around.config.fleet.name, self.name), 1), retain=True)
        if around.newest is not None:
            self.hear_later(*around.newest)
        self.apply(agent.Repeat())

    def _depart(self, until: float) -> None:
        """Go away, and come back then, or when the trace says so."""
        self._rest()
        self._leave_network()
        self._return_at(until)

    def _leave_network(self) -> None:
        self._since_away = self._clock.now
        self._life += 1
        for event in (self._departure, self._timer, self._alive):
            if event is not None:
                event.cancel()
        self._departure = self._timer = self._alive = None
        if self.agent.hello is not None:
            self._around.host.say(*offline(self._around.config.fleet.name, self.name), retain=True)

    def crash(self) -> None:
        """End as a power cut does, and start again later on what the disk remembers."""
        if not self.here:
            return
        self._rest()
        device, work, planned = self._around.config.device, self._work, self.planned
        if work is not None and planned is not None:
            kept = on_disk(work.done, planned, work.slowdown, device.checkpoint_steps, device.checkpoint_seconds)
            self.disk.progress = (work.task.key, kept)
            self._around.engine.forget(work.task.key)
        self.accounts.spent.crashes += 1
        self._around.log.write(self._clock.now, "crash", device=self.name)
        self._leave_network()
        self._around.busy.pop(self.name, None)
        self._boot()
        self._return_at(self._clock.now + self._group.settings.restart_seconds)

    def _drop_out(self) -> None:
        if self._work is not None:
            self._work.drop_at = FOREVER
        until = self._clock.now + HOUR * self._group.settings.dropout_hours
        self._around.log.write(self._clock.now, "dropout", device=self.name, to=until)
        self._depart(until)

    # ── what it hears and says ────────────────────────────────────────────────────────────────────────────────────

    @property
    def _round(self) -> int:
        return self.agent.directive.round if self.agent.directive else 0

    def hear_later(self, message: Message, size: int) -> None:
        """A message of the server's sets off to it."""
        if self.here:
            down = self._group.down
            self._heard_until = max(self._heard_until, self._clock.now + down.latency + BITS * size / down.rate)
            self._clock.at(self._heard_until, partial(self._hear, message, size, self._life))

    def _hear(self, message: Message, size: int, life: int) -> None:
        if life == self._life and self.here:  # what was on its way to a lost connection is lost
            self.accounts.moved(size, up=False)
            self.apply(agent.Received(message))

    def apply(self, event: agent.Event) -> None:
        """Let the agent take an event, and do what it asks for."""
        self.agent, actions = agent.step(self.agent, event)
        for action in actions:
            self._do(action)
        if self.agent.busy:
            self._around.busy[self.name] = None
        else:
            self._around.busy.pop(self.name, None)
        self._expect_answer()
        self._go_on()

    def _do(self, action: agent.Action) -> None:
        match action:
            case agent.Say(message):
                self._say(message)
            case agent.MakePlan(spec, training):
                found = self._around.planning.plan(self._group, spec, training)
                intro = replace(found.intro, examples=self.person.examples)
                self.planned = replace(found, intro=intro)
                self._tell_plan(self.planned)
                self.apply(agent.Planned(hello_of(self.name, intro)))
            case agent.Fetch(directive) if self.planned is not None:
                self._hauling.fetch(directive, self.planned)
            case agent.SendChunks(offer, ranges) if self.planned is not None:
                self._hauling.send(offer, ranges, self.planned)
            case agent.Train(directive) if self.planned is not None:
                self._begin_work(directive, self.planned, personal=False)
            case agent.Finish(directive) if self.planned is not None:
                self._begin_work(directive, self.planned, personal=True)
            case agent.Settle(number, arrived):
                self.disk.settle(number, arrived=arrived)
            case agent.Adopt(run):
                self.disk.adopt(run)
            case agent.Leave(refusal) if refusal is not None:
                self._around.log.write(self._clock.now, "refused", device=self.name, reason=refusal.reason)
            case _:
                pass

    def _tell_plan(self, planned: Planned) -> None:
        plan, person = planned.plan, self.person
        classes = self._around.classes
        data = list(person.data) if classes is None else partition.counted(person.data, classes)
        self._around.log.write(
            self._clock.now, "device", device=self.name, group=self._group.name, rank=plan.rank, held=plan.held,
            layers=plan.layers_trained, precision=plan.precision, plan=planned.intro.plan, examples=person.examples,
            data=data,
        )  # fmt: skip

    def _say(self, message: Message) -> None:
        if not self.here:
            return
        payload, up = dump(message), self._group.up
        self.accounts.moved(len(payload), up=True)
        # One connection keeps the order of what is said through it.
        self._said_until = max(self._said_until, self._clock.now + up.latency + BITS * len(payload) / up.rate)
        topic = topics.up(self._around.config.fleet.name, self.name)
        self._clock.at(self._said_until, partial(self._around.host.say, topic, payload))

    def _report(self, state: str, **facts: object) -> None:
        spent = self.accounts.spent
        moved = {"bytes_up": round(spent.bytes_up), "bytes_down": round(spent.bytes_down)}
        self._say(Report.model_validate({"client": self.name, "state": state, "round": self._round, **moved, **facts}))

    def _expect_answer(self) -> None:
        """Say again what is not answered for long."""
        state = self.agent
        unanswered = (state.hello is not None and not state.welcomed) or state.outbox is not None
        if unanswered and self._timer is None and self.here and not state.left:
            self._timer = self._clock.after(REPEAT_SECONDS, self._repeat)

    def _repeat(self) -> None:
        self._timer = None
        if self._hauling.under_way:  # while chunks are on their way, the silence is not the server's
            self._expect_answer()
            return
        # A server asks for the rest of an upload once it has been still for a while.
        self._clock.after(QUIET_SECONDS + REPEAT_SECONDS / 2, self._around.host.turn)
        self.apply(agent.Repeat())

    def _keep_alive(self) -> None:
        self._alive = None
        if self._work is not None and self._work.began is not None:
            self._report("paused" if self._work.paused(self._clock.now) else "training")
        elif self._hauling.under_way:
            self._report(self._hauling.under_way)
        else:
            return
        self._stay_alive()

    def _stay_alive(self) -> None:
        if self._alive is None:
            self._alive = self._clock.after(self._around.keep_alive, self._keep_alive)

    # ── what it does ──────────────────────────────────────────────────────────────────────────────────────────────

    def _go_on(self) -> None:
        """Take up what is to be done."""
        if not self.here:
            return
        if self._work is not None and self._work.began is None:
            self._compute(self._work)
        self._hauling.go_on()
        if self._hauling.under_way:
            self._stay_alive()

    def _rest(self) -> None:
        """Stop what is being done, and keep what is done of it."""
        if self._work is not None and self._work.began is not None:
            self._stretch_ends(self._work)
            self.disk.progress = (self._work.task.key, self._work.done)
        self._hauling.rest()

    def _begin_work(self, directive: Directive, planned: Planned, *, personal: bool) -> None:
        disk, bands = self.disk, local_round.bands_of(directive, planned.intro)
        task = Task(
            self.name, directive, planned.intro, planned.plan, planned.key,
            tuple(disk.bands[band.blob.sha256] for band in bands), self.person.data,
            disk.owed, disk.kept, dict(disk.facts), personal, planned.round_bytes,
        )  # fmt: skip
        self._around.engine.submit(task)
        already = disk.progress[1] if disk.progress[0] == task.key else 0.0
        attempt = self.accounts.spent.crashes
        settings, seed = self._group.settings, self._around.seed
        self._work = work_of(task, planned, settings, seed, already=already, attempt=attempt)

    def _foreseen(self, seconds: float, *, began: float, until: float = FOREVER) -> Outcome:
        person, charge = self.person, self._charge
        if person.cell is None or person.plug is None:
            charge = replace(charge, at=began)
        elif charge.at < began:
            charge = rested(person.cell, charge, person.plug, began)
        return foreseen(person.cell, charge, person.plug, seconds, until=until, thresholds=self._around.thresholds)

    def _compute(self, work: Work) -> None:
        """Begin a stretch of work, up to its end or to what comes before."""
        now = self._clock.now
        outcome, happen = self._foreseen(work.left, began=now), self._worked
        for at, hazard in ((work.crash_at, self.crash), (work.drop_at, self._drop_out)):
            if work.done <= at < work.seconds:
                sooner = self._foreseen(at - work.done, began=now)
                if sooner.end < outcome.end:
                    outcome, happen = sooner, hazard
        work.began, work.pauses = now, outcome.pauses
        work.event = self._clock.at(outcome.end, happen) if outcome.end < FOREVER else None
        for begin, _ in outcome.pauses:
            self._clock.at(max(now, begin), partial(self._say_paused, self._life))
        self._stay_alive()

    def _say_paused(self, life: int) -> None:
        if life == self._life and self._work is not None and self._work.paused(self._clock.now):
            self._report("paused", detail="its battery is low")

    def _stretch_ends(self, work: Work) -> None:
        """Account for the stretch of work that ends now."""
        now = self._clock.now
        at = began = now if work.began is None else work.began
        outcome = self._foreseen(work.left, began=began, until=now)
        if work.event is not None:
            work.event.cancel()
        rested_for = 0.0
        for begin, end in (*outcome.pauses, (now, now)):
            self.accounts.span("computing", at, begin, work.directive.round)
            self.accounts.span("paused", begin, end, work.directive.round)
            at, rested_for = end, rested_for + end - begin
        self.accounts.spend(self._group.load_watts * outcome.worked + self._group.idle_watts * rested_for)
        work.done, work.began, work.event, work.pauses = work.done + outcome.worked, None, None, ()
        self._charge = outcome.charge

    def _worked(self) -> None:
        """The work is done: what came of it."""
        work = self._work
        if work is None:
            return
        self._stretch_ends(work)
        self._work = None
        done = self._around.engine.result(work.task.key)
        self.accounts.spent.judged(done)
        held_out = Losses(merged=done.held_out, version=work.directive.version, personal=done.personal)
        if done.personal is None:
            self._offer(work, done, held_out)
            return
        facts = {
            "held_out": done.held_out, "personal": done.personal,
            "accuracy": done.accuracy, "personal_accuracy": done.personal_accuracy,
        }  # fmt: skip
        self._around.log.write(self._clock.now, "personal", device=self.name, **facts)
        self._report("done", held_out=held_out)
        self.apply(agent.Finished())

    def _offer(self, work: Work, done: Done, held_out: Losses) -> None:
        directive, around = work.directive, self._around
        around.trained(directive, done)
        told = ("held_out", "accuracy", "loss_first", "loss_last")
        facts = {name: getattr(done, name) for name in told}
        around.log.write(
            self._clock.now, "update", device=self.name, round=directive.round, version=directive.version,
            slowdown=work.slowdown, **facts,
        )  # fmt: skip
        offer = Offer(
            client=self.name, run=directive.run, round=directive.round, version=directive.version,
            blob=blobs.describe(whole(done.payload), around.config.wire.chunk_bytes), examples=done.examples,
            loss_first=done.loss_first, loss_last=done.loss_last,
        )  # fmt: skip
        self.disk.put_outbox(offer, done)
        self._report("offering", held_out=held_out)
        self.apply(agent.Trained(offer, directive.run))

    def close(self) -> None:
        """Account for what is under way at the end of the simulation."""
        self._rest()
        if self._since_away is not None:
            self.accounts.span("away", self._since_away, self._clock.now, self._round)
            self._since_away = self._clock.now
