"""Windows: the parts of the objects that are read, tokenised, cached and streamed each by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WINDOW_BYTES = 512 << 10
"""About how much of an object a window covers, where its format can be divided."""

Unit = Literal["object", "bytes", "row_groups", "batches"]


@dataclass(frozen=True, slots=True)
class Window:
    """A part of one object, small enough to be held in memory.

    The windows of an object have every record of it exactly once.
    """

    object: int
    """Index of its object among those of the job."""
    source: int
    """Index of its object's source in `data.sources`."""
    part: int
    """Its place among the windows of its object: 0, 1, …"""
    unit: Unit
    """What `start` and `stop` count. `object` is the whole of it, which is read from its beginning."""
    start: int
    stop: int
    size_bytes: int
    """About what reading it takes; windows are weighed by it until their examples are counted."""
    format: str
    """What its object is read as."""
    context: str = ""
    """What its records share that stands elsewhere in the object: a header, a definition."""


def byte_ranges(size_bytes: int, window_bytes: int) -> tuple[tuple[int, int], ...]:
    """Cut [0, size_bytes) into ranges of `window_bytes`; a last one of less than half joins the one before.

    >>> byte_ranges(10, 4)
    ((0, 4), (4, 8), (8, 10))
    >>> byte_ranges(9, 4)
    ((0, 4), (4, 9))
    """
    count = max(1, (2 * size_bytes + window_bytes) // (2 * window_bytes))
    starts = [number * window_bytes for number in range(count)]
    return tuple(zip(starts, [*starts[1:], size_bytes], strict=True))


def group(sizes_bytes: Sequence[int], window_bytes: int) -> tuple[tuple[int, int], ...]:
    """Ranges of consecutive parts that have up to `window_bytes` together, or are one larger part.

    >>> group([3, 3, 3, 9, 1], 6)
    ((0, 2), (2, 3), (3, 4), (4, 5))
    """
    starts = [0] if sizes_bytes else []
    taken_bytes = 0
    for number, size_bytes in enumerate(sizes_bytes):
        if number > starts[-1] and taken_bytes + size_bytes > window_bytes:
            starts.append(number)
            taken_bytes = 0
        taken_bytes += size_bytes
    return tuple(zip(starts, [*starts[1:], len(sizes_bytes)][: len(starts)], strict=True))
