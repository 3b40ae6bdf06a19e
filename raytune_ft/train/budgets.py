"""What a run survives, and what it says when it is too much."""

import re

from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from raytune_ft.errors import RaytuneError, StorageError, TrainingError
from raytune_ft.spec import JobSpec
from raytune_ft.storage import arrow_filesystem
from raytune_ft.train.run import Run
from raytune_ft.train.selection import higher_is_better

_CREDENTIALS = re.compile(r"//[^\s\"']*@")


def run_config(job: JobSpec, run: Run) -> RunConfig:
    """Where Ray Train keeps the run, which checkpoints stay, and how many losses it survives."""
    filesystem, path = arrow_filesystem(run.parent_uri)
    preemptions = job.cluster.max_preemptions
    return RunConfig(
        name=run.id,
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(
            max_failures=job.cluster.max_restarts,
            max_preemption_failures=-1 if preemptions is None else preemptions,
        ),
        checkpoint_config=CheckpointConfig(
            num_to_keep=job.checkpoint.keep,
            checkpoint_score_attribute=job.best_by,
            checkpoint_score_order="max" if job.best_by and higher_is_better(job.best_by) else "min",
        ),
    )


def lost(job: JobSpec, error: BaseException) -> RaytuneError:
    """Why the run does not survive `error`, by which Ray Train ended it."""
    if _is_preemption(error):
        return TrainingError(
            f"nodes of the run were taken away more than cluster.max_preemptions = "
            f"{job.cluster.max_preemptions} times; the same command goes on from the last checkpoint"
        )
    if isinstance(error, WorkerGroupError):
        return TrainingError(
            f"the worker was lost more than cluster.max_restarts = {job.cluster.max_restarts} times; "
            f"the last time: {cause(error)}; the same command goes on from the last checkpoint"
        )
    failure = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(failure, RaytuneError):
        return failure
    of_store = isinstance(failure, OSError) or type(failure).__module__.startswith("botocore")
    kind = StorageError if of_store else TrainingError
    return kind(
        f"Ray Train could not go on: {cause(failure)}; the same command goes on from the last checkpoint"
    )


def _is_preemption(error: BaseException) -> bool:
    """By which budget Ray counts: workers that fail for want of one that was taken away do not matter."""
    if isinstance(error, WorkerGroupError):
        return any(getattr(failure, "preempted", False) for failure in error.worker_failures.values())
    return isinstance(error, PreemptionError)


def cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()]
    said = lines[-1].strip()[:300] if lines else type(error).__name__
    # What a library of a store says may hold an endpoint, and that a password.
    return _CREDENTIALS.sub("//", said)
