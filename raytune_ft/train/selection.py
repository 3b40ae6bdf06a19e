"""Which step is published, and whether training stops early: pure functions of the history of a run.

The history is the one that checkpoints hold, so a run that goes on decides as one that nobody disturbed. Of
equal values the earlier step is the better one; a value that is not finite is never the best.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.errors import SpecError
from raytune_ft.evaluate.scores import scale_of
from raytune_ft.spec import EarlyStoppingSpec, JobSpec
from raytune_ft.spec.selection import VALIDATION_LOSS

SCORES = "validation_scores"
"""Where an entry of the history has the scores of the validation split, by name."""
_MOST_NAMED = 20

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Best:
    """The best value of a metric so far."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class EarlyStop:
    """Why a run stopped before its last step."""

    step: int
    """Steps done when it stopped."""
    metric: str
    patience: int
    """Validations in a row without an improvement, the one at `step` the last of them."""
    best_value: float
    """What none of them improved on."""
    best_step: int


@dataclass(frozen=True)
class Selection:
    """The step that is published."""

    step: int
    best: Best | None = None
    """What it is the best by; None: it is the last one, or was asked for."""
    stopped: EarlyStop | None = None
    asked_for: bool = False
    """`--publish-step` named it."""


def decided_by(best_by: str | None, stopping: EarlyStoppingSpec | None) -> tuple[str, ...]:
    """The metrics that the end of a run or its result depends on."""
    named = (best_by, None if stopping is None else stopping.metric)
    return tuple(dict.fromkeys(name for name in named if name is not None))


def choose(job: JobSpec, history: History, total_steps: int) -> Selection:
    """The step of a run, trained to its end, that the job publishes.

    Args:
        job: what was trained.
        history: of all steps that were done.
        total_steps: that the run would have had; one that stops after the last of them does not stop early.

    Raises:
        SpecError: the best is published, and nothing finite was measured.
    """
    stopped = stopped_early(history, job.schedule.early_stopping)
    if stopped is not None and stopped.step >= total_steps:
        stopped = None
    if job.best_by is None:
        return Selection(len(history), None, stopped)
    best = best_of(history, job.best_by)
    if best is None:
        raise SpecError(
            f"{job.best_by} was finite at no checkpoint of this run, so none of them is the best; publish "
            "one with --publish-step, or train with another optimizer.learning_rate"
        )
    return Selection(best.step, best, stopped)


def best_of(history: History, metric: str) -> Best | None:
    """The best measured step; None where nothing finite was measured."""
    best: Best | None = None
    for step, value in _measured(history, metric):
        if math.isfinite(value) and (best is None or improves(metric, value, best.value)):
            best = Best(metric, value, step)
    return best


def stopped_early(history: History, spec: EarlyStoppingSpec | None) -> EarlyStop | None:
    """Where training stops by the rule of `spec`: at the first such step, whatever came after it."""
    if spec is None:
        return None
    best: Best | None = None
    waited = 0
    for step, value in _measured(history, spec.metric):
        if math.isfinite(value) and (
            best is None or improves(spec.metric, value, best.value, by=spec.min_delta)
        ):
            best, waited = Best(spec.metric, value, step), 0
            continue
        waited += 1
        if best is not None and waited == spec.patience:
            return EarlyStop(step, spec.metric, spec.patience, best.value, best.step)
    return None


def improves(metric: str, value: float, than: float, *, by: float = 0.0) -> bool:
    """Whether a value of a metric is better than another by more than `by`.

    >>> improves("validation_loss", 1.0, 1.5), improves("exact_match", 0.75, 0.5, by=0.25)
    (True, False)
    """
    gain = value - than if higher_is_better(metric) else than - value
    return gain > by


def higher_is_better(metric: str) -> bool:
    """Whether a higher value of a metric is the better one."""
    return scale_of(metric).best is not None


def value_of(entry: Mapping[str, Any], metric: str) -> float | None:
    """A metric of one entry of the history; None where it was not measured."""
    found = entry.get(metric) if metric == VALIDATION_LOSS else entry.get(SCORES, {}).get(metric)
    return None if found is None else float(found)


def ranking_value(history: History, metric: str) -> float:
    """The newest step's value for what sorts checkpoints by value alone, and of equals prefers the newer.

    Each earlier step with the same value makes it worse by the least that a float can be, so that the
    earlier one stays the better. Infinitely bad where the newest step was not measured, or is not finite:
    Ray Train takes what it is not told for the best where a lower value is better.
    """
    worse = -math.inf if higher_is_better(metric) else math.inf
    value = value_of(history[-1], metric)
    if value is None or not math.isfinite(value):
        return worse
    ranked = value
    for entry in history[:-1]:
        if value_of(entry, metric) == value:
            ranked = math.nextafter(ranked, worse)
    return ranked


def check_best(history: History, best_by: str | None, kept: Callable[[], Collection[int]]) -> None:
    """Refuse to go on with a run that cannot publish its best step, because it began with other settings.

    Args:
        history: of the run so far.
        best_by: what the published checkpoint is the best by; None: the last one is published.
        kept: gives the steps whose checkpoints are kept.

    Raises:
        SpecError: a checkpoint was not measured by it, or the best one was not kept.
    """
    if best_by is None:
        return
    if any(value_of(e, VALIDATION_LOSS) is not None and value_of(e, best_by) is None for e in history):
        raise SpecError(
            f"checkpoint.best_by = {best_by}: this run began without measuring it, so its best step is not "
            "known; set it back, set checkpoint.keep_best: false, or start over with --restart"
        )
    best = best_of(history, best_by)
    if best is None or best.step in (steps := kept()):
        return
    raise SpecError(
        f"step {best.step} has the best {best.metric} of this run, {best.value:.4g}, and its checkpoint was "
        f"not kept ({kept_text(steps)}); publish one with --publish-step, set checkpoint.keep_best: false, "
        "or start over with --restart"
    )


def kept_text(kept: Collection[int]) -> str:
    """The kept steps in words.

    >>> kept_text([8, 4, 8])
    'kept are steps 4 and 8'
    """
    steps = [f"{step}" for step in sorted(set(kept))]
    if not steps:
        return "none is kept"
    if len(steps) == 1:
        return f"kept is step {steps[0]}"
    if len(steps) > _MOST_NAMED:
        steps = [*steps[: _MOST_NAMED // 2], "…", *steps[-_MOST_NAMED // 2 :]]
    return f"kept are steps {', '.join(steps[:-1])} and {steps[-1]}"


def _measured(history: History, metric: str) -> Iterator[tuple[int, float]]:
    for entry in history:
        if (value := value_of(entry, metric)) is not None:
            yield int(entry["step"]), value
