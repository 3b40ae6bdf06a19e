"""The desk of a fleet: lanes ask it for jobs and tell it how they get on, and the driver reads what happened.

It runs in an actor beside the driver. All that decides is the queue; the desk has a clock, and remembers what
the driver has not read yet. Nothing in it waits.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raytune_ft.fleet.entry import State, process_of
from raytune_ft.fleet.events import (
    FleetEvent,
    JobDone,
    JobFailed,
    JobReturned,
    JobStarted,
    JobStepped,
    LaneEnded,
    LaneLoaded,
    LaneLost,
    LaneStarted,
    Notice,
)
from raytune_ft.fleet.placement import Group
from raytune_ft.fleet.queue import Queue
from raytune_ft.spec import JobSpec

Cause = Literal["unknown", "lane", "store"]
"""Of the loss of a lane. Where it is not known, one of its jobs may be to blame."""
_AWAY_S = 5.0
"""The driver asks several times a second: a desk that was not asked for so long was not there."""


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
    """Nothing is left for it."""
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
class Barren:
    """Lanes that were lost one after another, unannounced, without coming to anything: none of them did a
    step, or what they are lost for is known, and none kept a checkpoint or ended a job."""

    losses: int = 0
    reason: str = ""
    """Why the last of them was lost."""
    cause: Cause = "unknown"


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
    lanes: int
    """That are at work or on their way."""
    barren: Barren
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the desk.

        Args:
            queue: the state of all jobs.
            orders: every job by name.
            groups: every base with its jobs.
            lease_s: how long after its last word a lane counts as lost.
            began_at: when the driver began, by `clock`.
            clock: seconds, which all processes of the driver's machine count alike.
        """
        self._queue = queue
        self._orders = orders
        self._groups = {group.base: group for group in groups}
        self._lease_s = lease_s
        self._began_at = began_at
        self._clock = clock
        self._events: list[FleetEvent] = []
        self._heard_at: dict[str, float] = {}
        self._looked_at = clock()
        self._stepped: set[str] = set()
        """Processes of lanes that have done a step."""
        self._lost: set[str] = set()
        """Processes that were lost under one of their names."""
        self._unloadable: dict[str, set[str]] = {}
        """Processes that could not load a base."""
        self._barren = Barren()
        self._changed = True

    def join(self, lane: str, host: str, device: str) -> None:
        """A lane is there, under a name that was never used."""
        self._expire()
        now = self._clock()
        self._queue.join(lane, now)
        self._heard_at[lane] = now
        self._events.append(LaneStarted(self._at_s, lane, host, device))

    def expect(self, lanes: Collection[str]) -> None:
        """These are on their way and likely to come; they may be there already, and others besides."""
        self._queue.lanes = len({process_of(lane) for lane in self._heard_at} | set(lanes))

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
        if self._heard(lane):
            path = self._groups[base].jobs[0].spec.model.path
            self._events.append(LaneLoaded(self._at_s, lane, path, slots, seconds))

    def cannot_load(self, lane: str, base: str, reason: str) -> bool:
        """A lane could not load a base, which may be the lane's fault, or its machine's.

        Returns:
            Whether it is the base's: a second lane says so, and none has it. Then its jobs have failed.
        """
        if not self._heard(lane):
            return False
        said_so = self._unloadable.setdefault(base, set())
        said_so.add(process_of(lane))
        if len(said_so) == 1 or self._queue.is_loaded(base):
            return False
        for name in self._queue.fail_waiting(base, reason):
            self._has_failed(name, lane, reason)
        return True

    def started(self, lane: str, job: str, step: int, steps: int, notices: Sequence[str] = ()) -> None:
        """A lane trains a job from a step on; of its data a person should know the notices."""
        if self._heard(lane) and self._queue.holds(lane, job):
            self._events.append(JobStarted(self._at_s, job, lane, step, steps))
            self._events += [Notice(self._at_s, f"{job}: {notice}") for notice in notices]

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
            self._stepped.add(process_of(lane))
        # Steps that are lost again are no progress where it is known what they are lost for.
        if checkpoints or (steps and self._barren.cause == "unknown"):
            self._barren = Barren()
        return True

    def done(
        self, lane: str, job: str, result: dict[str, Any], losses: tuple[tuple[int, float], ...]
    ) -> bool:
        """A job was trained and published; False if the lane holds no lease on it."""
        if not self._queue.finish(lane, job):
            return False
        self._changed, self._barren = True, Barren()
        self._events.append(JobDone(self._at_s, job, lane, result, losses))
        return True

    def failed(self, lane: str, job: str, reason: str) -> bool:
        """A job cannot be trained; False if the lane holds no lease on it."""
        if not self._queue.fail(lane, job, reason):
            return False
        self._has_failed(job, lane, reason)
        return True

    def give_back(self, lane: str, job: str, reason: str, *, alone: bool) -> bool:
        """A lane cannot go on with a job; see `Queue.give_back`."""
        if not self._queue.give_back(lane, job, reason, alone=alone):
            return False
        self._changed = True
        if self._queue.entries[job].state == "failed":
            self._has_failed(job, lane, reason)
        else:
            self._events.append(JobReturned(self._at_s, job, lane, reason))
        return True

    def end(self, lane: str) -> None:
        """A lane has nothing more to do."""
        if self._heard_at.pop(lane, None) is not None:
            self._queue.lose(lane, announced=True)
            self._events.append(LaneEnded(self._at_s, lane))

    def lose(self, lane: str, *, announced: bool, reason: str, cause: Cause = "unknown") -> None:
        """A lane is gone before its time. Fine where that is known."""
        if self._heard_at.pop(lane, None) is None:
            return
        jobs = self._queue.lose(lane, announced=announced or cause != "unknown")
        self._changed = True
        self._events.append(LaneLost(self._at_s, lane, jobs, announced, reason))
        for name in jobs:
            entry = self._queue.entries[name]
            if entry.state == "failed":
                self._events.append(JobFailed(self._at_s, name, lane, entry.reason or reason))
        if not announced:
            self._count_loss(process_of(lane), reason, cause)

    def lose_attempts(self, name: str, *, announced: bool, reason: str, cause: Cause = "unknown") -> None:
        """The process of a lane is gone, whatever name it had joined under last."""
        found = [lane for lane in self._heard_at if process_of(lane) == name]
        for lane in found:
            self.lose(lane, announced=announced, reason=reason, cause=cause)
        # One that was silent before was counted then.
        if not found and not announced and name not in self._lost:
            self._count_loss(name, reason, cause)

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
            self._queue.lanes,
            self._barren,
            state,
        )

    @property
    def _at_s(self) -> float:
        return self._clock() - self._began_at

    def _has_failed(self, job: str, lane: str, reason: str) -> None:
        self._changed, self._barren = True, Barren()
        self._events.append(JobFailed(self._at_s, job, lane, reason))

    def _count_loss(self, process: str, reason: str, cause: Cause) -> None:
        self._lost.add(process)
        if cause != "unknown" or process not in self._stepped:
            self._barren = Barren(self._barren.losses + 1, reason, cause)

    def _heard(self, lane: str) -> bool:
        self._expire()
        if lane not in self._heard_at:
            return False
        self._heard_at[lane] = self._clock()
        return True

    def _expire(self) -> None:
        """Lose the lanes that are silent, before the queue does: it would not say which they were."""
        now = self._clock()
        away_s, self._looked_at = now - self._looked_at, now
        if away_s > _AWAY_S:
            # Whoever spoke meanwhile still waits to be heard.
            self._heard_at = {lane: heard + away_s for lane, heard in self._heard_at.items()}
            self._queue.put_off(away_s)
        for lane in [lane for lane, heard in self._heard_at.items() if heard + self._lease_s <= now]:
            self.lose(lane, announced=False, reason=f"it was silent for {self._lease_s:.0f} s")
