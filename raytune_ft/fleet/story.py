"""What a fleet's driver tells, and what it remembers of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raytune_ft.fleet.desk import News
from raytune_ft.fleet.events import (
    FleetEnded,
    FleetEvent,
    FleetPlanned,
    FleetResult,
    JobDone,
    JobFailed,
    JobOutcome,
    JobStepped,
    LaneEnded,
    LaneLost,
    LaneStarted,
    Notice,
    PlannedJob,
    Progress,
)
from raytune_ft.fleet.pace import Pace
from raytune_ft.fleet.placement import Placed
from raytune_ft.fleet.plan import FleetPlan
from raytune_ft.fleet.queue import Queue

_PROGRESS_EVERY_S = 1.0
OnFleetEvent = Callable[[FleetEvent], None]


class Story:
    """One event after another, each as soon as it is known."""

    def __init__(self, on_event: OnFleetEvent) -> None:
        """The fleet was called for now; `on_event` hears of everything."""
        self.began_at = time.monotonic()
        self._on_event = on_event
        self._events: list[FleetEvent] = []
        self._outcomes: dict[str, JobOutcome] = {}
        self._pace = Pace([])
        self._progress_at = 0.0
        self.lanes_joined = 0
        """Lanes that had a place in the cluster so far."""
        self.at_work: set[str] = set()
        """Lanes that are there."""

    @property
    def at_s(self) -> float:
        """Seconds since the fleet was called for."""
        return time.monotonic() - self.began_at

    def notice(self, text: str) -> None:
        """A line for a person."""
        self.tell(Notice(self.at_s, text))

    def plan(
        self, plan: FleetPlan, placed: Sequence[Placed], queue: Queue, done: Mapping[str, dict[str, Any]]
    ) -> None:
        """All jobs, and what became of some before."""
        planned = tuple(
            PlannedJob(
                job.spec.name, job.spec.model.path, job.work.steps, job.work.tokens, job.queued.seconds
            )
            for job in sorted(placed, key=lambda job: (-job.queued.seconds, job.spec.name))
        )
        self._pace = Pace(planned)
        self._outcomes = {job.name: JobOutcome(job.name, "queued") for job in planned}
        self.tell(FleetPlanned(self.at_s, plan.fleet.name, planned, plan.fleet.lanes.max))
        for name, entry in queue.entries.items():
            if entry.state == "done":
                self.tell(JobDone(self.at_s, name, None, done[name], before=True))
            elif entry.state == "failed":
                self.tell(JobFailed(self.at_s, name, None, entry.reason or "", before=True))

    def tell(self, event: FleetEvent) -> None:
        """One event after another."""
        self._pace.add(event)
        match event:
            case JobDone():
                self._outcomes[event.job] = JobOutcome(event.job, "done", event.result, before=event.before)
            case JobFailed():
                self._outcomes[event.job] = JobOutcome(
                    event.job, "failed", reason=event.reason, before=event.before
                )
            case LaneStarted():
                self.lanes_joined += 1
                self.at_work.add(event.lane)
            case LaneEnded() | LaneLost():
                self.at_work.discard(event.lane)
            case _:
                pass
        if not isinstance(event, JobStepped | Progress):
            self._events.append(event)
        self._on_event(event)

    def take(self, news: News) -> None:
        """What the desk has heard, and now and then the fleet in numbers."""
        for event in news.events:
            self.tell(event)
        if self.at_s >= self._progress_at:
            self._progress_at = self.at_s + _PROGRESS_EVERY_S
            self.tell(self._pace.progress(self.at_s, news.counts))

    def result(self, fleet: str) -> FleetResult:
        """The end of it."""
        counts = dict.fromkeys(("done", "failed", "queued"), 0)
        for outcome in self._outcomes.values():
            counts[outcome.state] += 1
        self.tell(FleetEnded(self.at_s, counts["done"], counts["failed"], counts["queued"]))
        jobs = tuple(self._outcomes[name] for name in sorted(self._outcomes))
        return FleetResult(fleet, jobs, self.at_s, tuple(self._events))
