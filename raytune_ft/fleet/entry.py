"""A job in the queue of a fleet: what the queue must know of it, and how it stands.

A lane has one process, and a name for each time that it joined: `lane-3`, `lane-3.2` and so on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ConfigDict

State = Literal["queued", "leased", "done", "failed"]

ALONE_AFTER = 2
"""A job whose lanes were lost so often has the next one to itself: then it is known whose fault a loss is."""
# What is read back, from a bucket that others may write to, is as strict as a job file.
STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class QueuedJob:
    """What the queue must know of a job."""

    __pydantic_config__ = STRICT

    name: str
    digest: str
    """Of the resolved job: another digest is another job."""
    base: str
    """Jobs that have it equal can be on a lane together, or one after another without a reload."""
    seconds: float
    """Predicted, alone on a lane. The longest are handed out first."""
    shares_batch: bool = True
    """Others may be on the lane at the same time."""
    max_restarts: int = 3
    """Lost lanes that it survives."""


@dataclass
class Entry:
    """A job's state."""

    __pydantic_config__ = STRICT

    job: QueuedJob
    state: State = "queued"
    lane: str | None = None
    """That holds its lease."""
    losses: int = 0
    """Lanes that were lost under it, unannounced, since it came further."""
    lost_at_step: int = 0
    """Its checkpoint when the last of them was."""
    checkpoint_step: int | None = None
    """Of the last checkpoint that a lane spoke of."""
    refused_by: tuple[str, ...] = ()
    """Processes of lanes that cannot go on with it."""
    reason: str | None = None
    """Why it failed."""

    @property
    def alone(self) -> bool:
        """It needs a lane to itself."""
        return not self.job.shares_batch or self.losses >= ALONE_AFTER

    @property
    def microseconds(self) -> int:
        """Predicted. Whole: sums that are added to and taken from stay exact."""
        return round(self.job.seconds * 1e6)

    def count_checkpoint(self, step: int) -> None:
        """It came as far as this: whoever refused it before did not hold it up for good."""
        if step > (self.checkpoint_step or 0):
            self.refused_by = ()
        self.checkpoint_step = step

    def count_loss(self) -> None:
        """A lane was lost under it. Who takes lanes down never gets beyond the step at which it does."""
        step = self.checkpoint_step or 0
        self.losses = 1 if step > self.lost_at_step else self.losses + 1
        self.lost_at_step = step

    def count_refusal(self, lane: str, *, alone: bool) -> None:
        """A lane cannot go on with it; `alone`: who can has no other beside it."""
        self.refused_by = (*self.refused_by, process_of(lane))
        if alone:
            self.losses = max(self.losses, ALONE_AFTER)

    def suits(self, lane: str, others: Iterable[str]) -> bool:
        """Whether a lane may try it: one that refused it once more, if so did all others that there are."""
        refused = self.refused_by
        return process_of(lane) not in refused or all(process_of(other) in refused for other in others)

    def forgive(self) -> None:
        """Nothing that went wrong before counts."""
        self.losses, self.refused_by = 0, ()

    @property
    def guilt(self) -> str:
        """Why it has failed, where it lost more lanes than it may."""
        return (
            f"its lane was lost {self.losses} times, at last with no other job on it, and "
            f"cluster.max_restarts = {self.job.max_restarts}"
        )


def as_before(job: QueuedJob, before: Entry | None) -> Entry:
    """A job as it stood in an earlier run, unless it is another by now."""
    if before is None or before.job.digest != job.digest:
        return Entry(job)
    state: State = "queued" if before.state == "leased" else before.state
    # The lanes of then are gone, and their names are used again.
    return replace(before, job=job, state=state, lane=None, refused_by=())


def process_of(lane: str) -> str:
    """The first name of a lane, under which its process was started.

    >>> process_of("lane-3.2")
    'lane-3'
    """
    return lane.partition(".")[0]
