"""Packing: which examples share a row. Pure functions on lengths; no torch, no ray."""

from bisect import bisect_left
from collections.abc import Sequence


def pack_first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group example indices into rows of at most `capacity` tokens, longest first.

    Each example goes to the first row that has room, so the number of rows is at most 11/9 of the best
    possible plus one (first-fit decreasing; Johnson 1973). Ties keep the given order, so that the result is a
    function of the lengths alone.

    >>> pack_first_fit([5, 3, 4, 2], capacity=7)
    [[0, 3], [2, 1]]

    Raises:
        ValueError: a length is above the capacity.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    places = _first_fit([lengths[index] for index in longest_first], capacity)
    rows: list[list[int]] = [[] for _ in range(max(places, default=-1) + 1)]
    for index, row in zip(longest_first, places, strict=True):
        rows[row].append(index)
    return rows


def _first_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """The row of each example; the longest comes first."""
    if lengths and lengths[0] > capacity:
        raise ValueError(f"an example of {lengths[0]} tokens does not fit a row of {capacity}")
    room: list[int] = []
    places = []
    for length in lengths:
        for row, free in enumerate(room):
            if free >= length:
                room[row] = free - length
                places.append(row)
                break
        else:
            places.append(len(room))
            room.append(capacity - length)
    return places


def balanced_capacity(lengths: Sequence[int], capacity: int) -> int:
    """A short row length, at most `capacity`, at which the examples need no more rows than at `capacity`.

    Rows of a batch are as long as its longest, so evening them out removes the padding of the last row.

    >>> balanced_capacity([5, 5, 4, 4, 3, 3], capacity=16)
    13
    """
    longest_first = sorted(lengths, reverse=True)
    last = max(_first_fit(longest_first, capacity))
    candidates = range(max(longest_first[0], -(-sum(lengths) // (last + 1))), capacity)
    found = bisect_left(candidates, True, key=lambda size: max(_first_fit(longest_first, size)) <= last)
    return candidates[found] if found < len(candidates) else capacity


def share(lengths: Sequence[int], workers: int) -> list[list[int]]:
    """Divide the examples of a step among workers, so that each has about as many tokens.

    The longest example goes first, always to the worker with the fewest tokens so far; the most that one
    gets is then at most 4/3 of the best possible (Graham 1969). Ties go by the given order, so that the
    result is a function of the arguments alone. Each share keeps the given order; with fewer examples than
    workers some shares are empty.

    >>> share([5, 3, 4, 2], workers=2)
    [[0, 3], [1, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(workers)]
    tokens = [0] * workers
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        worker = min(range(workers), key=tokens.__getitem__)
        shares[worker].append(index)
        tokens[worker] += lengths[index]
    return [sorted(indices) for indices in shares]
