"""The worker of a job: one recipe, from a base to a published adapter. Runs inside a Ray Train worker."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray.train

from raytune_ft.errors import DataError, RaytuneError
from raytune_ft.provenance import library_versions, machine
from raytune_ft.train.assignment import Assignment, Outcome
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.lease import check_holds
from raytune_ft.train.loop import fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.progress import EventWriter, record_failure, recorded_failure
from raytune_ft.train.publish import signer_of
from raytune_ft.train.recipe import Recipe
from raytune_ft.train.recorder import Recorder
from raytune_ft.train.run import Run
from raytune_ft.train.selection import check_best
from raytune_ft.train.uploads import Uploads
from raytune_ft.train.workbench import Workbench, set_up


def run_recipe(assignment: Assignment) -> Outcome | RaytuneError | None:
    """Load, assess, train, assess, publish. The first worker does what is done once.

    Returns:
        The first worker's outcome, or what ended an earlier attempt of this launch for good.
    """
    if failure := recorded_failure(assignment.channel):
        return failure
    began = time.perf_counter()
    job = assignment.job
    peers = Peers.current()
    events = EventWriter(assignment.channel)
    first = peers.rank == 0
    # Before any work: the key is in the environment of this node, which the driver cannot see.
    signer = signer_of(job) if first else None
    recipe = Recipe(assignment, peers, lambda phase: events.write({"phase": phase}))
    if first:
        events.write({"phase": "load"})
    uploads = _uploads(assignment, peers)
    with _checkpoint(assignment) as checkpoint:
        bench = set_up(assignment, checkpoint, peers)
        if assignment.publish_step is None:
            check_best(bench.position.history, job.best_by, uploads.kept)
        position = recipe.begin(bench, checkpoint)
    if assignment.publish_step is None:
        position = _train(assignment, recipe, bench, position, events, peers, uploads)
    with tempfile.TemporaryDirectory() as folder:
        trained = recipe.finish(bench, position, Path(folder), uploads.fetch)
        if trained is None:
            return None
        events.write({"phase": "publish"})
        check_holds(Run(job).storage, assignment.channel)
        result = recipe.publish(trained, signer, time.perf_counter() - began)
    return Outcome(
        result,
        position.history,
        recipe.samples(trained),
        library_versions(),
        machine(),
        recipe.counts,
        list(recipe.ledger.bad),
    )


def _train(
    assignment: Assignment,
    recipe: Recipe,
    bench: Workbench,
    position: Position,
    events: EventWriter,
    peers: Peers,
    uploads: Uploads,
) -> Position:
    """The steps from `position` to the end of the course; where that is."""
    total, job = recipe.total_steps, assignment.job
    if peers.rank == 0:
        events.write({"phase": "train", "step": position.step, "steps": total, "history": position.history})
    recorder = Recorder(
        bench.engine,
        position,
        total,
        job.checkpoint.every_steps,
        events,
        lambda: recipe.validate(bench),
        peers,
        recipe.ledger.to_json,
        uploads,
        best_by=job.best_by,
        stopping=job.schedule.early_stopping,
    )
    with _told(recipe, events, peers), recipe.steps(bench.layout, position.step) as steps:
        fit(
            bench.engine,
            recorder.until_stopped(steps),
            start=position.step,
            learning_rate=recipe.learning_rate,
            report=recorder,
            peers=peers,
        )
    return recorder.finish()


def _uploads(assignment: Assignment, peers: Peers) -> Uploads:
    run, channel = Run(assignment.job), assignment.channel
    return Uploads(
        run.storage,
        peers.rank,
        may_write=lambda: check_holds(run.storage, channel),
        on_failure=lambda error: record_failure(channel, error),
    )


@contextmanager
def _told(recipe: Recipe, events: EventWriter, peers: Peers) -> Iterator[None]:
    """Where the data ends the run, tell the driver which records were malformed."""
    try:
        yield
    except DataError:
        if peers.rank == 0:
            events.write({"bad": recipe.bad_records})
        raise


@contextmanager
def _checkpoint(assignment: Assignment) -> Iterator[Path | None]:
    """The checkpoint to go on from, or the one that is published."""
    if assignment.publish_step is not None:
        with tempfile.TemporaryDirectory() as folder:
            Run(assignment.job).fetch(assignment.publish_from, Path(folder))
            yield Path(folder)
        return
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)
