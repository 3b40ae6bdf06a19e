"""The worker: one recipe, from a base to a published adapter. Runs inside a Ray Train worker."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train

from raytune_ft.catalog import AdapterRecord
from raytune_ft.data.order import Course, plan_course
from raytune_ft.spec import JobSpec
from raytune_ft.train.assess import Assessment, assess, split_loss
from raytune_ft.train.assignment import Assignment, Outcome
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.examples import Examples
from raytune_ft.train.loop import fit
from raytune_ft.train.progress import EventWriter
from raytune_ft.train.publish import library_versions, machine, publish
from raytune_ft.train.recorder import Recorder
from raytune_ft.train.schedule import learning_rate
from raytune_ft.train.workbench import Workbench, set_up

_SAMPLES = 24
_NOT_ASSESSED: dict[str, Any] = {"scores": None, "answers": []}


def run_recipe(assignment: Assignment) -> Outcome:
    """Load, assess, train, assess, publish."""
    began = time.perf_counter()
    job = assignment.job
    events = EventWriter(assignment.channel)
    table = pa.concat_tables(ray.get(assignment.tables))
    train, validation, test = (Examples(table, split) for split in ("train", "validation", "test"))
    course = _course(job, train)
    events.write({"phase": "load"})

    def test_now(phase: str) -> Assessment | None:
        if not job.evaluate.metrics or not len(test):
            return None
        events.write({"phase": phase})
        return assess(
            bench.model, bench.tokenizer, bench.engine, test, bench.layout, job.evaluate, assignment.end_ids
        )

    with _latest_checkpoint() as checkpoint:
        bench = set_up(assignment, checkpoint)
        position = bench.position
        how = job.evaluate.model_dump(mode="json")
        # The base is compared with what it becomes: both are asked the same, also when the job asks anew.
        if position.before is None or position.before["how"] != how:
            found = test_now("evaluate before")
            position = replace(position, before={"how": how, **(asdict(found) if found else _NOT_ASSESSED)})
        if checkpoint:
            bench.engine.load(checkpoint)
    position = _train(job, bench, position, course, train, validation, events)
    after = test_now("evaluate after")
    events.write({"phase": "publish"})
    record = publish(
        job,
        assignment.state,
        position,
        assignment.data,
        after.scores if after else None,
        bench.model,
        bench.tokenizer,
    )
    result = _result(job, record, position, bench.engine.peak_memory_bytes(), time.perf_counter() - began)
    samples = _samples(job, test, bench.tokenizer, position.before, after)
    return Outcome(result, position.history, samples, library_versions(), machine())


def _course(job: JobSpec, train: Examples) -> Course:
    return plan_course(
        train.mixture([source.weight for source in job.data.sources]),
        seed=job.data.seed,
        sequences_per_step=job.batch.sequences,
        epochs=job.schedule.epochs,
        steps=job.schedule.steps,
    )


def _train(
    job: JobSpec,
    bench: Workbench,
    position: Position,
    course: Course,
    train: Examples,
    validation: Examples,
    events: EventWriter,
) -> Position:
    """The steps from `position` to the end of the course; where that is."""

    def validate() -> float | None:
        chosen = validation.sample(job.evaluate.max_examples)
        return split_loss(bench.engine, chosen, bench.layout, job.batch.sequences) if chosen else None

    total = course.total_steps
    events.write({"phase": "train", "step": position.step, "steps": total, "history": position.history})
    recorder = Recorder(bench.engine, position, total, job.checkpoint.every_steps, events, validate)
    fit(
        bench.engine,
        (
            bench.layout.batches([train[number] for number in numbers])
            for numbers in course.steps(position.step)
        ),
        start=position.step,
        learning_rate=lambda step: learning_rate(step, total, job.schedule, job.optimizer.learning_rate),
        report=recorder,
    )
    return recorder.position


def _result(
    job: JobSpec, record: AdapterRecord, position: Position, peak_memory_bytes: int, seconds: float
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
    if not before or after is None:
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
