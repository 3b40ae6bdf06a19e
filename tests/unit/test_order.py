"""The order of the data as a pure function."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.mixture import SourceShape, shares
from raytune_ft.data.order import BLOCK_EXAMPLES, POOL_WINDOWS, Course, EpochPlan, plan_course
from raytune_ft.data.pack import balanced_capacity, pack_first_fit
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec, MixtureSpec, SourceSpec

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)
windows = st.lists(st.integers(0, 30), min_size=1, max_size=12)
seeds = st.integers(0, 2**63 - 1)

Example = tuple[int, int]
"""Window, and place among its training examples."""


class Given:
    """Windows with known numbers of examples, as a course sees them."""

    def __init__(self, sources: Sequence[Sequence[int]], *, counted: bool, **settings: object) -> None:
        self.examples = [count for source in sources for count in source]
        shapes, first = [], 0
        for counts in sources:
            # Streamed windows are weighed by bytes, which say little of how many examples they hold.
            sizes = tuple(counts) if counted else tuple(100 + 7 * (at % 3) for at in range(len(counts)))
            shapes.append(SourceShape(tuple(range(first, first + len(counts))), sizes, sum(counts)))
            first += len(counts)
        weights = settings.pop("weights", [1.0] * len(sources))
        data = DataSpec(
            sources=tuple(SourceSpec(uri=f"s{at}", weight=w) for at, w in enumerate(weights)),  # type: ignore[arg-type, var-annotated]
            mixture=settings.pop("mixture", MixtureSpec()),  # type: ignore[arg-type]
            seed=settings.pop("seed", 0),  # type: ignore[arg-type]
        )
        chosen = {"sequences_per_step": 8, "epochs": None, "steps": None, **settings}
        self.course: Course = plan_course(shapes, data, counted=counted, **chosen)  # type: ignore[arg-type]

    def epoch(self, epoch: int) -> list[list[Example]]:
        plan = EpochPlan(self.course, epoch)
        return [
            [(plan.readings[reading].window, row) for reading, row in zip(*pairs, strict=True)]
            for step in plan.steps(self.examples.__getitem__)
            for pairs in [(step.readings.tolist(), step.rows.tolist())]
        ]

    def flat(self, epoch: int) -> list[Example]:
        return [example for step in self.epoch(epoch) for example in step]

    def all_examples(self) -> list[Example]:
        return [(window, row) for window, count in enumerate(self.examples) for row in range(count)]


@st.composite
def data(draw: st.DrawFn) -> Given:
    sources = draw(st.lists(windows.filter(any), min_size=1, max_size=4))
    return Given(sources, counted=draw(st.booleans()), seed=draw(seeds))


@given(data(), st.integers(0, 5))
def test_each_example_exactly_once_per_epoch(found: Given, epoch: int) -> None:
    assert sorted(found.flat(epoch)) == found.all_examples()


@given(data(), st.integers(0, 3))
def test_only_the_last_step_of_an_epoch_is_short(found: Given, epoch: int) -> None:
    sizes = [len(step) for step in found.epoch(epoch)]
    assert all(size == 8 for size in sizes[:-1])
    assert 1 <= sizes[-1] <= 8


@given(st.lists(windows.filter(any), min_size=1, max_size=4), st.integers(1, 3))
def test_the_number_of_steps_is_known_where_examples_are_counted(
    sources: list[list[int]], epochs: int
) -> None:
    found = Given(sources, counted=True, epochs=epochs)
    assert found.course.total_steps == sum(len(found.epoch(epoch)) for epoch in range(epochs))


@given(
    st.lists(windows.filter(any), min_size=2, max_size=3),
    st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.7, 2.0, 3.0]), min_size=3, max_size=3),
    st.booleans(),
)
def test_weights_are_exact_over_epochs(sources: list[list[int]], weights: list[float], counted: bool) -> None:
    found = Given(sources, counted=counted, weights=weights[: len(sources)])
    seen = Counter(example for epoch in range(4) for example in found.flat(epoch))
    first = 0
    for source, weight in zip(sources, weights, strict=False):
        examples = [(first + at, row) for at, count in enumerate(source) for row in range(count)]
        passes = [seen[example] for example in examples]
        # Each pass is through before the next begins: no example is ever two ahead of another.
        assert max(passes) - min(passes) <= 1
        if counted:
            assert sum(passes) == round(4 * max(weight * len(examples), 1))
        first += len(source)


@given(
    st.lists(st.integers(1, 3000), min_size=2, max_size=5),
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=5, max_size=5),
)
def test_sources_stand_in_exact_proportion_in_each_block(sizes: list[int], weights: list[float]) -> None:
    found = Given([[size] for size in sizes], counted=True, weights=weights[: len(sizes)])
    plan = EpochPlan(found.course, 0)
    rates = np.array([size * weight for size, weight in zip(sizes, weights, strict=False)])
    rates /= rates.sum()
    blocks = list(plan.blocks(found.examples.__getitem__))
    for block in blocks[: max(0, len(blocks) - len(sizes) - 1)]:
        given = Counter(plan.readings[reading].source for reading in block.readings.tolist())
        for source, rate in enumerate(rates):
            # Less than one of remainder at each end of the block.
            assert abs(given[source] - BLOCK_EXAMPLES * rate) < 2


def test_a_new_order_each_epoch_and_seed() -> None:
    for counted in (True, False):
        given = [Given([[50, 50]], counted=counted, seed=seed) for seed in range(3)]
        assert len({tuple(found.flat(epoch)) for found in given for epoch in range(3)}) == 9


def test_small_data_is_shuffled_over_its_whole_length() -> None:
    order = [window for window, _ in Given([[20] * 40], counted=True).flat(0)]
    first_half = sum(window < 20 for window in order[: len(order) // 2])
    assert abs(first_half - len(order) / 4) < 50


def test_streamed_windows_are_needed_in_the_order_of_the_readings() -> None:
    found = Given([[600] * 40, [700] * 10], counted=False)
    asked: list[int] = []

    def count_of(window: int) -> int:
        asked.append(window)
        return found.examples[window]

    plan = EpochPlan(found.course, 0)
    steps = plan.steps(count_of)
    next(steps)
    # The first step needs one pool of each source, not the whole of any.
    assert len(asked) <= 2 * found.course.pool_windows  # type: ignore[operator]
    for _ in steps:
        pass
    assert asked == [reading.window for reading in plan.readings]


def test_estimates_that_are_off_hold_no_more_windows() -> None:
    # The second source has a tenth of the examples that its bytes promise.
    found = Given([[300] * 40, [30] * 40], counted=False)
    plan = EpochPlan(found.course, 0)
    left: dict[int, int] = {}

    def count_of(window: int) -> int:
        left[len(left)] = found.examples[window]
        return found.examples[window]

    most = 0
    for step in plan.steps(count_of):
        most = max(most, sum(bool(examples) for examples in left.values()))
        for reading in step.readings.tolist():
            left[reading] -= 1
    assert len(left) == 80
    assert most <= 3 * POOL_WINDOWS


def test_the_order_is_pinned() -> None:
    # A change here changes every adapter; it must be a decision, never an accident.
    found = Given([[5, 0, 4], [3]], counted=True, seed=7)
    assert found.flat(0) == PINNED
    digest = hashlib.sha256(repr(Given([[9] * 30, [40] * 4], counted=False).flat(1)).encode()).hexdigest()
    assert digest[:16] == PINNED_STREAM


PINNED: list[Example] = [
    (0, 2),
    (2, 2),
    (0, 3),
    (2, 1),
    (0, 0),
    (3, 0),
    (3, 1),
    (0, 4),
    (3, 2),
    (0, 1),
    (2, 0),
    (2, 3),
]
PINNED_STREAM = "65ad6a9abe2422e8"


def test_epochs_share_no_step() -> None:
    found = Given([[5]], counted=True, sequences_per_step=2, epochs=2)
    assert [len(step) for epoch in range(2) for step in found.epoch(epoch)] == [2, 2, 1, 2, 2, 1]


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="training split is empty"):
        Given([[0]], counted=True)


class TestMixtures:
    def shares(
        self, *, weights: Sequence[float] = (1.0, 1.0), steps: int | None = None, **spec: object
    ) -> list[float]:
        sources = [SourceShape((0,), (900,), 900), SourceShape((1,), (100,), 100)]
        return [float(share) for share in shares(sources, weights, MixtureSpec.model_validate(spec), steps)]

    def test_an_epoch_is_each_example_once(self) -> None:
        assert self.shares() == [900, 100]

    def test_a_cap_limits_the_large_source(self) -> None:
        assert self.shares(cap=200) == [200, 100]

    def test_temperature_keeps_the_length_and_lifts_the_small_source(self) -> None:
        large, small = self.shares(temperature=2.0)
        assert large + small == pytest.approx(1000)
        assert large / small == pytest.approx(3.0)

    def test_first_exhausted(self) -> None:
        assert self.shares(stop="first_exhausted", weights=(1.0, 4.0)) == [225, 100]

    def test_all_exhausted(self) -> None:
        assert self.shares(stop="all_exhausted", weights=(1.0, 4.0)) == [900, 400]

    def test_steps_make_one_epoch_of_the_run(self) -> None:
        assert self.shares(stop="steps", steps=5000) == [4500, 500]
        found = Given([[90], [10]], counted=True, mixture=MixtureSpec(stop="steps"), steps=100)
        assert all(len(step) == 8 for step in found.epoch(0))
        assert len(found.epoch(0)) == 100

    @given(st.sampled_from(["first_exhausted", "all_exhausted"]), st.floats(1.0, 5.0), st.booleans())
    def test_exhausted_means_seen_once(self, stop: str, temperature: float, counted: bool) -> None:
        mixture = MixtureSpec.model_validate({"stop": stop, "temperature": temperature})
        found = Given([[60, 40], [7, 6], [1]], counted=counted, mixture=mixture)
        seen = Counter(found.flat(0))
        missed = [
            any(seen[w, row] == 0 for w in part for row in range(found.examples[w]))
            for part in ((0, 1), (2, 3), (4,))
        ]
        assert not all(missed)
        if stop == "all_exhausted":
            assert not any(missed)
        else:
            assert max(seen.values()) == 1

    def test_task_epochs(self) -> None:
        found = Given(
            [[900], [100]], counted=True, mixture=MixtureSpec(stop="all_exhausted"), weights=[1.0, 4.0]
        )
        assert found.course.task_epochs == (1.0, 4.0)


@given(lengths, st.integers(50, 200))
def test_packing_keeps_everything_and_the_capacity(lengths: list[int], capacity: int) -> None:
    rows = pack_first_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    # Any two rows together exceed the capacity, or first fit would have joined them.
    loads = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(lengths, st.integers(50, 200))
def test_a_balanced_capacity_needs_no_more_rows(lengths: list[int], capacity: int) -> None:
    shorter = balanced_capacity(lengths, capacity)
    assert shorter <= capacity
    assert len(pack_first_fit(lengths, shorter)) <= len(pack_first_fit(lengths, capacity))


def test_an_example_above_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens does not fit a row of 8"):
        pack_first_fit([9], 8)
