"""Which windows are read before training, and reading them: in this process or on the cluster."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions

from raytune_ft.data.access import store_at
from raytune_ft.data.counts import Survey, WindowReport
from raytune_ft.data.examples import decode
from raytune_ft.data.index import divide
from raytune_ft.data.order import POOL_WINDOWS, window_order
from raytune_ft.data.reader import WindowReader
from raytune_ft.data.stream import Contents, cluster_task_cpus, ray_reason, stream_windows
from raytune_ft.data.windows import WINDOW_BYTES, Window
from raytune_ft.errors import RaytuneError, TrainingError

SURVEY_BYTES = 64 << 20
"""Data up to this size is read as a whole before training, and its contents stay on the cluster."""
HERE_BYTES = 4 << 20
"""A process that trains meanwhile reads data up to this size itself: starting tasks takes longer."""
SAMPLE_BYTES = POOL_WINDOWS * WINDOW_BYTES
"""About how much of larger data is read before training; of each source at least a window."""
SAMPLE_WINDOWS = 256
"""How many files a sample of very small ones has at most, of each source."""
KEPT_BYTES = 64 << 20
"""Contents of a sample that stay on the cluster: its windows may be whole objects, and there may be many."""
_DIVIDED_HERE = 16
"""Up to so many objects it takes longer to start tasks than to divide them."""
_READ_HERE = 16
"""Up to so many windows, of SAMPLE_BYTES together, it takes longer to start tasks than to read them."""
_OBJECTS_PER_TASK = 64

Kept = Any
"""A reference into Ray's object store, or the content itself as a `pa.Buffer`; see `content_of`."""


def content_of(kept: Kept) -> pa.Buffer:
    """The content of a window that was kept; see `raytune_ft.data.examples.decode`."""
    found: pa.Buffer = kept if isinstance(kept, pa.Buffer) else ray.get(kept)
    return found


def surveyed(windows: Sequence[Window], seed: int) -> list[int]:
    """Which windows are read before training: all, or those of each source that an epoch begins with.

    They are drawn at random, as a sample should be, and training needs nothing more for its first steps.
    """
    if sum(window.size_bytes for window in windows) <= SURVEY_BYTES:
        return list(range(len(windows)))
    of_source = Survey(windows, {}).numbers
    chosen = []
    for source, numbers in of_source.items():
        order = window_order(len(numbers), seed, source, task_epoch=0)
        in_order = [numbers[at] for at in order.tolist()]
        # A file without content tells nothing of the others.
        filled = [number for number in in_order if windows[number].size_bytes] or in_order
        chosen += _sample(filled, windows, SAMPLE_BYTES // len(of_source))
    return sorted(chosen)


def _sample(numbers: Sequence[int], windows: Sequence[Window], size_bytes: int) -> list[int]:
    """The first windows that have so many bytes; of very small files no more than SAMPLE_WINDOWS."""
    taken: list[int] = []
    taken_bytes = 0
    for number in numbers[:SAMPLE_WINDOWS]:
        if taken and taken_bytes >= size_bytes:
            break
        taken.append(number)
        taken_bytes += windows[number].size_bytes
    return taken


def divide_all(reader: WindowReader) -> tuple[Window, ...]:
    """The windows of all objects, sorted by object and part.

    Raises:
        DataError: an object is of no known format, or too large to be read as a whole.
        StorageError: the store failed.
        TrainingError: Ray lost the tasks.
    """
    numbers = range(len(reader.objects))
    if len(numbers) <= _DIVIDED_HERE:
        return tuple(_divide(numbers, reader))
    chunks = [numbers[at : at + _OBJECTS_PER_TASK] for at in range(0, len(numbers), _OBJECTS_PER_TASK)]
    shared = ray.put(reader)
    task = _divide_remotely.options(num_cpus=cluster_task_cpus())
    try:
        divided = ray.get([task.remote(chunk, shared) for chunk in chunks])
    except ray.exceptions.RayError as error:
        raise TrainingError(f"the data could not be divided: {ray_reason(error)}") from error
    windows: list[Window] = []
    for found in divided:
        if isinstance(found, RaytuneError):
            raise found
        windows += found
    return tuple(windows)


def _divide(numbers: Sequence[int], reader: WindowReader) -> Iterator[Window]:
    cache = None if reader.cache is None else store_at(reader.cache)
    for number in numbers:
        found = reader.objects[number]
        yield from divide(found, number, reader.data.sources[found.source].format, cache)


@ray.remote  # type: ignore[untyped-decorator]  # ray ships no types
def _divide_remotely(numbers: Sequence[int], reader: WindowReader) -> list[Window] | RaytuneError:
    try:
        return list(_divide(numbers, reader))
    except RaytuneError as error:
        # As a value, since Ray would print it with its traceback.
        return error


def read_windows(
    windows: Sequence[Window], chosen: Sequence[int], reader: WindowReader, *, here: bool
) -> tuple[dict[int, Kept], dict[int, WindowReport]]:
    """Contents and reports of some windows, by their numbers.

    Args:
        windows: all of the data.
        chosen: numbers of those to read.
        reader: reads any of them.
        here: see `raytune_ft.data.prepare.prepare`.

    Raises:
        DataError: an object cannot be read.
        StorageError: the store failed.
        TrainingError: Ray lost the tasks.
    """
    contents: dict[int, Kept] = {}
    reports: dict[int, WindowReport] = {}
    kept_bytes = 0
    complete = len(chosen) == len(windows)
    wanted = [windows[number] for number in chosen]
    stays = here and _size_bytes(wanted) <= HERE_BYTES
    for place, content in contents_of(wanted, reader, here=here):
        number = chosen[place]
        reports[number] = decode(content).report
        if complete or kept_bytes + content.size <= KEPT_BYTES:
            # A copy of its own, since the execution's goes away with it.
            contents[number] = content if stays else ray.put(content)
            kept_bytes += content.size
    return contents, reports


def _size_bytes(windows: Iterable[Window]) -> int:
    return sum(window.size_bytes for window in windows)


def contents_of(windows: Sequence[Window], reader: WindowReader, *, here: bool) -> Contents:
    """As `stream_windows`; what is soon read is read by this process."""
    few = here or len(windows) <= _READ_HERE
    if few and _size_bytes(windows) <= (HERE_BYTES if here else SAMPLE_BYTES):
        return ((place, pa.py_buffer(reader.read(window))) for place, window in enumerate(windows))
    return stream_windows(windows, reader)


def spread(size: int, limit: int) -> list[int]:
    """At most `limit` numbers below `size`, evenly over them."""
    return list(range(size)) if size <= limit else [at * size // limit for at in range(limit)]
