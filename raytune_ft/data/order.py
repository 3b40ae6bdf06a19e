"""The order of the data: a pure function of (seed, epoch, mixture). No torch, no ray, no clock.

An epoch is a permutation of example numbers, dealt into steps of `batch.sequences` examples. Nothing else
decides what a step sees, so a run that was killed goes on with exactly the batches it would have seen.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raytune_ft.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """How many training examples each source has, and how much of it an epoch takes."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def examples_per_epoch(self) -> int:
        """Examples of one epoch: weight × size of each source, rounded, at least one where it has any."""
        return sum(self.quotas)

    @property
    def quotas(self) -> tuple[int, ...]:
        """Examples that each source gives to an epoch."""
        return tuple(
            max(1, round(size * weight)) if size else 0
            for size, weight in zip(self.sizes, self.weights, strict=True)
        )


def epoch_order(mixture: Mixture, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Example numbers of one epoch, in training order.

    Numbers count through all sources: source 0 holds 0 … sizes[0]-1, and so on. A source of weight 1 gives
    each of its examples exactly once; of weight w, each ⌊w⌋ or ⌈w⌉ times, drawn anew each epoch.

    >>> sorted(epoch_order(Mixture((3, 2), (1.0, 2.0)), seed=0, epoch=0).tolist())
    [0, 1, 2, 3, 3, 4, 4]
    """
    # Philox is counter-based and its stream is stable over numpy versions; the key names the epoch.
    random = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    parts = []
    first = 0
    for size, quota in zip(mixture.sizes, mixture.quotas, strict=True):
        if size:
            whole, rest = divmod(quota, size)
            numbers = np.arange(first, first + size, dtype=np.int64)
            parts += [numbers] * whole + [random.permutation(numbers)[:rest]]
        first += size
    return random.permutation(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Course:
    """All steps of a run: what each trains on, how many there are."""

    mixture: Mixture
    seed: int
    sequences_per_step: int
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; the last one of an epoch may hold fewer examples."""
        return math.ceil(self.mixture.examples_per_epoch / self.sequences_per_step)

    def steps(self, start: int = 0) -> Iterator[Sequence[int]]:
        """Example numbers of the steps `start`, `start + 1`, … to the end of the run.

        Epochs do not share a step: each example is seen once per epoch, and the mean over an epoch is exact.
        """
        for epoch in range(start // self.steps_per_epoch, math.ceil(self.total_steps / self.steps_per_epoch)):
            order = epoch_order(self.mixture, self.seed, epoch).tolist()
            for step in range(self.steps_per_epoch):
                if start <= epoch * self.steps_per_epoch + step < self.total_steps:
                    yield order[step * self.sequences_per_step : (step + 1) * self.sequences_per_step]


def plan_course(
    mixture: Mixture, *, seed: int, sequences_per_step: int, epochs: int | None, steps: int | None
) -> Course:
    """The course of a run; one epoch where neither `epochs` nor `steps` is given.

    Raises:
        DataError: there is nothing to train on.
    """
    if mixture.examples_per_epoch == 0:
        raise DataError("the training split is empty; give more data, or a smaller data.split")
    per_epoch = math.ceil(mixture.examples_per_epoch / sequences_per_step)
    return Course(mixture, seed, sequences_per_step, steps or (epochs or 1) * per_epoch)
