"""What the driver and the workers tell each other, and the function that Ray Train runs.

Driver, controller and workers all unpickle what stands here. Only the workers need torch, whose import takes
seconds and memory in each process; so it is imported when a worker runs.
"""

import logging
from dataclasses import dataclass
from typing import Any, Self

import ray.exceptions

from raytune_ft.data.counts import DataCounts
from raytune_ft.data.order import Course, plan_course
from raytune_ft.data.other_tasks import OtherTasks
from raytune_ft.data.prepare import PreparedData
from raytune_ft.data.reader import WindowReader
from raytune_ft.data.survey import Kept
from raytune_ft.data.windows import Window
from raytune_ft.errors import RaytuneError, TrainingError
from raytune_ft.spec import JobSpec
from raytune_ft.train.placement import Placement
from raytune_ft.train.progress import record_failure
from raytune_ft.train.run import RunState, name_inputs

_OWN_FAULTS = (TypeError, ValueError, KeyError, NotImplementedError)
"""By none of these does a worker notice that another was lost, as long as it has its process group."""


@dataclass(frozen=True)
class TrainingData:
    """What the workers need of the prepared data."""

    course: Course
    windows: tuple[Window, ...]
    contents: dict[int, Kept]
    """Contents of windows: of all of them where the course is counted, else of those that were surveyed."""
    train_counts: dict[int, int]
    """Training examples of these windows."""
    reader: WindowReader
    counts: DataCounts
    """Of what was surveyed; estimated for the rest."""
    described: dict[str, Any]
    """What the record says of the data: fingerprint, templates, tokens that answers end with."""
    others: OtherTasks | None = None
    """What the job must not forget."""

    @classmethod
    def of(cls, job: JobSpec, data: PreparedData, others: OtherTasks | None) -> Self:
        """Plan the course of a job through its data."""
        course = plan_course(
            data.shapes,
            job.data,
            counted=data.complete,
            sequences_per_step=job.batch.sequences,
            epochs=job.schedule.epochs,
            steps=job.schedule.steps,
        )
        return cls(
            course=course,
            windows=data.windows,
            contents=dict(data.contents),
            train_counts={number: report.counts.train for number, report in data.reports.items()},
            reader=data.reader,
            counts=data.counts,
            described={
                "fingerprint": data.fingerprint,
                "templates": data.templates,
                "end_ids": data.end_ids,
                "task_epochs": course.task_epochs,
                **({"other_tasks": others.described} if others else {}),
            },
            others=others,
        )

    def inputs(self, base: str) -> str:
        """Names what was read, with the base as `base_identity` names it; see `name_inputs`."""
        others = None if self.others is None else self.others.fingerprint
        return name_inputs(self.described["fingerprint"], base, others)


@dataclass(frozen=True)
class Assignment:
    """All that the driver tells the workers."""

    job: JobSpec
    state: RunState
    data: TrainingData
    channel: str
    """Where the workers' events go: another for each launch, so that nobody reads an earlier driver's."""
    placement: Placement
    publish_step: int | None = None
    """Publish the kept checkpoint of this step, and train nothing; None: train."""
    publish_from: str = ""
    """Where it stands in the run's folder."""


@dataclass(frozen=True)
class Outcome:
    """What the driver learns from a run that succeeded."""

    result: dict[str, Any]
    history: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    versions: dict[str, str]
    machine: dict[str, str]
    data_counts: dict[str, Any]
    """Counts of the data as it was read."""
    bad: list[Any]
    """Malformed records, the first of them."""


def train_worker(assignment: Assignment) -> Outcome | RaytuneError | None:
    """Entry for Ray Train; the outcome is the first worker's.

    Ray would retry an exception. So a single worker returns an error as a value. One of several notes it
    where the driver looks, and then does raise, for the others wait for it and only Ray can end them; the
    next attempt finds the note and returns it.
    """
    from raytune_ft.train.worker import run_recipe

    try:
        return run_recipe(assignment)
    except RaytuneError as error:
        return _ended_by(error, assignment)
    except ray.exceptions.RayError:
        # Something was lost beside this worker, such as the node that holds the data: Ray starts anew.
        raise
    except Exception as error:
        if _tells_of_a_loss(error, assignment.job):
            raise
        logging.getLogger(__name__).exception("the worker failed")
        reason = str(error).strip().partition("\n")[0][:300]
        failure = TrainingError(f"the worker failed: {type(error).__name__}: {reason}")
        return _ended_by(failure, assignment)


def _tells_of_a_loss(error: Exception, job: JobSpec) -> bool:
    """Whether the loss of another worker is the likely reason; Ray will hear of that one by itself."""
    if job.cluster.most_workers == 1:
        return False
    from torch import distributed

    # Before it starts anew Ray takes the group away from those that are left, wherever in a step they are.
    return not isinstance(error, _OWN_FAULTS) or not distributed.is_initialized()


def _ended_by(error: RaytuneError, assignment: Assignment) -> RaytuneError:
    if assignment.job.cluster.most_workers == 1:
        return error
    record_failure(assignment.channel, error)
    raise error
