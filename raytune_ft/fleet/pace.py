"""How fast a fleet is, and how much longer it takes: a fold over its events."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from raytune_ft.fleet.entry import State
from raytune_ft.fleet.events import (
    FleetEvent,
    JobDone,
    JobFailed,
    JobStarted,
    JobStepped,
    PlannedJob,
    Progress,
)

WINDOW_S = 30.0


@dataclass
class _Job:
    seconds: float
    """Predicted."""
    share: float = 0.0
    """Of it that is done."""
    step: int = 0
    """Where the lane that trains it began, or spoke last."""
    ended: bool = False
    """It is done or failed; its last steps may still be told."""


class Pace:
    """Tokens of the last half minute, and the work that is left.

    Work is counted in predicted seconds. What matters of the prediction is only how jobs compare: the fleet's
    own pace tells how long it takes for a predicted second.
    """

    def __init__(self, jobs: Iterable[PlannedJob]) -> None:
        self._jobs = {job.name: _Job(max(job.seconds, 1e-9)) for job in jobs}
        self._tokens: deque[tuple[float, float]] = deque()
        self._began_s: float | None = None
        self._done_s = 0.0
        """Predicted seconds that were done since `_began_s`."""

    def add(self, event: FleetEvent) -> None:
        """Take an event into account, in the order in which they come."""
        match event:
            case JobStarted() if not self._jobs[event.job].ended:
                job = self._jobs[event.job]
                job.step = event.step
                job.share = event.step / max(event.steps, 1)
                self._began_s = event.at_s if self._began_s is None else self._began_s
            case JobStepped():
                job = self._jobs[event.job]
                done = max(0, event.step - job.step)
                self._tokens.append((event.at_s, event.tokens * done / max(event.step, 1)))
                if not job.ended:
                    self._move(event.job, event.step / max(event.steps, event.step, 1))
                job.step = event.step
            case JobDone() if not event.before:
                self._move(event.job, 1.0)
                self._jobs[event.job].ended = True
            case JobDone() | JobFailed():
                # What was not done took no time.
                self._jobs[event.job].share, self._jobs[event.job].ended = 1.0, True
            case _:
                pass

    def progress(self, at_s: float, counts: Mapping[State, int]) -> Progress:
        """The fleet at a moment.

        Args:
            at_s: the moment, not before the last event.
            counts: jobs in each state.
        """
        while self._tokens and self._tokens[0][0] < at_s - WINDOW_S:
            self._tokens.popleft()
        spent_s = 0.0 if self._began_s is None else at_s - self._began_s
        tokens = sum(count for _, count in self._tokens)
        left_s = sum(job.seconds * (1 - job.share) for job in self._jobs.values())
        return Progress(
            at_s=at_s,
            running=counts.get("leased", 0),
            queued=counts.get("queued", 0),
            done=counts.get("done", 0),
            failed=counts.get("failed", 0),
            tokens_per_second=tokens / min(WINDOW_S, spent_s) if tokens and spent_s > 0 else 0.0,
            seconds_left=left_s * spent_s / self._done_s if self._done_s > 0 else None,
        )

    def _move(self, name: str, share: float) -> None:
        job = self._jobs[name]
        self._done_s += job.seconds * max(0.0, share - job.share)
        job.share = share
