"""The only training loop. It knows an engine and batches; neither Ray, nor DeepSpeed, nor storage."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytune_ft.errors import Diverged
from raytune_ft.train.batch import Batch
from raytune_ft.train.engine import Engine

REMEDY = "lower optimizer.learning_rate, raise schedule.warmup or lower optimizer.max_grad_norm"


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean cross-entropy of the learned tokens of the step."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens of the step without padding."""
    learned_tokens: int
    seconds: float
    data_seconds: float
    """Part of `seconds` that waited for data."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def fit(
    engine: Engine,
    steps: Iterable[Sequence[Batch]],
    *,
    start: int,
    learning_rate: Callable[[int], float],
    report: Callable[[StepReport], None],
) -> None:
    """Train on `steps`, the first of which is number `start`.

    Raises:
        Diverged: a loss or gradient is not finite; the weights are those of the step before.
    """
    source = iter(steps)
    step = start
    while True:
        began = time.perf_counter()
        batches = next(source, None)
        if batches is None:
            return
        have_data = time.perf_counter()
        rate = learning_rate(step)
        # Sum, not mean: passes hold unequal numbers of learned tokens.
        learned = sum(batch.learned_tokens for batch in batches)
        loss_sum = sum(
            engine.accumulate(batch, step=step, forward=forward, learned_tokens=learned)
            for forward, batch in enumerate(batches)
        )
        _check_finite(loss_sum, step, "loss", rate)
        grad_norm = engine.update(rate)
        _check_finite(grad_norm, step, "gradient norm", rate)
        step += 1
        now = time.perf_counter()
        report(
            StepReport(
                step=step,
                loss=loss_sum / learned,
                learning_rate=rate,
                grad_norm=grad_norm,
                tokens=sum(batch.tokens for batch in batches),
                learned_tokens=learned,
                seconds=now - began,
                data_seconds=have_data - began,
            )
        )


def mean_loss(engine: Engine, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy per learned token, without training."""
    loss_sum, learned = 0.0, 0
    for batch in batches:
        loss_sum += engine.evaluate(batch)
        learned += batch.learned_tokens
    return loss_sum / learned if learned else math.nan


def _check_finite(value: float, step: int, what: str, rate: float) -> None:
    if not math.isfinite(value):
        raise Diverged(f"step {step + 1}: the {what} is {value} at learning rate {rate:.3g}; {REMEDY}")
