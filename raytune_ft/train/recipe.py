"""What is done with a job, whoever trains it: ask the base, train, ask again, publish."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft.catalog import AdapterRecord, Signer
from raytune_ft.data.counts import Counts
from raytune_ft.data.examples import SCHEMA, decode
from raytune_ft.data.ledger import Ledger
from raytune_ft.data.survey import content_of
from raytune_ft.errors import DataError
from raytune_ft.models import Task, task_of
from raytune_ft.spec import EvaluateSpec, JobSpec
from raytune_ft.spec.scores import OTHER_TASKS, SCORES, TOKEN_LOSS
from raytune_ft.spec.selection import VALIDATION_LOSS
from raytune_ft.train.assess import Assessment, assess, split_loss
from raytune_ft.train.assignment import Assignment, TrainingData
from raytune_ft.train.batch import Layout, Step
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.examples import Examples
from raytune_ft.train.feed import open_feed
from raytune_ft.train.peers import Peers
from raytune_ft.train.publish import move_alias, publish
from raytune_ft.train.schedule import learning_rate
from raytune_ft.train.selection import Selection, choose, decided_by
from raytune_ft.train.steps import Steps, ahead
from raytune_ft.train.workbench import Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLES = 24
_TOLD_BAD_RECORDS = 1000
_NOT_ASSESSED: dict[str, Any] = {"scores": None, "answers": []}


@dataclass(frozen=True)
class Trained:
    """What a job has become, before it is published. It needs neither the model nor the engine any more."""

    position: Position
    after: Assessment | None
    folder: Path
    """Holds the weights, and is written to by publishing."""
    tokenizer: "PreTrainedTokenizerBase"
    task: Task
    peak_memory_bytes: int
    selection: Selection
    """Whose weights these are: of which step, and why."""


class Recipe:
    """One job on its way from a base to a record; on each of its workers there is one."""

    def __init__(self, assignment: Assignment, peers: Peers, tell_phase: Callable[[str], None]) -> None:
        """Take over a job with its data.

        Args:
            assignment: the job.
            peers: the workers that train it.
            tell_phase: hears of what takes long, on the first worker alone.

        Raises:
            DataError: the job depends on what its validation split cannot measure.
        """
        self.job = assignment.job
        self._state = assignment.state
        self._data = assignment.data
        self._peers = peers
        self._tell_phase = tell_phase
        self.ledger = _ledger(self.job, self._data)
        """What is known of the data that was read."""
        # Where weights are divided, one worker alone cannot ask the model anything.
        self._asks = peers.rank == 0 or bool(self.job.cluster.zero_stage)
        self._validation, self._test, self._others = _held_out(self._data if self._asks else None)
        self._publish_step = assignment.publish_step
        names = decided_by(self.job.best_by, self.job.schedule.early_stopping)
        self._validated = tuple(name for name in names if name != VALIDATION_LOSS)
        """Scores of the validation split that the job depends on."""
        if names and self._asks and self._publish_step is None:
            _check_measurable(self.job, self._validation, self._validated)

    @property
    def total_steps(self) -> int:
        """Steps of the job; estimated where neither they are given nor the examples counted."""
        return self._data.course.total_steps

    @property
    def bad_records(self) -> list[dict[str, Any]]:
        """The first malformed records that were met, as plain values."""
        found: list[dict[str, Any]] = self.ledger.to_json()["bad"][:_TOLD_BAD_RECORDS]
        return found

    def begin(self, bench: Workbench, checkpoint: Path | None) -> Position:
        """Assess the base, unless that was done, and go back to where the checkpoint stands.

        Raises:
            Diverged: a score is not finite.
            ModelError: the checkpoint is of another model or method.
        """
        position = bench.position
        how = {**self.job.evaluate.model_dump(mode="json"), "other_tasks": self._other_tasks}
        # The base is compared with what it becomes: both are asked the same, also when the job asks anew.
        if position.before is None or position.before["how"] != how:
            found = self.assess(bench, "evaluate before")
            position = replace(position, before={"how": how, **(asdict(found) if found else _NOT_ASSESSED)})
        if checkpoint:
            bench.engine.load(checkpoint)
            self.ledger.restore(position.data)
        return position

    def assess(self, bench: Workbench, phase: str) -> Assessment | None:
        """Scores on the test split, and those on other tasks beside them; answers of the test split alone.

        Returns:
            None where nothing is to be measured.

        Raises:
            Diverged: a score is not finite.
        """
        tested = bool(self.job.evaluate.metrics and len(self._test))
        if not tested and not len(self._others):
            return None
        if self._peers.rank == 0:
            self._tell_phase(phase)

        def asked(examples: Examples, spec: EvaluateSpec, end_ids: Sequence[int], of: str) -> Assessment:
            return assess(
                bench.model, bench.tokenizer, bench.engine, examples, bench.layout, spec, end_ids, of=of
            )

        own = Assessment({}, [])
        if tested:
            own = asked(self._test, self.job.evaluate, self._data.described["end_ids"], "test split")
        if self._data.others is None:
            return own
        # They were chosen already.
        all_of_them = self.job.evaluate.model_copy(update={"max_examples": len(self._others)})
        other = asked(self._others, all_of_them, self._data.others.end_ids, "other tasks")
        return replace(own, scores=own.scores | {OTHER_TASKS + name: v for name, v in other.scores.items()})

    def validate(self, bench: Workbench) -> Mapping[str, float]:
        """The validation split's mean loss, and the scores that the job depends on, by name.

        Empty without such a split, or where another worker measures it.

        Raises:
            Diverged: a score is not finite, or beside a score the loss.
        """
        if self._validated:
            return self._validation_scores(bench)
        chosen = self._validation.sample(self.job.evaluate.max_examples)
        if not chosen:
            return {}
        return {VALIDATION_LOSS: split_loss(bench.engine, chosen, bench.layout, self.job.batch.sequences)}

    def _validation_scores(self, bench: Workbench) -> Mapping[str, float]:
        if not len(self._validation):
            return {}
        metrics = tuple(metric for metric, names in SCORES.items() if {*names} & {*self._validated})
        spec = self.job.evaluate.model_copy(update={"metrics": metrics})
        found = assess(
            bench.model,
            bench.tokenizer,
            bench.engine,
            self._validation,
            bench.layout,
            spec,
            self._data.described["end_ids"],
            of="validation split",
        ).scores
        return {VALIDATION_LOSS: found[TOKEN_LOSS], **{name: found[name] for name in self._validated}}

    @contextmanager
    def steps(self, layout: Layout, start: int) -> Iterator[Iterator[Step]]:
        """This worker's part of the steps from `start` on; a thread reads ahead while the block lasts."""
        rank, workers = self._peers.rank, self._peers.count
        steps = Steps(self._data.course, open_feed(self._data, rank, workers), self.ledger)
        sources = len(self.job.data.sources)
        with ahead(steps.share_of(rank, workers, start)) as coming:
            yield (Step(layout.batches(step.own), step.examples, step.digest, sources) for step in coming)

    def learning_rate(self, step: int) -> float:
        """Of a step, by its number."""
        return learning_rate(step, self.total_steps, self.job.schedule, self.job.optimizer.learning_rate)

    def finish(
        self,
        bench: Workbench,
        position: Position,
        folder: Path,
        fetch: Callable[[int], AbstractContextManager[Path]],
    ) -> Trained | None:
        """Go back to the step that is published, assess it and write it into `folder`.

        All workers call it together.

        Args:
            bench: of the job, at `position`.
            position: where training ended, or where the checkpoint stands that is published.
            folder: for the weights.
            fetch: gives the folder of a kept checkpoint.

        Returns:
            What the first worker publishes; None on the others.

        Raises:
            Diverged: a score is not finite.
            SpecError: the best step is published, and nothing finite was measured.
            StorageError: the disk fails or is full, or the checkpoint cannot be had.
        """
        selection = self._select(position)
        if selection.step != position.step and self._asks:
            if self._peers.rank == 0:
                self._tell_phase(f"Going back to step {selection.step}, the best of {position.step}")
            with fetch(selection.step) as checkpoint:
                bench.engine.load(checkpoint)
        after = self.assess(bench, "evaluate after")
        bench.write_result(self.job, folder, self._peers.rank)
        if self._peers.rank:
            return None
        memory = bench.engine.peak_memory_bytes()
        return Trained(position, after, folder, bench.tokenizer, task_of(bench.model), memory, selection)

    def _select(self, position: Position) -> Selection:
        if self._publish_step is not None:
            return Selection(position.step, asked_for=True)
        return choose(self.job, position.history, self.total_steps)

    def publish(self, trained: Trained, signer: Signer | None, seconds: float) -> dict[str, Any]:
        """Publish what was trained, once for all retries, and move the alias; the job's result.

        Args:
            trained: by this job.
            signer: who signs the record; None: nobody.
            seconds: that the job took.

        Raises:
            StorageError: the catalog cannot be written; the same call completes it.
        """
        record = publish(
            self.job,
            self._state,
            trained.position,
            {**self._data.described, "counts": self.counts},
            trained.after.scores if trained.after else None,
            trained.folder,
            trained.tokenizer,
            trained.task,
            signer,
            trained.selection,
        )
        return _result(self.job, record, move_alias(self.job, record), trained, seconds)

    @property
    def counts(self) -> dict[str, Any]:
        """Counts of the data: as it was read, or estimated as long as not all of it was."""
        # Empty windows are never read.
        whole = all(
            number in self.ledger.train_counts for number, w in enumerate(self._data.windows) if w.size_bytes
        )
        counts = self._data.counts
        if whole:
            counts = replace(counts, sources=tuple(self.ledger.sources), estimated=False)
        return counts.to_json()

    def samples(self, trained: Trained) -> list[dict[str, Any]]:
        """Prompts of the test split with what the model answered before and after."""
        before, after = trained.position.before, trained.after
        # Without metrics no question was asked.
        if not before or after is None or not self.job.evaluate.metrics:
            return []
        questions = self._test.questions(self.job.evaluate.max_examples)
        return [
            {
                "prompt": trained.tokenizer.decode(question.prompt_ids, skip_special_tokens=True),
                "references": question.references,
                "before": answer_before,
                "after": answer_after,
            }
            for question, answer_before, answer_after in zip(
                questions, before["answers"], after.answers, strict=True
            )
        ][:_SAMPLES]

    @property
    def _other_tasks(self) -> str | None:
        """Fingerprint of the examples of other tasks: with other ones the base is asked anew."""
        return self._data.others.fingerprint if self._data.others else None


def _held_out(data: TrainingData | None) -> tuple[Examples, Examples, Examples]:
    """Validation and test examples of the windows that were surveyed, and the examples of other tasks."""
    contents = [content for _, content in sorted(data.contents.items())] if data else []
    tables = [SCHEMA.empty_table(), *(decode(content_of(content)).table for content in contents)]
    others = data.others.examples if data and data.others else SCHEMA.empty_table()
    return Examples(tables, "validation"), Examples(tables, "test"), Examples([others], "train")


def _check_measurable(job: JobSpec, validation: Examples, scores: Sequence[str]) -> None:
    """Refuse a job that depends on what its validation split cannot measure, before any training.

    Raises:
        DataError: says why.
    """
    if not len(validation):
        raise DataError(
            f"data.split.validation = {job.data.split.validation:g} holds out no example, and "
            "checkpoint.keep_best and schedule.early_stopping need some; raise it, or give more data"
        )
    if scores and not validation.questions(job.evaluate.max_examples):
        raise DataError(
            f"{scores[0]} cannot be measured on the validation split: none of its examples has a prompt and "
            "a reference; use validation_loss instead"
        )


def _ledger(job: JobSpec, data: TrainingData) -> Ledger:
    counted = data.course.counted
    return Ledger(
        sources=list(data.counts.sources) if counted else [Counts() for _ in job.data.sources],
        records=data.counts.total.records,
        max_bad_fraction=job.data.max_bad_fraction,
        train_counts=dict(data.train_counts) if counted else {},
    )


def _result(
    job: JobSpec, record: AdapterRecord, gate: dict[str, Any] | None, trained: Trained, seconds: float
) -> dict[str, Any]:
    position = trained.position
    training_seconds = sum(entry["seconds"] for entry in position.history)
    return {
        "adapter": record.adapter,
        "version": record.version,
        "uri": record.uri(job.publish.catalog),
        **record.selection,
        "loss": record.loss,
        "scores_before": record.scores_before,
        "scores_after": record.scores_after,
        "tokens_per_second": record.tokens / training_seconds if training_seconds else 0.0,
        "peak_memory_bytes": trained.peak_memory_bytes,
        "seconds": seconds,
        **({} if record.forgetting is None else {"forgetting": record.forgetting}),
        **({} if gate is None else {"gate": gate}),
    }
