"""The order of the data: a pure function of (window sizes, seed, epoch, mixture). No torch, no ray, no clock.

Each source is a stream of its windows in a random order, shuffled again within pools of windows; an epoch
takes from each stream what its mixture says, interleaves them in blocks that hold the sources in exact
proportion, shuffles the blocks, and cuts them into steps of `batch.sequences` examples. Nothing else decides
what a step sees: neither how many workers there are, nor what was read first, nor how often a run was killed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import count, pairwise
from typing import Any

import numpy as np

from raytune_ft.data.mixture import SourceShape, shares
from raytune_ft.spec import DataSpec

POOL_WINDOWS = 8
"""Windows of a streamed run that are shuffled together, over all sources: what a worker holds in memory."""
BLOCK_EXAMPLES = 1024
"""Examples within which the sources stand in exact proportion."""

Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]
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
class EpochPlan:
    """One epoch: what is read, in the order in which it is needed."""

    course: "Course"
    epoch: int

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """All readings, so that the sources are used up at the same time; pools stay together."""
        parts: list[tuple[Fraction, Reading]] = []
        for source, shape in enumerate(self.course.sources):
            readings = self._readings_of(source, shape)
            total = sum(reading.last - reading.first for reading in readings)
            before, starts = 0, dict[int, Fraction]()
            for reading in readings:
                starts.setdefault(reading.pool, Fraction(before, total))
                parts.append((starts[reading.pool], reading))
                before += reading.last - reading.first
        # Sorting is stable: a pool's readings keep their order.
        return tuple(
            reading for _, reading in sorted(parts, key=lambda part: (part[0], part[1].source, part[1].pool))
        )

    def examples(self, count_of: CountOf) -> int:
        """How many examples the epoch has."""
        return sum(len(reading.rows(count_of(reading.window))) for reading in self.readings)

    def blocks(self, count_of: CountOf) -> Iterator[StepOrder]:
        """The epoch as blocks of at most BLOCK_EXAMPLES, in each of which the sources stand in proportion."""
        streams = [_SourceStream(self, source, count_of) for source in range(len(self.course.sources))]
        feeder = _Feeder(self.readings, streams)
        shares = np.array([float(units) for units in self.course.examples_per_epoch])
        credit = np.zeros(len(streams))
        live = [source for source, stream in enumerate(streams) if feeder.fill(stream, 1)]
        for number in count():
            if not live:
                return
            takes = _quotas(live, shares, credit)
            parts = []
            for source in live:
                feeder.fill(streams[source], takes[source])
                parts.append(streams[source].take(takes[source]))
            block = np.concatenate(parts)
            block = block[_permutation(len(block), self.course.seed, _BLOCK, self.epoch, number)]
            if len(block):
                yield StepOrder(self.epoch, block[:, 0], block[:, 1])
            live = [source for source in live if feeder.fill(streams[source], 1)]

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


def _quotas(live: Sequence[int], shares: np.ndarray[Any, Any], credit: np.ndarray[Any, Any]) -> list[int]:
    """How many examples of a block each source gives: the largest remainders, carried from block to block."""
    credit[live] += BLOCK_EXAMPLES * shares[live] / shares[live].sum()
    takes = [0] * len(shares)
    for source in live:
        takes[source] = max(0, math.floor(credit[source]))
    missing = BLOCK_EXAMPLES - sum(takes)
    for source in sorted(live, key=lambda s: (takes[s] - credit[s], s))[: max(0, missing)]:
        takes[source] += 1
    credit[live] -= [takes[source] for source in live]
    return takes


class _SourceStream:
    """The examples of a source that were read and wait for their turn."""

    def __init__(self, plan: EpochPlan, source: int, count_of: CountOf) -> None:
        self._seed = plan.course.seed
        self._epoch = plan.epoch
        self._source = source
        self._count_of = count_of
        self._ready = np.zeros((0, 2), dtype=np.int64)
        self._pool: list[tuple[int, Reading]] = []
        self.left = sum(reading.source == source for reading in plan.readings)
        """Readings that are still to come."""

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, number: int, reading: Reading, *, ends_pool: bool) -> None:
        """Take the next reading, which has `number` in the epoch."""
        self.left -= 1
        self._pool.append((number, reading))
        if ends_pool:
            parts = [self._rows(number, reading) for number, reading in self._pool]
            pool = np.concatenate(parts)
            key = (self._source, reading.task_epoch, self._epoch, reading.pool)
            pool = pool[_permutation(len(pool), self._seed, _POOL, *key)]
            self._ready = np.concatenate([self._ready, pool])
            self._pool = []

    def take(self, count: int) -> Numbers:
        """The next `count` examples, or all that are left: (reading, row) each."""
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken

    def _rows(self, number: int, reading: Reading) -> Numbers:
        examples = self._count_of(reading.window)
        order = _permutation(examples, self._seed, _ROWS, reading.window, reading.task_epoch)
        places = reading.rows(examples)
        rows = order[places.start : places.stop]
        return np.stack([np.full(len(rows), number), rows], axis=1)


class _Feeder:
    """Hands the readings of an epoch to their sources, in their order and only as far as they are needed."""

    def __init__(self, readings: Sequence[Reading], streams: Sequence[_SourceStream]) -> None:
        self._readings = readings
        self._streams = streams
        self._next = 0

    def fill(self, stream: _SourceStream, wanted: int) -> bool:
        """Read until the source has `wanted` examples or nothing more to give; whether it has any."""
        while len(stream) < wanted and stream.left:
            reading = self._readings[self._next]
            following = self._readings[self._next + 1 : self._next + 2]
            ends = not following or (following[0].source, following[0].pool) != (reading.source, reading.pool)
            self._streams[reading.source].add(self._next, reading, ends_pool=ends)
            self._next += 1
        return len(stream) > 0
