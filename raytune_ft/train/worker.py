"""The worker: one recipe, from a base to a published adapter. Runs inside a Ray Train worker."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.train

from raytune_ft.catalog import AdapterRecord
from raytune_ft.data.counts import Counts
from raytune_ft.data.examples import SCHEMA, decode
from raytune_ft.data.ledger import Ledger
from raytune_ft.errors import DataError, RaytuneError
from raytune_ft.models import task_of
from raytune_ft.provenance import library_versions, machine
from raytune_ft.spec import EvaluateSpec, JobSpec
from raytune_ft.spec.job import OTHER_TASKS
from raytune_ft.train.assess import Assessment, assess, split_loss
from raytune_ft.train.assignment import Assignment, Outcome, TrainingData
from raytune_ft.train.batch import Step
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.examples import Examples
from raytune_ft.train.feed import open_feed
from raytune_ft.train.lease import check_holds
from raytune_ft.train.loop import fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.progress import EventWriter, record_failure, recorded_failure
from raytune_ft.train.publish import move_alias, publish, signer_of
from raytune_ft.train.recorder import Recorder
from raytune_ft.train.run import Run
from raytune_ft.train.schedule import learning_rate
from raytune_ft.train.steps import Steps, ahead
from raytune_ft.train.uploads import Uploads
from raytune_ft.train.workbench import Workbench, set_up

_SAMPLES = 24
_TOLD_BAD_RECORDS = 1000
_NOT_ASSESSED: dict[str, Any] = {"scores": None, "answers": []}


def run_recipe(assignment: Assignment) -> Outcome | RaytuneError | None:
    """Load, assess, train, assess, publish. The first worker does what is done once.

    Returns:
        The first worker's outcome, or what ended an earlier attempt of this launch for good.
    """
    if failure := recorded_failure(assignment.channel):
        return failure
    began = time.perf_counter()
    job, data = assignment.job, assignment.data
    peers = Peers.current()
    events = EventWriter(assignment.channel)
    ledger = _ledger(job, data)
    first = peers.rank == 0
    # Before any work: the key is in the environment of this node, which the driver cannot see.
    signer = signer_of(job) if first else None
    # Where weights are divided, one worker alone cannot ask the model anything.
    validation, test, others = _held_out(data if first or job.cluster.zero_stage else None)
    if first:
        events.write({"phase": "load"})

    def test_now(phase: str) -> Assessment | None:
        tested = bool(job.evaluate.metrics and len(test))
        if not tested and not len(others):
            return None
        if first:
            events.write({"phase": phase})
        return _assess(job, data, bench, test if tested else None, others)

    with _latest_checkpoint() as checkpoint:
        bench = set_up(assignment, checkpoint, peers)
        position = bench.position
        how = {**job.evaluate.model_dump(mode="json"), "other_tasks": _fingerprint(data)}
        # The base is compared with what it becomes: both are asked the same, also when the job asks anew.
        if position.before is None or position.before["how"] != how:
            found = test_now("evaluate before")
            position = replace(position, before={"how": how, **(asdict(found) if found else _NOT_ASSESSED)})
        if checkpoint:
            bench.engine.load(checkpoint)
            ledger.restore(position.data)
    steps = Steps(data.course, open_feed(data, peers.rank, peers.count), ledger)
    position = _train(assignment, bench, position, steps, ledger, validation, events, peers)
    after = test_now("evaluate after")
    if first:
        events.write({"phase": "publish"})
        check_holds(Run(job).storage, assignment.channel)
    # Empty windows are never read.
    whole = all(number in ledger.train_counts for number, w in enumerate(data.windows) if w.size_bytes)
    counts = (
        replace(data.counts, sources=tuple(ledger.sources), estimated=False) if whole else data.counts
    ).to_json()
    with tempfile.TemporaryDirectory() as folder:
        bench.write_result(job, Path(folder), peers.rank)
        if not first:
            return None
        record = publish(
            job,
            assignment.state,
            position,
            {**data.described, "counts": counts},
            after.scores if after else None,
            Path(folder),
            bench.tokenizer,
            task_of(bench.model),
            signer,
        )
    gate = move_alias(job, record)
    result = _result(
        job, record, gate, position, bench.engine.peak_memory_bytes(), time.perf_counter() - began
    )
    samples = _samples(job, test, bench.tokenizer, position.before, after)
    return Outcome(result, position.history, samples, library_versions(), machine(), counts, list(ledger.bad))


def _held_out(data: TrainingData | None) -> tuple[Examples, Examples, Examples]:
    """Validation and test examples of the windows that were surveyed, and the examples of other tasks."""
    contents = [content for _, content in sorted(data.contents.items())] if data else []
    tables = [SCHEMA.empty_table(), *(decode(ray.get(content)).table for content in contents)]
    others = data.others.examples if data and data.others else SCHEMA.empty_table()
    return Examples(tables, "validation"), Examples(tables, "test"), Examples([others], "train")


def _fingerprint(data: TrainingData) -> str | None:
    """Of the examples of other tasks: with other ones, the base is asked anew, and another version made."""
    return data.others.fingerprint if data.others else None


def _assess(
    job: JobSpec, data: TrainingData, bench: Workbench, test: Examples | None, others: Examples
) -> Assessment:
    """Scores on the test split, and those on other tasks beside them; answers of the test split alone."""

    def asked(examples: Examples, spec: EvaluateSpec, end_ids: Sequence[int], of: str) -> Assessment:
        return assess(
            bench.model, bench.tokenizer, bench.engine, examples, bench.layout, spec, end_ids, of=of
        )

    own = Assessment({}, [])
    if test is not None:
        own = asked(test, job.evaluate, data.described["end_ids"], "test split")
    if data.others is None:
        return own
    # They were chosen already.
    all_of_them = job.evaluate.model_copy(update={"max_examples": len(others)})
    other = asked(others, all_of_them, data.others.end_ids, "other tasks")
    return replace(own, scores=own.scores | {OTHER_TASKS + name: v for name, v in other.scores.items()})


def _ledger(job: JobSpec, data: TrainingData) -> Ledger:
    counted = data.course.counted
    return Ledger(
        sources=list(data.counts.sources) if counted else [Counts() for _ in job.data.sources],
        records=data.counts.total.records,
        max_bad_fraction=job.data.max_bad_fraction,
        train_counts=dict(data.train_counts) if counted else {},
    )


def _uploads(assignment: Assignment, peers: Peers) -> Uploads:
    run, channel = Run(assignment.job), assignment.channel
    return Uploads(
        run.storage,
        peers.rank,
        may_write=lambda: check_holds(run.storage, channel),
        on_failure=lambda error: record_failure(channel, error),
    )


def _train(
    assignment: Assignment,
    bench: Workbench,
    position: Position,
    steps: Steps,
    ledger: Ledger,
    validation: Examples,
    events: EventWriter,
    peers: Peers,
) -> Position:
    """The steps from `position` to the end of the course; where that is."""
    job = assignment.job

    def validate() -> float | None:
        chosen = validation.sample(job.evaluate.max_examples)
        return split_loss(bench.engine, chosen, bench.layout, job.batch.sequences) if chosen else None

    total = steps.total
    if peers.rank == 0:
        events.write({"phase": "train", "step": position.step, "steps": total, "history": position.history})
    recorder = Recorder(
        bench.engine,
        position,
        total,
        job.checkpoint.every_steps,
        events,
        validate,
        peers,
        ledger.to_json,
        _uploads(assignment, peers),
    )
    with (
        _told(ledger, events, peers),
        ahead(steps.share_of(peers.rank, peers.count, position.step)) as coming,
    ):
        fit(
            bench.engine,
            (
                Step(bench.layout.batches(step.own), step.examples, step.digest, len(job.data.sources))
                for step in coming
            ),
            start=position.step,
            learning_rate=lambda step: learning_rate(step, total, job.schedule, job.optimizer.learning_rate),
            report=recorder,
            peers=peers,
        )
    return recorder.finish()


@contextmanager
def _told(ledger: Ledger, events: EventWriter, peers: Peers) -> Iterator[None]:
    """Where the data ends the run, tell the driver which records were malformed."""
    try:
        yield
    except DataError:
        if peers.rank == 0:
            events.write({"bad": ledger.to_json()["bad"][:_TOLD_BAD_RECORDS]})
        raise


def _result(
    job: JobSpec,
    record: AdapterRecord,
    gate: dict[str, Any] | None,
    position: Position,
    peak_memory_bytes: int,
    seconds: float,
) -> dict[str, Any]:
    training_seconds = sum(entry["seconds"] for entry in position.history)
    return {
        "adapter": record.adapter,
        "version": record.version,
        "uri": record.uri(job.publish.catalog),
        "steps": position.step,
        "loss": record.loss,
        "scores_before": record.scores_before,
        "scores_after": record.scores_after,
        "tokens_per_second": record.tokens / training_seconds if training_seconds else 0.0,
        "peak_memory_bytes": peak_memory_bytes,
        "seconds": seconds,
        **({} if record.forgetting is None else {"forgetting": record.forgetting}),
        **({} if gate is None else {"gate": gate}),
    }


@contextmanager
def _latest_checkpoint() -> Iterator[Path | None]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)


def _samples(
    job: JobSpec, test: Examples, tokenizer: Any, before: dict[str, Any] | None, after: Assessment | None
) -> list[dict[str, Any]]:
    # Without metrics no question was asked.
    if not before or after is None or not job.evaluate.metrics:
        return []
    questions = test.questions(job.evaluate.max_examples)
    return [
        {
            "prompt": tokenizer.decode(question.prompt_ids, skip_special_tokens=True),
            "references": question.references,
            "before": answer_before,
            "after": answer_after,
        }
        for question, answer_before, answer_after in zip(
            questions, before["answers"], after.answers, strict=True
        )
    ][:_SAMPLES]
