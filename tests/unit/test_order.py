"""The order of the data as a pure function."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.order import Mixture, epoch_order, plan_course
from raytune_ft.data.pack import balanced_capacity, pack_first_fit
from raytune_ft.errors import DataError

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)
lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(sizes, st.integers(0, 2**32), st.integers(0, 5))
def test_each_example_exactly_once_per_epoch(sizes: list[int], seed: int, epoch: int) -> None:
    mixture = Mixture(tuple(sizes), (1.0,) * len(sizes))
    assert sorted(epoch_order(mixture, seed, epoch).tolist()) == list(range(sum(sizes)))


@given(sizes, st.lists(st.floats(0.1, 3.0), min_size=4, max_size=4), st.integers(0, 100))
def test_weights_are_exact(sizes: list[int], weights: list[float], seed: int) -> None:
    mixture = Mixture(tuple(sizes), tuple(weights[: len(sizes)]))
    seen = Counter(epoch_order(mixture, seed, 0).tolist())
    first = 0
    for size, quota in zip(mixture.sizes, mixture.quotas, strict=True):
        counts = [seen[number] for number in range(first, first + size)]
        assert sum(counts) == quota
        assert not counts or max(counts) - min(counts) <= 1
        first += size


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 40), st.data())
def test_resuming_gives_the_steps_of_an_uninterrupted_run(
    n: int, batch: int, steps: int, data: st.DataObject
) -> None:
    course = plan_course(Mixture((n,), (1.0,)), seed=3, sequences_per_step=batch, epochs=None, steps=steps)
    whole = list(course.steps())
    start = data.draw(st.integers(0, steps))
    assert list(course.steps(start)) == whole[start:]
    assert len(whole) == steps


def test_a_new_order_each_epoch_and_seed() -> None:
    mixture = Mixture((100,), (1.0,))
    orders = {tuple(epoch_order(mixture, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_is_pinned() -> None:
    # A change here changes every adapter; it must be a decision, never an accident.
    assert epoch_order(Mixture((8,), (1.0,)), seed=0, epoch=0).tolist() == PINNED


PINNED = [7, 0, 4, 6, 1, 2, 3, 5]


def test_epochs_do_not_share_a_step() -> None:
    course = plan_course(Mixture((5,), (1.0,)), seed=0, sequences_per_step=2, epochs=2, steps=None)
    assert [len(step) for step in course.steps()] == [2, 2, 1, 2, 2, 1]


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="training split is empty"):
        plan_course(Mixture((0,), (1.0,)), seed=0, sequences_per_step=2, epochs=1, steps=None)


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
