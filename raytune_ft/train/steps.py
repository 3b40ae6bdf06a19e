"""The steps of a run: the order of the data, filled with examples from windows as they arrive."""

import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.data.examples import TokenisedWindow
from raytune_ft.data.ledger import Ledger
from raytune_ft.data.order import Course, EpochPlan, StepOrder
from raytune_ft.data.pack import share
from raytune_ft.errors import DataError
from raytune_ft.train.batch import Tokens

OpenWindows = Callable[[Sequence[int]], Iterator[TokenisedWindow]]
"""Opens windows by their numbers; they come in the order that was asked for."""

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class StepExamples:
    """What one worker takes of a step, and what all workers know of the whole of it."""

    own: list[Tokens]
    examples: int
    """Of the whole step, over all workers."""
    digest: str
    """Names the examples of the whole step and their order: the same for any number of workers."""


class TrainRows:
    """The training examples of a window."""

    def __init__(self, table: pa.Table, source: int) -> None:
        rows = table.filter(pc.equal(table["split"], "train")).combine_chunks()
        ids, learned = (_only_chunk(rows[name]) for name in ("input_ids", "learned"))
        # Of all examples at once, and as Python's numbers: numpy takes longer for one than for a window.
        self._offsets: list[int] = ids.offsets.to_pylist()
        self._ids = ids.values.to_numpy().astype(np.int64)
        self._learned = learned.values.to_numpy(zero_copy_only=False)
        self._source = source

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Tokens:
        part = slice(self._offsets[row], self._offsets[row + 1])
        return Tokens(self._ids[part], self._learned[part], self._source)

    def length(self, row: int) -> int:
        """Tokens of an example."""
        return self._offsets[row + 1] - self._offsets[row]


def _only_chunk(column: pa.ChunkedArray) -> pa.ListArray:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


class Steps:
    """The steps of a run from any of them on.

    A step that was done before is passed over by counting alone: only windows of which examples are still
    needed are opened.
    """

    def __init__(self, course: Course, open_windows: OpenWindows, ledger: Ledger) -> None:
        self._course = course
        self._open = open_windows
        self._ledger = ledger

    @property
    def total(self) -> int:
        """Steps of the run; estimated where neither they are given nor the examples counted."""
        return self._course.total_steps

    def share_of(self, rank: int, workers: int, start: int) -> Iterator[StepExamples]:
        """The steps `start`, `start + 1`, … of the run, with the examples of one of its workers.

        Raises:
            DataError: the data changed, or too much of it is malformed.
        """
        limit = self._course.given_steps
        number = 0
        for plan in self._course.plans():
            known = self._steps_of(plan)
            if known is not None and number + known <= start:
                number += known
                continue
            if limit is not None and max(number, start) >= limit:
                return
            began, number = number, max(number, start)
            with _Epoch(plan, self._open, self._ledger) as epoch:
                for order in epoch.steps(number - began):
                    yield epoch.examples(order, rank, workers)
                    number += 1
                    if number == limit:
                        return
            if number == began:
                raise DataError("an epoch has no training example; give more data, or a smaller data.split")

    def _steps_of(self, plan: EpochPlan) -> int | None:
        """How many steps an epoch has, where all its windows are counted."""
        counts = self._ledger.train_counts
        if any(reading.window not in counts for reading in plan.readings):
            return None
        return -(-plan.examples(counts.__getitem__) // self._course.sequences_per_step)


class _Epoch:
    """One epoch: opens its windows in order, and keeps each until its last example was given."""

    def __init__(self, plan: EpochPlan, open_windows: OpenWindows, ledger: Ledger) -> None:
        self._plan = plan
        self._ledger = ledger
        self._open_windows = open_windows
        self._counted = 0
        self._left: dict[int, int] = {}
        """Examples that each reading has still to give."""
        self._rows: dict[int, TrainRows] = {}
        self._coming: Iterator[tuple[int, TokenisedWindow]] | None = None

    def __enter__(self) -> "_Epoch":
        return self

    def __exit__(self, *details: object) -> None:
        if isinstance(self._coming, Generator):
            self._coming.close()

    def steps(self, skipped: int) -> Iterator[StepOrder]:
        """The epoch's steps after the first `skipped`."""
        for number, order in enumerate(self._plan.steps(self._count_of)):
            if number >= skipped:
                yield order
            else:
                self._give(order)

    def examples(self, order: StepOrder, rank: int, workers: int) -> StepExamples:
        """One worker's examples of a step. Each step is asked for once."""
        pairs = list(zip(order.readings.tolist(), order.rows.tolist(), strict=True))
        held = {reading: self._held(reading) for reading, _ in dict.fromkeys(pairs)}
        lengths = [held[reading].length(row) for reading, row in pairs]
        own = [replace(held[pairs[at][0]][pairs[at][1]], number=at) for at in share(lengths, workers)[rank]]
        windows = [self._plan.readings[reading].window for reading, _ in pairs]
        named = np.array([windows, order.rows], dtype="<i8")
        self._give(order)
        return StepExamples(own, len(pairs), hashlib.blake2b(named.tobytes(), digest_size=8).hexdigest())

    def _count_of(self, window: int) -> int:
        number = self._counted
        self._counted += 1
        count = self._ledger.train_counts.get(window)
        if count is None:
            count = len(self._held(number))
        self._left[number] = len(self._plan.readings[number].rows(count))
        if not self._left[number]:
            self._rows.pop(number, None)
        return count

    def _give(self, order: StepOrder) -> None:
        numbers, counts = np.unique(order.readings, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self._left[number] -= count
            if not self._left[number]:
                self._rows.pop(number, None)

    def _held(self, number: int) -> TrainRows:
        """The examples of a reading, which may have to come first."""
        if self._coming is None:
            self._coming = self._open()
        while number not in self._rows:
            arrived, window = next(self._coming)
            reading = self._plan.readings[arrived]
            rows = TrainRows(window.table, reading.source)
            self._ledger.add(reading.window, reading.source, window.report)
            if self._left.get(arrived, 1):
                self._rows[arrived] = rows
        return self._rows[number]

    def _open(self) -> Iterator[tuple[int, TokenisedWindow]]:
        """All windows from here on, and those before of which examples are still needed."""
        later = range(max(self._left, default=-1) + 1, len(self._plan.readings))
        numbers = [*(number for number, left in self._left.items() if left), *later]
        windows = self._open_windows([self._plan.readings[number].window for number in numbers])
        try:
            yield from zip(numbers, windows, strict=True)
        finally:
            if isinstance(windows, Generator):
                windows.close()


@contextmanager
def ahead(steps: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Take steps in a thread, a few ahead of whoever trains on them."""
    taken: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=_STEPS_AHEAD)
    left = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not left.is_set():
            try:
                taken.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def take() -> None:
        source = iter(steps)
        try:
            for step in source:
                if not put("step", step):
                    break
            else:
                put("end", None)
        except BaseException as error:  # noqa: BLE001  raised again where the steps are used
            put("error", error)
        finally:
            if isinstance(source, Generator):
                source.close()

    def give() -> Iterator[Any]:
        while True:
            kind, value = taken.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    thread = threading.Thread(target=take, name="data", daemon=True)
    thread.start()
    try:
        yield give()
    finally:
        left.set()
        thread.join()
