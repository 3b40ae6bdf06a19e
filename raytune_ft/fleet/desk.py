"""The desk of a fleet: lanes ask it for jobs and tell it how they get on, and the driver reads what happened.

It runs in an actor beside the driver. All that decides is the queue; the desk has a clock, and remembers what
the driver has not read yet. Nothing in it waits.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.fleet.events import (
    FleetEvent,
    JobDone,
    JobFailed,
    JobStarted,
    JobStepped,
    LaneEnded,
    LaneLoaded,
    LaneLost,
    LaneStarted,
)
from raytune_ft.fleet.placement import Group
from raytune_ft.fleet.queue import Queue, State
from raytune_ft.spec import JobSpec


@dataclass(frozen=True)
class Order:
    """A job as a lane gets it."""

    job: JobSpec
    inputs: str
    """What it reads, as the driver found it; see `raytune_ft.train.run.name_inputs`."""


@dataclass(frozen=True)
class Taken:
    """What a lane gets when it asks; at most one of the fields says something."""

    orders: tuple[Order, ...] = ()
    """Leased to it now."""
    switch_to: Group | None = None
    """Nothing is left of its base: load this one, then ask again."""
    ended: bool = False
    """Nothing is left, nor can anything come back."""
    lost: bool = False
    """Its lease is over: it must drop its jobs, and join under another name."""


@dataclass(frozen=True)
class Stepped:
    """How far a lane is with a job."""

    step: int
    """Steps done."""
    steps: int
    loss: float
    tokens: int
    """Of all its steps so far."""


@dataclass(frozen=True)
class News:
    """What the driver reads."""

    events: tuple[FleetEvent, ...]
    """Since it read last."""
    counts: Mapping[State, int]
    ended: bool
    """No lane trains, and none will."""
    stopped: bool
    """A job failed, and the fleet was to stop then: nothing more is handed out."""
    barren_losses: int
    """Lanes that were lost one after another, unannounced, and none of them did a step."""
    reason: str
    """Why the last of them was lost."""
    snapshot: bytes | None
    """State of the queue, where it was asked for and has changed since."""


class Desk:
    """Where lanes and driver meet."""

    def __init__(
        self,
        queue: Queue,
        orders: Mapping[str, Order],
        groups: Sequence[Group],
        *,
        lease_s: float,
        began_at: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the desk.

        Args:
            queue: the state of all jobs.
            orders: every job by name.
            groups: every base with its jobs.
            lease_s: how long after its last word a lane counts as lost.
            began_at: when the driver began, by `clock`.
            clock: seconds.
        """
        self._queue = queue
        self._orders = orders
        self._groups = {group.base: group for group in groups}
        self._lease_s = lease_s
        self._began_at = began_at
        self._clock = clock
        self._events: list[FleetEvent] = []
        self._heard_at: dict[str, float] = {}
        self._stepped: set[str] = set()
        """Lanes that have done a step."""
        self._barren_losses = 0
        self._reason = ""
        self._changed = True

    def join(self, lane: str, host: str, device: str) -> None:
        """A lane is there, under a name that was never used."""
        now = self._clock()
        self._queue.join(lane, now)
        self._heard_at[lane] = now
        self._events.append(LaneStarted(self._at_s, lane, host, device))

    def set_lanes(self, lanes: int) -> None:
        """So many are at work or on their way."""
        self._queue.lanes = lanes

    def take(self, lane: str, base: str | None, free: int) -> Taken:
        """Lease jobs to a lane; see `Queue.take`."""
        if not self._heard(lane):
            return Taken(lost=True)
        offer = self._queue.take(lane, base, free, self._clock())
        self._changed |= bool(offer.jobs)
        return Taken(
            orders=tuple(self._orders[name] for name in offer.jobs),
            switch_to=None if offer.switch_to is None else self._groups[offer.switch_to],
            ended=offer.ended,
            lost=offer.lost,
        )

    def loaded(self, lane: str, base: str, slots: int, seconds: float) -> None:
        """A lane holds a base."""
        path = self._groups[base].jobs[0].spec.model.path
        self._events.append(LaneLoaded(self._at_s, lane, path, slots, seconds))

    def started(self, lane: str, job: str, step: int, steps: int) -> None:
        """A lane trains a job from a step on."""
        self._events.append(JobStarted(self._at_s, job, lane, step, steps))

    def beat(self, lane: str, steps: Mapping[str, Stepped], checkpoints: Mapping[str, int]) -> bool:
        """A lane is alive.

        Args:
            lane: which.
            steps: how far its jobs are, of those that have done a step since it last said so.
            checkpoints: the step of each checkpoint that it kept since then.

        Returns:
            False if it is too late; see `Taken.lost`.
        """
        if not self._heard(lane) or not self._queue.renew(lane, self._clock(), checkpoints):
            return False
        self._changed |= bool(checkpoints)
        for name, at in steps.items():
            self._events.append(JobStepped(self._at_s, name, lane, at.step, at.steps, at.loss, at.tokens))
        if steps:
            self._stepped.add(lane)
            self._barren_losses = 0
        return True

    def done(
        self, lane: str, job: str, result: dict[str, Any], losses: tuple[tuple[int, float], ...]
    ) -> bool:
        """A job was trained and published; False if the lane holds no lease on it."""
        if not self._queue.finish(lane, job):
            return False
        self._changed, self._barren_losses = True, 0
        self._events.append(JobDone(self._at_s, job, lane, result, losses))
        return True

    def failed(self, lane: str, job: str, reason: str) -> bool:
        """A job cannot be trained; False if the lane holds no lease on it."""
        if not self._queue.fail(lane, job, reason):
            return False
        self._changed, self._barren_losses = True, 0
        self._events.append(JobFailed(self._at_s, job, lane, reason))
        return True

    def end(self, lane: str) -> None:
        """A lane has nothing more to do."""
        if self._heard_at.pop(lane, None) is not None:
            self._queue.lose(lane, announced=True)
            self._events.append(LaneEnded(self._at_s, lane))

    def lose(self, lane: str, *, announced: bool, reason: str) -> None:
        """A lane is gone before its time. Fine where that is known."""
        if self._heard_at.pop(lane, None) is None:
            return
        jobs = self._queue.lose(lane, announced=announced)
        self._changed = True
        self._events.append(LaneLost(self._at_s, lane, jobs, announced, reason))
        for name in jobs:
            entry = self._queue.entries[name]
            if entry.state == "failed":
                self._events.append(JobFailed(self._at_s, name, lane, entry.reason or reason))
        if not announced and lane not in self._stepped:
            self._barren_losses += 1
            self._reason = reason

    def lose_attempts(self, name: str, *, announced: bool, reason: str) -> None:
        """The process of a lane is gone, whatever name it had joined under last."""
        found = [lane for lane in self._heard_at if lane == name or lane.startswith(f"{name}.")]
        for lane in found:
            self.lose(lane, announced=announced, reason=reason)
        if not found and not announced:
            self._barren_losses += 1
            self._reason = reason

    def news(self, *, snapshot: bool = False) -> News:
        """What happened since the driver asked last."""
        self._expire()
        events, self._events = tuple(self._events), []
        state = None
        if snapshot and self._changed:
            state, self._changed = self._queue.snapshot(), False
        return News(
            events,
            dict(self._queue.counts),
            self._queue.ended,
            self._queue.stopped,
            self._barren_losses,
            self._reason,
            state,
        )

    @property
    def _at_s(self) -> float:
        return self._clock() - self._began_at

    def _heard(self, lane: str) -> bool:
        self._expire()
        if lane not in self._heard_at:
            return False
        self._heard_at[lane] = self._clock()
        return True

    def _expire(self) -> None:
        """Lose the lanes that are silent, before the queue does: it would not say which they were."""
        now = self._clock()
        for lane in [lane for lane, heard in self._heard_at.items() if heard + self._lease_s <= now]:
            self.lose(lane, announced=False, reason=f"it was silent for {self._lease_s:.0f} s")
