"""Which windows a task of the stream reads."""

from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.stream import groups_of
from raytune_ft.data.windows import WINDOW_BYTES

sizes = st.lists(st.integers(0, 3 * WINDOW_BYTES), max_size=300)


@given(sizes_bytes=sizes, at_once=st.integers(1, 64))
def test_each_window_is_read_once_and_in_order(sizes_bytes: list[int], at_once: int) -> None:
    groups = groups_of(sizes_bytes, at_once)
    assert [place for group in groups for place in group] == list(range(len(sizes_bytes)))
    assert all(1 <= len(group) <= 64 for group in groups)


@given(at_once=st.integers(1, 64), windows=st.integers(1, 2000))
def test_tasks_are_short_at_both_ends_and_long_between(at_once: int, windows: int) -> None:
    lengths = [len(group) for group in groups_of([WINDOW_BYTES] * windows, at_once)]
    assert lengths[0] == lengths[-1] == 1
    assert max(lengths) <= 24
    # Who comes to the end last does no more than the others' share.
    left = windows
    for length in lengths:
        assert length <= max(1, left / (2 * at_once))
        left -= length


def test_large_data_has_few_tasks() -> None:
    lengths = [len(group) for group in groups_of([WINDOW_BYTES] * 2000, 2)]
    assert len(lengths) < 110
    assert lengths.count(24) > 72
