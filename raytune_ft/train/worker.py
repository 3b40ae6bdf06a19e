"""The worker: one recipe, from a base to a published adapter. Runs inside a Ray Train worker."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
import ray.train
import torch

from raytune_ft.data.order import Course, plan_course
from raytune_ft.methods import METHODS
from raytune_ft.models import base_digest, load_base, load_tokenizer, model_folder, read_facts
from raytune_ft.planner import Choice, choose
from raytune_ft.spec import JobSpec
from raytune_ft.train.assess import Assessment, assess, split_loss
from raytune_ft.train.assignment import Assignment, Outcome
from raytune_ft.train.bank import BankEngine
from raytune_ft.train.batch import Layout
from raytune_ft.train.checkpoint import Position, read_position, write_checkpoint
from raytune_ft.train.engine import Engine
from raytune_ft.train.examples import Examples
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.probe import check_isolation
from raytune_ft.train.progress import EventWriter
from raytune_ft.train.publish import library_versions, machine, publish
from raytune_ft.train.schedule import learning_rate

_EVENT_INTERVAL_S = 0.2
_SAMPLES = 24


def run_recipe(assignment: Assignment) -> Outcome:
    """Load, assess, train, assess, publish."""
    began = time.perf_counter()
    job = assignment.job
    events = EventWriter(assignment.state.attempt)
    table = pa.concat_tables(ray.get(assignment.tables))
    train, validation, test = (Examples(table, split) for split in ("train", "validation", "test"))
    course = plan_course(
        train.mixture([source.weight for source in job.data.sources]),
        seed=job.data.seed,
        sequences_per_step=job.batch.sequences,
        epochs=job.schedule.epochs,
        steps=job.schedule.steps,
    )

    events.write({"phase": "load"})
    device = _device(assignment.use_gpu)
    folder = model_folder(job.model.path)
    tokenizer = load_tokenizer(job.model)
    with _latest_checkpoint() as checkpoint:
        position = _position(assignment, checkpoint, folder, device)
        _compute_alike(position.threads, device)
        dequantised = position.choice.resident == "dequantised"
        model = load_base(job.model, device=device, dequantised=dequantised)
        check_isolation(model, packed=job.data.packing)
        parameters = METHODS[type(job.method)].add(model, job.method, job.data.seed)
        engine = BankEngine(
            model, parameters, job.optimizer, gradient_checkpointing=job.model.gradient_checkpointing
        )
        if checkpoint:
            engine.load(checkpoint)
    layout = _layout(job, position.choice, int(tokenizer.pad_token_id))

    def test_now(phase: str) -> Assessment | None:
        if not job.evaluate.metrics or not len(test):
            return None
        events.write({"phase": phase})
        return assess(model, tokenizer, engine, test, layout, job.evaluate, assignment.end_ids)

    def validate() -> float | None:
        chosen = validation.first(job.evaluate.max_examples)
        return split_loss(engine, chosen, layout, job.batch.sequences) if chosen else None

    if position.step == 0:
        before = test_now("evaluate before")
        position = replace(position, before=asdict(before) if before else None)
    events.write(
        {"phase": "train", "step": position.step, "steps": course.total_steps, "history": position.history}
    )
    recorder = Recorder(engine, position, course, job.checkpoint.every_steps, events, validate)
    fit(
        engine,
        (layout.batches([train[number] for number in numbers]) for numbers in course.steps(position.step)),
        start=position.step,
        learning_rate=lambda step: learning_rate(
            step, course.total_steps, job.schedule, job.optimizer.learning_rate
        ),
        report=recorder,
    )
    position = recorder.position
    after = test_now("evaluate after")
    events.write({"phase": "publish"})
    scores_after = after.scores if after else None
    record = publish(job, assignment.state, position, assignment.data, scores_after, model, tokenizer)
    seconds = sum(entry["seconds"] for entry in position.history)
    result = {
        "adapter": record.adapter,
        "version": record.version,
        "uri": record.uri(job.publish.catalog),
        "steps": position.step,
        "loss": record.loss,
        "scores_before": record.scores_before,
        "scores_after": record.scores_after,
        "tokens_per_second": record.tokens / seconds if seconds else 0.0,
        "peak_memory_bytes": engine.peak_memory_bytes(),
        "seconds": time.perf_counter() - began,
    }
    samples = _samples(job, test, tokenizer, position.before, after)
    return Outcome(result, position.history, samples, library_versions(), machine())


class Recorder:
    """Turns the reports of steps into events for the driver and checkpoints for Ray Train."""

    def __init__(
        self,
        engine: Engine,
        position: Position,
        course: Course,
        every_steps: int,
        events: EventWriter,
        validate: Callable[[], float | None],
    ) -> None:
        self._position = position
        self._history = list(position.history)
        self._engine = engine
        self._total_steps = course.total_steps
        self._every_steps = every_steps
        self._events = events
        self._validate = validate
        self._unsent: list[dict[str, Any]] = []
        self._sent_at = 0.0

    def __call__(self, report: StepReport) -> None:
        """Record one step; every so often, and after the last, keep a checkpoint."""
        last = report.step == self._total_steps
        due = last or report.step % self._every_steps == 0
        entry: dict[str, Any] = asdict(report)
        if due and (loss := self._validate()) is not None:
            entry["validation_loss"] = loss
        self._unsent.append(entry)
        self._history.append(entry)
        if due:
            self._checkpoint()
        if last or time.monotonic() - self._sent_at > _EVENT_INTERVAL_S:
            self._send()

    @property
    def position(self) -> Position:
        """Where the run stands now."""
        return replace(self._position, step=len(self._history), history=self._history)

    def _send(self) -> None:
        memory = self._engine.peak_memory_bytes()
        event = {
            "phase": "train",
            "steps": self._total_steps,
            "memory_bytes": memory,
            "history": self._unsent,
        }
        self._events.write(event)
        self._unsent = []
        self._sent_at = time.monotonic()

    def _checkpoint(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(Path(name), self._engine, self.position)
            ray.train.report(
                {"step": len(self._history)}, checkpoint=ray.train.Checkpoint.from_directory(name)
            )


@contextmanager
def _latest_checkpoint() -> Iterator[Path | None]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)


def _position(
    assignment: Assignment, checkpoint: Path | None, folder: Path, device: torch.device
) -> Position:
    fingerprint, digest = assignment.state.data_fingerprint, base_digest(folder)
    if checkpoint:
        return read_position(checkpoint, data_fingerprint=fingerprint, base_digest=digest)
    choice = choose(assignment.job, read_facts(folder), _memory_bytes(device))
    return Position(
        step=0, data_fingerprint=fingerprint, base_digest=digest, choice=choice, threads=assignment.threads
    )


def _device(use_gpu: bool) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


def _memory_bytes(device: torch.device) -> int:
    """All memory of the device, not what is free now: a choice must not depend on the neighbours."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _compute_alike(threads: int, device: torch.device) -> None:
    """Make the same work give the same bits."""
    torch.set_num_threads(threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)


def _layout(job: JobSpec, choice: Choice, pad_token_id: int) -> Layout:
    given = job.batch.sequences_per_worker
    return Layout(
        packing=job.data.packing,
        max_tokens=job.data.max_tokens,
        pad_token_id=pad_token_id,
        sequences_per_forward=None if given == "auto" else given,
        tokens_per_forward=choice.tokens_per_forward,
    )


def _samples(
    job: JobSpec, test: Examples, tokenizer: Any, before: dict[str, Any] | None, after: Assessment | None
) -> list[dict[str, Any]]:
    if before is None or after is None:
        return []
    questions = test.questions(min(_SAMPLES, job.evaluate.max_examples))
    return [
        {
            "prompt": tokenizer.decode(question.prompt_ids, skip_special_tokens=True),
            "references": question.references,
            "before": answer_before,
            "after": answer_after,
        }
        for question, answer_before, answer_after in zip(
            questions, before["answers"], after.answers, strict=False
        )
    ]
