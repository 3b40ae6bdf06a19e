"""Which examples share a row, and which worker takes which."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.pack import balanced_capacity, pack_first_fit, share

some_lengths = st.lists(st.integers(1, 64), min_size=1, max_size=40)


@given(some_lengths, st.integers(64, 200))
def test_rows_hold_every_example_once_and_none_too_many_tokens(lengths: list[int], capacity: int) -> None:
    rows = pack_first_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)


@given(some_lengths, st.integers(64, 200))
def test_a_balanced_row_needs_no_more_rows(lengths: list[int], capacity: int) -> None:
    shorter = balanced_capacity(lengths, capacity)
    assert shorter <= capacity
    assert len(pack_first_fit(lengths, shorter)) <= len(pack_first_fit(lengths, capacity))


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit a row of 8"):
        pack_first_fit([3, 9], 8)


@given(st.lists(st.integers(1, 64), max_size=40), st.integers(1, 9))
def test_every_example_goes_to_one_worker_in_the_given_order(lengths: list[int], workers: int) -> None:
    shares = share(lengths, workers)
    assert len(shares) == workers
    assert sorted(index for each in shares for index in each) == list(range(len(lengths)))
    assert all(each == sorted(each) for each in shares)
    assert sum(bool(each) for each in shares) == min(workers, len(lengths))


@given(some_lengths)
def test_a_single_worker_takes_all_as_they_stand(lengths: list[int]) -> None:
    assert share(lengths, 1) == [list(range(len(lengths)))]


@given(some_lengths, st.integers(1, 9))
def test_no_worker_has_more_than_another_by_a_whole_example(lengths: list[int], workers: int) -> None:
    tokens = [sum(lengths[index] for index in each) for each in share(lengths, workers)]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(2, 3))
def test_the_largest_share_keeps_grahams_bound(lengths: list[int], workers: int) -> None:
    found = max(sum(lengths[index] for index in each) for each in share(lengths, workers))
    best = min(
        max(sum(n for n, w in zip(lengths, taken, strict=True) if w == worker) for worker in range(workers))
        for taken in product(range(workers), repeat=len(lengths))
    )
    assert found <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9
