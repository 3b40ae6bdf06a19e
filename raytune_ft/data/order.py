"""The order of the data: a pure function of (window sizes, seed, epoch, mixture). No torch, no ray, no clock.

Each source is a stream of its windows in a random order, shuffled again within pools of windows. An epoch
takes from each stream what its mixture says, merges them so that all are used up evenly, shuffles the result
in blocks, and cuts it into steps of `batch.sequences` examples. Nothing else decides what a step sees:
neither how many workers there are, nor what was read first, nor how often a run was killed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import count, groupby, pairwise

import numpy as np

from raytune_ft.data.mixture import SourceShape, shares
from raytune_ft.spec import DataSpec

POOL_WINDOWS = 8
"""Windows of a streamed run that are shuffled together, over all sources but at least one of each: what a
worker holds in memory."""
BLOCK_EXAMPLES = 1024
"""Examples that are shuffled once more, when the sources were merged."""

Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]
Examples = np.ndarray[tuple[int], np.dtype[np.void]]
_EXAMPLE = np.dtype([("position", np.float64), ("reading", np.int64), ("row", np.int64)])
CountOf = Callable[[int], int]
"""How many training examples a window has; asked for in the order of `EpochPlan.readings`."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an epoch takes of one window: the examples from `first` to `last` of its `size`, once shuffled."""

    source: int
    window: int
    task_epoch: int
    """How often the source had been passed before: each pass has another order."""
    first: int
    last: int
    size: int
    pool: int
    """Readings of a source with the same number are shuffled together."""

    @property
    def units(self) -> int:
        """How much of the window it takes, in the units of the windows' sizes."""
        return self.last - self.first

    def rows(self, examples: int) -> range:
        """Places in the shuffled window, of which `examples` are for training."""
        return range(self.first * examples // self.size, self.last * examples // self.size)


@dataclass(frozen=True, slots=True)
class StepOrder:
    """The examples of one step, in order; arrays of equal length."""

    epoch: int
    readings: Numbers
    """Index into the readings of the epoch."""
    rows: Numbers
    """Place of each example among the training examples of its window."""


@dataclass(frozen=True)
class _Pool:
    """Readings of a source that are shuffled together."""

    readings: tuple[Reading, ...]
    before: int
    """What the epoch takes of the source before them, in the units of its windows' sizes."""
    total: int
    """What it takes of the source in all."""

    @property
    def units(self) -> int:
        """What the pool takes of the source."""
        return sum(reading.units for reading in self.readings)

    @property
    def start(self) -> float:
        """The position of the pool's beginning, between 0 and 1."""
        return self.before / self.total


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: what is read, in the order in which it is needed."""

    course: "Course"
    epoch: int

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """All readings, so that the sources are used up at the same time; pools stay together."""
        return tuple(reading for pool in self._pools for reading in pool.readings)

    @cached_property
    def _pools(self) -> Sequence[_Pool]:
        """What is shuffled together, by how much of its source was used before."""
        pools: list[_Pool] = []
        for source, shape in enumerate(self.course.sources):
            readings = self._readings_of(source, shape)
            total = sum(reading.units for reading in readings)
            before = 0
            for _, group in groupby(readings, key=lambda reading: reading.pool):
                pool = _Pool(tuple(group), before, total)
                pools.append(pool)
                before += pool.units
        # Sorting is stable: of equals the source comes first that is named first.
        return sorted(pools, key=lambda pool: Fraction(pool.before, pool.total))

    def examples(self, count_of: CountOf) -> int:
        """How many examples the epoch has."""
        return sum(len(reading.rows(count_of(reading.window))) for reading in self.readings)

    def blocks(self, count_of: CountOf) -> Iterator[StepOrder]:
        """The epoch as shuffled blocks of BLOCK_EXAMPLES, in each of which the sources stand in proportion.

        Each example has a position between 0 and 1: how much of its source the epoch has used up before it.
        The sources are merged by it, so that they end together however many examples their bytes turn out
        to hold, and nothing has to wait longer than its own pool lasts.
        """
        merged = waiting = np.zeros(0, dtype=_EXAMPLE)
        numbers = count()
        read = 0
        for pool in [*self._pools, None]:
            due = waiting["position"] < (pool.start if pool else math.inf)
            next_up = waiting[due]
            in_order = np.lexsort((next_up["reading"], next_up["position"]))
            merged = np.concatenate([merged, next_up[in_order]])
            while len(merged) >= BLOCK_EXAMPLES:
                yield self._block(merged[:BLOCK_EXAMPLES], next(numbers))
                merged = merged[BLOCK_EXAMPLES:]
            if pool:
                waiting = np.concatenate([waiting[~due], self._shuffled(pool, read, count_of)])
                read += len(pool.readings)
        if len(merged):
            yield self._block(merged, next(numbers))

    def steps(self, count_of: CountOf) -> Iterator[StepOrder]:
        """The epoch cut into steps; the last one may hold fewer examples, for epochs share no step."""
        size = self.course.sequences_per_step
        readings = rows = np.zeros(0, dtype=np.int64)
        for block in self.blocks(count_of):
            readings, rows = np.append(readings, block.readings), np.append(rows, block.rows)
            whole = len(rows) // size * size
            for start in range(0, whole, size):
                yield StepOrder(self.epoch, readings[start : start + size], rows[start : start + size])
            readings, rows = readings[whole:], rows[whole:]
        if len(rows):
            yield StepOrder(self.epoch, readings, rows)

    def _readings_of(self, source: int, shape: SourceShape) -> list[Reading]:
        units = self.course.units_per_epoch[source]
        at, end = round(self.epoch * units), round((self.epoch + 1) * units)
        limit = self.course.pool_windows
        readings: list[Reading] = []
        pool = -1
        while at < end:
            task_epoch, first = divmod(at, shape.total)
            last = min(shape.total, first + end - at)
            order = window_order(len(shape.sizes), self.course.seed, source, task_epoch)
            parts = _overlaps(shape, order, first, last)
            for number, (place, begin, stop) in enumerate(parts):
                pool += number % (limit or len(parts)) == 0
                window, size = shape.windows[place], shape.sizes[place]
                readings.append(Reading(source, window, task_epoch, begin, stop, size, pool))
            at += last - first
        return readings

    def _shuffled(self, pool: _Pool, read: int, count_of: CountOf) -> Examples:
        """The examples of a pool, before which so many readings come, in random order and evenly over the
        positions that the pool covers."""
        parts = [self._rows(number, reading, count_of) for number, reading in enumerate(pool.readings, read)]
        numbers, rows = np.concatenate(parts, axis=1)
        first = pool.readings[0]
        key = (first.source, first.task_epoch, self.epoch, first.pool)
        order = _permutation(len(rows), self.course.seed, _POOL, *key)
        examples = np.zeros(len(rows), dtype=_EXAMPLE)
        places = (np.arange(len(rows)) + 0.5) / max(1, len(rows))
        examples["position"] = pool.start + places * pool.units / pool.total
        examples["reading"], examples["row"] = numbers[order], rows[order]
        return examples

    def _rows(self, number: int, reading: Reading, count_of: CountOf) -> Numbers:
        examples = count_of(reading.window)
        order = _permutation(examples, self.course.seed, _ROWS, reading.window, reading.task_epoch)
        places = reading.rows(examples)
        rows = order[places.start : places.stop]
        return np.stack([np.full(len(rows), number), rows])

    def _block(self, examples: Examples, number: int) -> StepOrder:
        examples = examples[_permutation(len(examples), self.course.seed, _BLOCK, self.epoch, number)]
        return StepOrder(self.epoch, examples["reading"], examples["row"])


@dataclass(frozen=True)
class Course:
    """All steps of a run: what each trains on."""

    sources: tuple[SourceShape, ...]
    examples_per_epoch: tuple[Fraction, ...]
    """What an epoch takes of each source; see `raytune_ft.data.mixture.shares`."""
    counted: bool
    """Sizes of windows are training examples, and all are at hand; otherwise bytes, and they are streamed."""
    seed: int
    sequences_per_step: int
    epochs: int | None
    given_steps: int | None

    @property
    def pool_windows(self) -> int | None:
        """How many windows of a source are shuffled together; None: all of a pass."""
        return None if self.counted else max(1, POOL_WINDOWS // len(self.sources))

    @cached_property
    def units_per_epoch(self) -> tuple[Fraction, ...]:
        """What an epoch takes of each source, in the units of its windows' sizes, at least one."""
        return tuple(
            max(Fraction(1), taken * shape.total / shape.examples) if shape.examples else Fraction(0)
            for taken, shape in zip(self.examples_per_epoch, self.sources, strict=True)
        )

    @property
    def task_epochs(self) -> tuple[float, ...]:
        """How often an epoch passes over each source."""
        return tuple(
            float(units / shape.total) if shape.total else 0.0
            for units, shape in zip(self.units_per_epoch, self.sources, strict=True)
        )

    @cached_property
    def total_steps(self) -> int:
        """Steps of the run: exact where they are given or the examples are counted, else estimated."""
        if self.given_steps is not None:
            return self.given_steps
        ends = [[round(e * units) for units in self.units_per_epoch] for e in range((self.epochs or 1) + 1)]
        totals = []
        for before, after in pairwise(ends):
            taken = [
                Fraction(last - first) * shape.examples / shape.total if shape.total else Fraction(0)
                for first, last, shape in zip(before, after, self.sources, strict=True)
            ]
            totals.append(math.ceil(math.ceil(sum(taken)) / self.sequences_per_step))
        return sum(totals)

    def plans(self) -> Iterator[EpochPlan]:
        """The epochs of the run; without end where the number of steps is given."""
        epoch = 0
        while self.given_steps is not None or epoch < (self.epochs or 1):
            yield EpochPlan(self, epoch)
            epoch += 1


def plan_course(
    sources: Sequence[SourceShape],
    data: DataSpec,
    *,
    counted: bool,
    sequences_per_step: int,
    epochs: int | None,
    steps: int | None,
) -> Course:
    """The course of a run; one epoch where neither `epochs` nor `steps` is given.

    Raises:
        DataError: there is nothing to train on.
    """
    whole_run = None if steps is None else steps * sequences_per_step
    weights = [source.weight for source in data.sources]
    taken = shares(sources, weights, data.mixture, whole_run)
    return Course(tuple(sources), taken, counted, data.seed, sequences_per_step, epochs, steps)


_WINDOWS, _ROWS, _POOL, _BLOCK = range(4)


def window_order(windows: int, seed: int, source: int, task_epoch: int) -> Numbers:
    """In which order a pass over a source goes through its windows."""
    return _permutation(windows, seed, _WINDOWS, source, task_epoch)


def _overlaps(shape: SourceShape, order: Numbers, first: int, last: int) -> list[tuple[int, int, int]]:
    """The parts of windows that lie between `first` and `last` of a pass: (place, begin, stop)."""
    parts = []
    passed = 0
    for place in order.tolist():
        size = shape.sizes[place]
        begin, stop = max(first - passed, 0), min(last - passed, size)
        passed += size
        if begin < stop:
            parts.append((place, begin, stop))
    return parts


def _permutation(size: int, seed: int, *key: int) -> Numbers:
    """A random order of `size` things, the same on every platform and for every version of numpy.

    Philox is counter-based (Salmon et al. 2011) and its raw stream is fixed; numpy's own permutation of it
    is not promised to be.
    """
    random = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))
    order: Numbers = np.argsort(random.random_raw(size), kind="stable")
    return order
