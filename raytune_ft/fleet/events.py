"""What a fleet tells while it runs, and what became of it.

`run_fleet` calls `on_event` with one of these after another, in the order in which things became known, and
always in the thread that called `run_fleet`. A view is a fold over them:

1. `Notice`, any number, at any time: a line for a person, such as what the fleet waits for.
2. `FleetPlanned`, once: all jobs, each of which is queued by it. Nothing was trained before.
3. `JobDone` with `before=True` and `JobFailed` with `before=True`: jobs that ended in an earlier run of the
   same command and are not run again. They follow `FleetPlanned` at once.
4. Then, as it comes:
   - `LaneStarted`: a lane has its place in the cluster. It has no base yet. Its name is never used again.
   - `LaneLoaded`: it holds a base, and has room for so many jobs at once.
   - `JobStarted`: a lane trains a job from a step on. A job may start several times: on another lane after
     the first was lost, and then again at a step that was done before.
   - `JobStepped`: how far a running job is; about one a second of each job, not one of each step.
   - `JobReturned`: a lane cannot go on with a job, which is queued again.
   - `JobDone`, `JobFailed`: a job has ended, once and for all.
   - `LaneLost`: a lane is gone before its time; its running jobs are queued again.
   - `LaneEnded`: a lane has nothing more to do. It has no running job.
   - `Progress`: the whole fleet in numbers; about one a second.
5. `FleetEnded`, once, unless `run_fleet` raises. With `on_failure: stop` jobs may be queued still.

All of them are plain data: they pickle, and `dataclasses.asdict` makes JSON of them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Notice:
    """A line for a person."""

    at_s: float
    """Of every event: seconds since the call of `run_fleet`."""
    text: str


@dataclass(frozen=True)
class PlannedJob:
    """A job before it runs. Its figures are estimates."""

    name: str
    base: str
    """`model.path` of the job."""
    steps: int
    tokens: int
    seconds: float
    """Alone on a lane."""


@dataclass(frozen=True)
class FleetPlanned:
    """What is to be done."""

    at_s: float
    fleet: str
    jobs: tuple[PlannedJob, ...]
    """The longest first."""
    lanes: int
    """At most so many."""


@dataclass(frozen=True)
class LaneStarted:
    """A lane is there."""

    at_s: float
    lane: str
    host: str
    device: str
    """`cpu`, or the name of the GPU."""


@dataclass(frozen=True)
class LaneLoaded:
    """A lane holds a base; the one that it held before is gone."""

    at_s: float
    lane: str
    base: str
    """`model.path` of its jobs."""
    slots: int
    seconds: float
    """That loading took."""


@dataclass(frozen=True)
class LaneLost:
    """A lane is gone before its time, and others take its jobs from their checkpoints."""

    at_s: float
    lane: str
    jobs: tuple[str, ...]
    """That it trained; all of them are queued again, but those for which a `JobFailed` follows."""
    announced: bool
    """Its node was taken away with a notice."""
    reason: str


@dataclass(frozen=True)
class LaneEnded:
    """A lane has nothing more to do."""

    at_s: float
    lane: str


@dataclass(frozen=True)
class JobStarted:
    """A lane trains a job."""

    at_s: float
    job: str
    lane: str
    step: int
    """Where it begins: 0, or the step of the checkpoint that it goes on from."""
    steps: int
    """Of the whole job: what was an estimate in `FleetPlanned` is known now."""


@dataclass(frozen=True)
class JobStepped:
    """How far a running job is."""

    at_s: float
    job: str
    lane: str
    step: int
    """Steps done."""
    steps: int
    loss: float
    """Mean cross-entropy of the learned tokens of that step."""
    tokens: int
    """Of all its steps so far, padding not counted."""


@dataclass(frozen=True)
class JobReturned:
    """A lane gave a job back, which another may go on with from its checkpoint; the lane is well."""

    at_s: float
    job: str
    lane: str
    reason: str


@dataclass(frozen=True)
class JobDone:
    """A job was trained and published."""

    at_s: float
    job: str
    lane: str | None
    """None where it was done before."""
    result: dict[str, Any]
    """As that of a job by itself: adapter, version, uri, steps, loss, scores_before, scores_after (None where
    they were not measured), tokens_per_second, peak_memory_bytes (of the lane), seconds; `scored_examples`,
    `max_new_tokens`, `notices`, `forgetting` and `gate` where the job has them. See
    `raytune_ft.train.launch.train`."""
    losses: tuple[tuple[int, float], ...] = ()
    """(step, loss) over the whole job, a few hundred at most; none where it was done before."""
    before: bool = False


@dataclass(frozen=True)
class JobFailed:
    """A job cannot be trained; the others go on."""

    at_s: float
    job: str
    lane: str | None
    """None where it failed before."""
    reason: str
    """One message that names place, value, limit and remedy."""
    before: bool = False
    """In an earlier run; `retry_failed` runs it again, and so does a change of the job or of its data."""


@dataclass(frozen=True)
class Progress:
    """The whole fleet in numbers. Running, queued, done and failed jobs are all jobs."""

    at_s: float
    running: int
    queued: int
    done: int
    failed: int
    tokens_per_second: float
    """Over the last half minute, of all lanes together."""
    seconds_left: float | None
    """An estimate; None as long as there is nothing to estimate from."""


@dataclass(frozen=True)
class JobOutcome:
    """What became of a job."""

    name: str
    state: Literal["done", "failed", "queued"]
    """`queued`: the fleet was stopped before."""
    result: dict[str, Any] | None = None
    """Of a job that is done; see `JobDone.result`."""
    reason: str | None = None
    """Of one that failed."""
    before: bool = False
    """It ended in an earlier run of the fleet."""


@dataclass(frozen=True)
class FleetResult:
    """What became of a fleet."""

    fleet: str
    jobs: tuple[JobOutcome, ...]
    """Sorted by name."""
    seconds: float
    events: tuple["FleetEvent", ...] = field(default=(), repr=False)
    """All that was told but `JobStepped` and `Progress`: the lanes over time, and the losses of the jobs."""

    @property
    def ok(self) -> bool:
        """Whether all jobs are done."""
        return all(job.state == "done" for job in self.jobs)

    def count(self, state: Literal["done", "failed", "queued"]) -> int:
        """How many jobs are in a state."""
        return sum(job.state == state for job in self.jobs)


@dataclass(frozen=True)
class FleetEnded:
    """Nothing more comes."""

    at_s: float
    done: int
    failed: int
    queued: int


FleetEvent = (
    Notice
    | FleetPlanned
    | LaneStarted
    | LaneLoaded
    | LaneLost
    | LaneEnded
    | JobStarted
    | JobStepped
    | JobReturned
    | JobDone
    | JobFailed
    | Progress
    | FleetEnded
)
