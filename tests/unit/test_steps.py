"""The steps of a run, filled with examples from windows as they arrive."""

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cache

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.data.counts import Counts, WindowReport
from raytune_ft.data.examples import SCHEMA, TokenisedWindow
from raytune_ft.data.ledger import Ledger
from raytune_ft.data.mixture import SourceShape
from raytune_ft.data.order import POOL_WINDOWS, plan_course
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec, SourceSpec
from raytune_ft.train.steps import StepExamples, Steps, ahead

BATCH = 4


@cache
def _table(window: int, count: int) -> pa.Table:
    rows = [
        {
            "record": row,
            "split": split,
            "input_ids": [window, row, 0],
            "learned": [False, True, True],
            "references": [],
        }
        for row in range(count)
        for split in ("train", *(["test"] if row % 3 == 0 else []))
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class Data:
    """Sources of windows with given numbers of training examples; each example's only token names it."""

    def __init__(self, sources: Sequence[Sequence[int]], *, counted: bool = False) -> None:
        self.source_of = [at for at, counts in enumerate(sources) for _ in counts]
        self.counts = [count for counts in sources for count in counts]
        self.counted = counted
        numbers = itertools.count()
        self.shapes = []
        for counts in sources:
            windows = tuple(next(numbers) for _ in counts)
            sizes = tuple(counts) if counted else tuple(50 + number % 3 for number in windows)
            self.shapes.append(SourceShape(windows, sizes, sum(counts)))
        self.opened: list[int] = []

    def table(self, window: int) -> pa.Table:
        return _table(window, self.counts[window])

    def open(self, windows: Sequence[int]) -> Iterator[TokenisedWindow]:
        for window in windows:
            self.opened.append(window)
            counts = Counts(records=self.counts[window], train=self.counts[window])
            yield TokenisedWindow(self.table(window), WindowReport(counts=counts))

    def ledger(self) -> Ledger:
        known = dict(enumerate(self.counts)) if self.counted else {}
        return Ledger([Counts() for _ in self.shapes], sum(self.counts), 0.01, known)

    def steps(
        self, ledger: Ledger, *, epochs: int | None = 1, steps: int | None = None, sequences: int = BATCH
    ) -> Steps:
        data = DataSpec(sources=tuple(SourceSpec(uri=f"s{at}") for at in range(len(self.shapes))))
        course = plan_course(
            self.shapes, data, counted=self.counted, sequences_per_step=sequences, epochs=epochs, steps=steps
        )
        return Steps(course, self.open, ledger)


def names(steps: Sequence[StepExamples]) -> list[tuple[int, int]]:
    return [(int(e.input_ids[0]), int(e.input_ids[1])) for step in steps for e in step.own]


quick = settings(max_examples=25, deadline=None)
sources = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), min_size=1, max_size=3)


@quick
@given(sources, st.booleans())
def test_each_training_example_once_and_no_other(sources: list[list[int]], counted: bool) -> None:
    data = Data(sources, counted=counted)
    steps = list(data.steps(data.ledger()).share_of(0, 1, 0))
    expected = [(window, row) for window, count in enumerate(data.counts) for row in range(count)]
    assert sorted(names(steps)) == expected
    assert sum(step.examples for step in steps) == len(expected)


@quick
@given(sources, st.booleans(), st.sampled_from([2, 3, 4, 8, 120]))
def test_any_number_of_workers_sees_the_same_steps(
    sources: list[list[int]], counted: bool, workers: int
) -> None:
    data = Data(sources, counted=counted)
    alone = list(data.steps(data.ledger()).share_of(0, 1, 0))
    shares = [list(data.steps(data.ledger()).share_of(rank, workers, 0)) for rank in range(workers)]
    for step, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert {part.digest for part in parts} == {step.digest}
        assert sorted(names(parts)) == sorted(names([step]))
        assert {part.examples for part in parts} == {step.examples}


@quick
@given(sources, st.booleans(), st.integers(1, 3), st.data())
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(
    sources: list[list[int]], counted: bool, epochs: int, drawn: st.DataObject
) -> None:
    data = Data(sources, counted=counted)
    whole = list(data.steps(data.ledger(), epochs=epochs).share_of(0, 1, 0))
    kill = drawn.draw(st.integers(0, len(whole)))
    before = data.ledger()
    running = data.steps(before, epochs=epochs).share_of(0, 1, 0)
    first = [next(running) for _ in range(kill)]
    kept = json.loads(json.dumps(before.to_json()))
    running.close()  # type: ignore[attr-defined]
    after = data.ledger()
    after.restore(kept)
    rest = list(data.steps(after, epochs=epochs).share_of(0, 1, kill))
    assert [step.digest for step in [*first, *rest]] == [step.digest for step in whole]
    assert names([*first, *rest]) == names(whole)


def test_a_resumed_run_reads_little_again() -> None:
    data = Data([[300] * 40])
    ledger = data.ledger()
    running = data.steps(ledger, sequences=100).share_of(0, 1, 0)
    for _ in range(90):
        next(running)
    consumed = set(data.opened)
    data.opened.clear()
    rest = list(data.steps(ledger, sequences=100).share_of(0, 1, 90))
    assert len(rest) == 30
    # Of the 30 windows that are through, only what is left of a pool and a block is read again.
    assert len(consumed) >= 30
    assert len(consumed & set(data.opened)) <= 2 * POOL_WINDOWS
    assert len(data.opened) == len(set(data.opened))


def test_the_run_ends_with_its_steps_in_the_middle_of_an_epoch() -> None:
    data = Data([[7, 6, 5]])
    steps = data.steps(data.ledger(), epochs=None, steps=7)
    assert len(list(steps.share_of(0, 1, 0))) == 7
    assert len(list(steps.share_of(0, 1, 5))) == 2
    assert list(steps.share_of(0, 1, 7)) == []


def test_a_window_with_other_counts_than_before() -> None:
    data = Data([[7, 6]])
    ledger = data.ledger()
    list(data.steps(ledger).share_of(0, 1, 0))
    data.counts[0] = 8
    with pytest.raises(DataError, match="has 8 training examples and had 7 when it was first read"):
        list(data.steps(ledger, epochs=2).share_of(0, 1, 0))


def test_no_training_example_after_all() -> None:
    data = Data([[7, 6]])
    data.counts[:] = [0, 0]
    with pytest.raises(DataError, match="an epoch has no training example"):
        list(data.steps(data.ledger(), epochs=None, steps=5).share_of(0, 1, 0))


class TestAhead:
    def test_gives_all_in_order(self) -> None:
        with ahead(range(50)) as coming:
            assert list(coming) == list(range(50))

    def test_an_error_comes_where_the_step_would(self) -> None:
        def broken() -> Iterator[int]:
            yield 1
            raise DataError("gone")

        with ahead(broken()) as coming:
            assert next(coming) == 1
            with pytest.raises(DataError, match="gone"):
                next(coming)

    def test_leaving_early_closes_the_source(self) -> None:
        closed = []

        def endless() -> Iterator[int]:
            try:
                yield from itertools.count()
            finally:
                closed.append(True)

        with ahead(endless()) as coming:
            assert next(coming) == 0
        assert closed == [True]
