"""The only training loop. It knows engines and steps; neither Ray, nor DeepSpeed, nor storage.

Jobs on one base train in rounds: in each, every job does its next step. Their passes are computed together,
all else is each job's own, also how it ends.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytune_ft.errors import Diverged
from raytune_ft.train.batch import Batch, Step
from raytune_ft.train.engine import Base, Block, Engine
from raytune_ft.train.faults import fault_of_device
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
    """From the step's beginning to its end, with what other jobs did meanwhile."""
    data_seconds: float
    """Part of `seconds` that this worker waited for data."""

    def to_json(self) -> dict[str, Any]:
        """What is kept of every step, as plain values; the sources are summed up over many steps instead."""
        kept = asdict(self)
        del kept["source_loss_sums"], kept["source_learned_tokens"]
        return kept


@dataclass(frozen=True)
class Trainee:
    """A job in the loop."""

    engine: Engine
    steps: Iterable[Step]
    """What it trains on; the job is done where they end."""
    start: int
    """Number of the first of the steps."""
    learning_rate: Callable[[int], float]
    """Of each step, by its number."""
    report: Callable[[StepReport], None]
    """Called after each step."""
    leave: Callable[[Exception | None], None]
    """Called once, when the steps end, or with what ended the job before; the loop is through with it. Not
    called where the device is at fault: then training is over for all."""


Offer = Callable[[int], Iterable[Trainee]]
"""(jobs that are training) → those that join them. Nobody trains and nobody joins: training is over."""


def fit(
    engine: Engine,
    steps: Iterable[Step],
    *,
    start: int,
    learning_rate: Callable[[int], float],
    report: Callable[[StepReport], None],
    peers: Peers = Peers(),
) -> None:
    """Train one job by itself on `steps`, the first of which is number `start`.

    All workers of a run take the same number of steps, each with its own share of them.

    Raises:
        Diverged: a loss or gradient is not finite; the weights are those of the step before. All workers
            raise it at the same step.
        OutOfMemory, DeviceFailed: see `train`.
        Exception: what the steps, the passes and the report raise.
    """
    ends: list[Exception | None] = []
    waiting = [Trainee(engine, steps, start, learning_rate, report, ends.append)]

    def offer(_: int) -> list[Trainee]:
        return [waiting.pop()] if waiting else []

    train(engine.base, offer, peers=peers)
    if ends[0] is not None:
        raise ends[0]


def train(base: Base, offer: Offer, *, peers: Peers = Peers()) -> None:
    """Train jobs on one base until none is left.

    Before each round jobs may join; after it those leave that are done. A job whose data fails, whose loss or
    gradient is not finite, or whose report fails leaves alone, with its reason; the others go on, and what
    they compute does not change.

    Args:
        base: all engines are on it.
        offer: gives those that join.
        peers: the workers of the run. Several train the same jobs, which join all of them in the same round.

    Raises:
        OutOfMemory: the device's memory is full, wherever that was: its jobs share it, and none is to blame.
        DeviceFailed: the device does not work any more.
        Exception: what `offer` raises, and a backward pass of several jobs.
    """
    running: list[_Running] = []
    while True:
        running += [_Running(trainee, peers) for trainee in offer(len(running))]
        if not running:
            return
        running = [job for job in running if job.begin()]
        for blocks in _passes([job.blocks for job in running], base):
            found = base.accumulate([block for _, block in blocks])
            for (at, _), sums in zip(blocks, found, strict=True):
                running[at].add(sums)
        for _ in range(sum(job.idle_passes for job in running)):
            base.idle()
        running = [job for job in running if job.finish()]


def _passes(queues: Sequence[Sequence[Block]], base: Base) -> Iterator[list[tuple[int, Block]]]:
    """Passes of blocks, each with the place of its job; those of one job come in their order."""
    left = [(at, list(reversed(queue))) for at, queue in enumerate(queues) if queue]
    while left:
        chosen: list[tuple[int, Block]] = []
        room = base.tokens_per_pass
        for at, queue in left:
            size = queue[-1].batch.input_ids_BT.numel()
            shared = size <= room and queue[-1].engine.shares_passes
            if not chosen or (shared and chosen[0][1].engine.shares_passes):
                chosen.append((at, queue.pop()))
                room -= size
        yield chosen
        left = [(at, queue) for at, queue in left if queue]


class _Running:
    """A job that trains: one step after another."""

    def __init__(self, trainee: Trainee, peers: Peers) -> None:
        self._trainee = trainee
        self._peers = peers
        self._source = iter(trainee.steps)
        self._number = trainee.start
        self._failure: Exception | None = None

    def begin(self) -> bool:
        """Take the next step; False where there is none, or it cannot be had: the job has left."""
        self._began = time.perf_counter()
        try:
            step = next(self._source, None)
            if step is None:
                return self._leave(None)
            self._have_data = time.perf_counter()
            self._rate = self._trainee.learning_rate(self._number)
            self._step = step
            self._learned_by_source, self._tokens, passes = _count(step, self._peers)
        except Exception as error:  # noqa: BLE001  whatever it is, it ends this job and no other
            return self._leave(error)
        self.idle_passes = passes - len(step.batches)
        """Passes of other workers that this one has none of."""
        self._sums = [0.0] * step.sources
        return True

    @property
    def blocks(self) -> list[Block]:
        """What the step computes on this worker."""
        learned, step, peers = sum(self._learned_by_source), self._step, self._peers
        # The dropout of a base is drawn by the number of the block, so no two workers may use the same.
        return [
            Block(
                self._trainee.engine,
                batch,
                self._number,
                forward=at * peers.count + peers.rank,
                divisor=learned,
                sources=step.sources,
            )
            for at, batch in enumerate(step.batches)
        ]

    def add(self, found: Sequence[float] | Exception) -> None:
        """Count what a block gave: its sum of cross-entropies by source, or why it cannot be computed."""
        if isinstance(found, Exception):
            self._failure = found
            return
        # Sum, not mean: passes and workers hold unequal numbers of learned tokens.
        self._sums = [total + part for total, part in zip(self._sums, found, strict=True)]

    def finish(self) -> bool:
        """Update the weights and report; False where that failed: the job has left."""
        try:
            self._update()
        except Exception as error:  # noqa: BLE001  whatever it is, it ends this job and no other
            return self._leave(error)
        return True

    def _update(self) -> None:
        if self._failure is not None:
            raise self._failure
        sums = self._peers.sum(self._sums)
        loss_sum, learned = sum(sums), sum(self._learned_by_source)
        _check_finite(loss_sum, self._number, "loss", self._rate)
        grad_norm = self._trainee.engine.update(self._rate)
        _check_finite(grad_norm, self._number, "gradient norm", self._rate)
        self._number += 1
        self._trainee.report(
            StepReport(
                step=self._number,
                loss=loss_sum / learned,
                learning_rate=self._rate,
                grad_norm=grad_norm,
                examples=self._step.examples,
                tokens=self._tokens,
                learned_tokens=learned,
                batch=self._step.digest,
                source_loss_sums=tuple(sums),
                source_learned_tokens=tuple(self._learned_by_source),
                seconds=time.perf_counter() - self._began,
                data_seconds=self._have_data - self._began,
            )
        )

    def _leave(self, reason: Exception | None) -> bool:
        if reason is not None and (fault := fault_of_device(reason)) is not None:
            raise fault from None
        self._trainee.leave(reason)
        return False


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
