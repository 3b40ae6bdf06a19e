"""The only training loop. It knows an engine and steps; neither Ray, nor DeepSpeed, nor storage."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytune_ft.errors import Diverged
from raytune_ft.train.batch import Batch, Step
from raytune_ft.train.engine import Engine
from raytune_ft.train.peers import Peers

REMEDY = "lower optimizer.learning_rate, raise schedule.warmup or lower optimizer.max_grad_norm"


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, over all workers."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean cross-entropy of the learned tokens of the step."""
    learning_rate: float
    grad_norm: float
    examples: int
    tokens: int
    """Tokens of the step without padding."""
    learned_tokens: int
    batch: str
    """Digest of the examples of the step and their order: two runs that agree in it trained on the same."""
    source_loss_sums: tuple[float, ...]
    """Sum of the cross-entropies of each source."""
    source_learned_tokens: tuple[int, ...]
    seconds: float
    data_seconds: float
    """Part of `seconds` that this worker waited for data."""

    def to_json(self) -> dict[str, Any]:
        """What is kept of every step, as plain values; the sources are summed up over many steps instead."""
        kept = asdict(self)
        del kept["source_loss_sums"], kept["source_learned_tokens"]
        return kept


def fit(
    engine: Engine,
    steps: Iterable[Step],
    *,
    start: int,
    learning_rate: Callable[[int], float],
    report: Callable[[StepReport], None],
    peers: Peers = Peers(),
) -> None:
    """Train on `steps`, the first of which is number `start`.

    All workers of a run take the same number of steps, each with its own share of them.

    Raises:
        Diverged: a loss or gradient is not finite; the weights are those of the step before. All workers
            raise it at the same step.
    """
    source = iter(steps)
    number = start
    while True:
        began = time.perf_counter()
        step = next(source, None)
        if step is None:
            return
        have_data = time.perf_counter()
        rate = learning_rate(number)
        learned_by_source, tokens, passes = _count(step, peers)
        learned = sum(learned_by_source)
        loss_sums = _accumulate(engine, step, number, learned, passes, peers)
        loss_sum = sum(loss_sums)
        _check_finite(loss_sum, number, "loss", rate)
        grad_norm = engine.update(rate)
        _check_finite(grad_norm, number, "gradient norm", rate)
        number += 1
        now = time.perf_counter()
        report(
            StepReport(
                step=number,
                loss=loss_sum / learned,
                learning_rate=rate,
                grad_norm=grad_norm,
                examples=step.examples,
                tokens=tokens,
                learned_tokens=learned,
                batch=step.digest,
                source_loss_sums=tuple(loss_sums),
                source_learned_tokens=tuple(learned_by_source),
                seconds=now - began,
                data_seconds=have_data - began,
            )
        )


def _count(step: Step, peers: Peers) -> tuple[list[int], int, int]:
    """Learned tokens of each source, and all tokens, of the whole step; passes of the worker with most."""
    learned = [0] * step.sources
    for batch in step.batches:
        for source, count in enumerate(batch.group_N.bincount(minlength=step.sources).tolist()):
            learned[source] += count
    tokens = sum(batch.tokens for batch in step.batches)
    own_passes = [len(step.batches) if rank == peers.rank else 0 for rank in range(peers.count)]
    totals = [int(total) for total in peers.sum([*learned, tokens, *own_passes])]
    return totals[: step.sources], totals[step.sources], max(totals[step.sources + 1 :])


def _accumulate(
    engine: Engine, step: Step, number: int, learned: int, passes: int, peers: Peers
) -> list[float]:
    """Run this worker's passes; the sum of the losses of each source over all workers."""
    # Sum, not mean: passes and workers hold unequal numbers of learned tokens.
    sums = [0.0] * step.sources
    for at, batch in enumerate(step.batches):
        # Dropout is drawn by the number of the pass, so no two workers may use the same.
        forward = at * peers.count + peers.rank
        found = engine.accumulate(batch, step=number, forward=forward, divisor_G=[learned] * step.sources)
        sums = [total + part for total, part in zip(sums, found, strict=True)]
    for _ in range(len(step.batches), passes):
        engine.idle()
    return peers.sum(sums)


def mean_loss(engine: Engine, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy per learned token, without training."""
    loss_sum, learned = 0.0, 0
    for batch in batches:
        loss_sum += engine.evaluate(batch)
        learned += batch.learned_tokens
    return loss_sum / learned if learned else math.nan


def source_losses(reports: Sequence[StepReport]) -> list[float | None]:
    """Mean cross-entropy of each source over some steps, None where it had no learned token."""
    sums = [sum(parts) for parts in zip(*(r.source_loss_sums for r in reports), strict=True)]
    learned = [sum(parts) for parts in zip(*(r.source_learned_tokens for r in reports), strict=True)]
    return [total / count if count else None for total, count in zip(sums, learned, strict=True)]


def _check_finite(value: float, step: int, what: str, rate: float) -> None:
    if not math.isfinite(value):
        raise Diverged(f"step {step + 1}: the {what} is {value} at learning rate {rate:.3g}; {REMEDY}")
