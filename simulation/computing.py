"""A device's one piece of work in virtual time: how far it is, when it will be done, and what comes in between."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_runtime.governor import Thresholds
from edge_runtime.wire.messages import Directive
from simulation import battery
from simulation.battery import Cell, Charge, Outcome
from simulation.clock import Event
from simulation.draws import fraction, named
from simulation.fleet import Planned
from simulation.settings import Devices
from simulation.traces import FOREVER, HOUR, Trace
from simulation.work import Task


@dataclass(eq=False)
class Work:
    """A round that a device computes.

    Attributes:
        task: what is computed.
        directive: that asked for it.
        seconds: that it takes without a pause.
        slowdown: how many times as long as planned.
        crash_at: seconds of it after which the device crashes; infinity for never.
        drop_at: the same for going away.
        done: seconds of it that are done.
        began: when this stretch of it began; None while it rests.
        event: that ends the stretch.
        pauses: that are foreseen in it.
    """

    task: Task
    directive: Directive
    seconds: float
    slowdown: float
    crash_at: float = FOREVER
    drop_at: float = FOREVER
    done: float = 0.0
    began: float | None = None
    event: Event | None = None
    pauses: tuple[tuple[float, float], ...] = ()

    @property
    def left(self) -> float:
        """Seconds of it that are to be done."""
        return max(0.0, self.seconds - self.done)

    def paused(self, now: float) -> bool:
        """Whether it waits for the governor or the plug."""
        return any(begin <= now < end for begin, end in self.pauses)


def work_of(task: Task, planned: Planned, settings: Devices, seed: int, *, already: float, attempt: int) -> Work:
    """How long a task takes a device, and what happens to the device meanwhile.

    Args:
        task: what is computed.
        planned: how fast the device is.
        settings: what may happen to it.
        seed: of the simulation.
        already: seconds of it that are on the device's disk.
        attempt: how often the device has crashed; another attempt crashes at another moment.
    """
    training, number, name = task.directive.training, task.directive.round, task.name
    slowdown = 1.0
    if settings.straggler_sigma:
        drawn = named(seed, "straggler", name, number, task.personal).standard_normal()
        slowdown = math.exp(settings.straggler_sigma * drawn)
    evaluations = 2 if task.personal else 1
    seconds = slowdown * (training.max_steps * planned.step_seconds + evaluations * planned.evaluate_seconds)
    crash = drop = FOREVER
    if settings.crashes_per_hour:
        rate = settings.crashes_per_hour / HOUR
        crash = already - math.log1p(-fraction(seed, "crash", name, number, attempt)) / rate
    if settings.dropout and fraction(seed, "dropout", name, number) < settings.dropout:
        drop = seconds * fraction(seed, "dropout at", name, number)
    return Work(task, task.directive, seconds, slowdown, crash, drop if drop >= already else FOREVER, done=already)


def foreseen(
    cell: Cell | None, charge: Charge, plug: Trace | None, seconds: float, *, until: float, thresholds: Thresholds
) -> Outcome:
    """What becomes of so many seconds of work that begin now; see `simulation.battery.work`.

    Args:
        cell: the battery; None for a device on the mains.
        charge: of it; it knows the time.
        plug: when it is on the plug.
        seconds: of work.
        until: at which one looks in any case.
        thresholds: of the governor.
    """
    if cell is None or plug is None:
        end = min(until, charge.at + seconds)
        left = 0.0 if end < until or until >= charge.at + seconds else seconds - (until - charge.at)
        return Outcome(end, left, seconds - left, (), Charge(charge.percent, end, charge.paused))
    return battery.work(cell, charge, plug, seconds, until=until, thresholds=thresholds)


def on_disk(done: float, planned: Planned, slowdown: float, steps: int, seconds: float) -> float:
    """Seconds of work that a crash leaves: those up to the last checkpoint.

    Args:
        done: seconds of work.
        planned: how long a step takes.
        slowdown: how many times as long it takes now.
        steps: optimiser steps between two checkpoints, at most.
        seconds: after which the next complete step is written in any case.
    """
    step = planned.step_seconds * slowdown
    trained = done - planned.evaluate_seconds * slowdown
    if trained <= 0:
        return 0.0
    every = step * max(1, min(steps, math.ceil(seconds / step)))
    return done - trained % every
