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
from raytune_ft.train.assess import Asked, Assessment, ask, assess, split_loss
from raytune_ft.train.assignment import Assignment, TrainingData
from raytune_ft.train.batch import Layout, Step
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.examples import Examples
from raytune_ft.train.feed import open_feed
from raytune_ft.train.peers import Peers
from raytune_ft.train.publish import Measured, move_alias, publish, write_beside_weights
from raytune_ft.train.schedule import learning_rate
from raytune_ft.train.selection import Selection, choose, decided_by
from raytune_ft.train.steps import Steps, ahead
from raytune_ft.train.workbench import Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLES = 24
_TOLD_BAD_RECORDS = 1000
_NOT_ASSESSED: dict[str, Any] = {"scores": None, "answers": [], "examples": {}}
_TEST, _OTHERS = "test split", "other tasks"
"""What is asked about, in messages and in the record."""


@dataclass(frozen=True)
class Trained:
    """What a job has become, before it is published. It needs neither the model nor the engine any more."""

    position: Position
    after: Assessment | None
    asked: Mapping[str, Asked]
    """What was asked before and after, by what it is about."""
    notices: tuple[str, ...]
    """What the scores do not tell by themselves."""
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
        asked = self._asked(bench)
        for notice in self._notices(asked) if self._peers.rank == 0 else ():
            self._tell_phase(notice)
        how = {
            **self.job.evaluate.model_dump(mode="json"),
            # What `auto` became; and none of an earlier version, which compared with other references.
            "max_new_tokens": {of: each.max_new_tokens for of, each in asked.items()},
            "other_tasks": self._other_tasks,
        }
        # The base is compared with what it becomes: both are asked the same, also when the job asks anew.
        if position.before is None or position.before["how"] != how:
            found = self.assess(bench, asked, "evaluate before")
            position = replace(position, before={"how": how, **(asdict(found) if found else _NOT_ASSESSED)})
        if checkpoint:
            bench.engine.load(checkpoint)
            self.ledger.restore(position.data)
        return position

    def assess(self, bench: Workbench, asked: Mapping[str, Asked], phase: str) -> Assessment | None:
        """Scores on the test split, and those on other tasks beside them; answers of the test split alone.

        Returns:
            None where nothing is to be measured.

        Raises:
            Diverged: a score is not finite.
        """
        if not asked:
            return None
        if self._peers.rank == 0:
            self._tell_phase(phase)
        found = {
            of: assess(
                bench.model,
                bench.tokenizer,
                bench.engine,
                self._examples(of),
                each,
                bench.layout,
                self._how_asked(of),
                self._end_ids(of),
                of=of,
            )
            for of, each in asked.items()
        }
        own = found.get(_TEST) or Assessment({}, [], {})
        other = found.get(_OTHERS) or Assessment({}, [], {})
        return replace(
            own,
            scores=own.scores | {OTHER_TASKS + name: value for name, value in other.scores.items()},
            examples=own.examples | {OTHER_TASKS + name: count for name, count in other.examples.items()},
        )

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
        end_ids = self._data.described["end_ids"]
        asked = ask(self._validation, spec, bench.model, bench.tokenizer, end_ids)
        found = assess(
            bench.model,
            bench.tokenizer,
            bench.engine,
            self._validation,
            asked,
            bench.layout,
            spec,
            end_ids,
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
        asked = self._asked(bench)
        after = self.assess(bench, asked, "evaluate after")
        bench.write_result(self.job, folder, self._peers.rank)
        if self._peers.rank:
            return None
        write_beside_weights(self.job, folder, bench.model, bench.tokenizer, self._data.described["end_ids"])
        return Trained(
            position,
            after,
            asked,
            self._notices(asked),
            folder,
            bench.tokenizer,
            task_of(bench.model),
            bench.engine.peak_memory_bytes(),
            selection,
        )

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
            _measured(trained),
            trained.folder,
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
        if not before or after is None or _TEST not in trained.asked:
            return []
        return [
            {
                "prompt": trained.tokenizer.decode(question.prompt_ids, skip_special_tokens=True),
                "references": question.references,
                "before": answer_before,
                "after": answer_after,
            }
            for question, answer_before, answer_after in zip(
                trained.asked[_TEST].questions, before["answers"], after.answers, strict=True
            )
        ][:_SAMPLES]

    def _asked(self, bench: Workbench) -> dict[str, Asked]:
        """What the model is asked, by what it is about; nothing that has no example, or is not measured."""
        measured = {
            _TEST: bool(self.job.evaluate.metrics and len(self._test)),
            _OTHERS: len(self._others) > 0,
        }
        return {
            of: ask(self._examples(of), self._how_asked(of), bench.model, bench.tokenizer, self._end_ids(of))
            for of, is_measured in measured.items()
            if is_measured
        }

    def _examples(self, of: str) -> Examples:
        return self._test if of == _TEST else self._others

    def _how_asked(self, of: str) -> EvaluateSpec:
        evaluate = self.job.evaluate
        # Those of other tasks were chosen already.
        return evaluate if of == _TEST else evaluate.model_copy(update={"max_examples": len(self._others)})

    def _end_ids(self, of: str) -> Sequence[int]:
        others = self._data.others
        found: Sequence[int] = self._data.described["end_ids"]
        return others.end_ids if of == _OTHERS and others else found

    def _notices(self, asked: Mapping[str, Asked]) -> tuple[str, ...]:
        found = (each.notice(self.job.evaluate, of) for of, each in asked.items())
        return tuple(notice for notice in found if notice)

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


def _measured(trained: Trained) -> Measured | None:
    if trained.after is None:
        return None
    return Measured(
        scores=trained.after.scores,
        examples=trained.after.examples,
        max_new_tokens={of: each.max_new_tokens for of, each in trained.asked.items() if each.max_new_tokens},
        notices=trained.notices,
    )


def _result(
    job: JobSpec, record: AdapterRecord, gate: dict[str, Any] | None, trained: Trained, seconds: float
) -> dict[str, Any]:
    position = trained.position
    training_seconds = sum(entry["seconds"] for entry in position.history)
    notices = [*record.data["counts"]["notices"], *record.notices]
    return {
        "adapter": record.adapter,
        "version": record.version,
        "uri": record.uri(job.publish.catalog),
        **record.selection,
        "loss": record.loss,
        "scores_before": record.scores_before,
        "scores_after": record.scores_after,
        **({} if record.scored_examples is None else {"scored_examples": record.scored_examples}),
        **({} if record.max_new_tokens is None else {"max_new_tokens": record.max_new_tokens}),
        **({"notices": notices} if notices else {}),
        "tokens_per_second": record.tokens / training_seconds if training_seconds else 0.0,
        "peak_memory_bytes": trained.peak_memory_bytes,
        "seconds": seconds,
        **({} if record.forgetting is None else {"forgetting": record.forgetting}),
        **({} if gate is None else {"gate": gate}),
    }
