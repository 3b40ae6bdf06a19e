"""Windows of data through Ray Data: read, tokenised and handed over in a given order, in bounded memory."""

import gc
import logging
import os
import pickle
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
import ray.data.exceptions
import ray.exceptions

from raytune_ft.data.reader import WindowReader, task_cpus
from raytune_ft.data.windows import WINDOW_BYTES, Window
from raytune_ft.errors import RaytuneError, TrainingError

if TYPE_CHECKING:
    from ray.data import Dataset

STREAM_BYTES = 64 << 20
"""What an execution may hold in Ray's object store: how far it reads ahead."""
SEGMENT_WINDOWS = 2000
"""Windows of one execution, so that the plan of it stays small however much data there is."""
_TASK_WINDOWS = 64
_TASK_BYTES = 12 << 20
"""Of the data that a task reads. Between two of them a core waits for the process that runs the execution."""
Contents = Generator[tuple[int, pa.Buffer], None, None]
"""Places of windows with their contents. Closing it ends the execution."""
_ROW = pa.schema([("window", pa.int64()), ("content", pa.large_binary()), ("failure", pa.binary())])


def cluster_task_cpus() -> float:
    """`task_cpus` of the largest node of this cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return task_cpus(max((node.get("CPU", 0.0) for node in nodes), default=0.0))


def stream_windows(windows: Sequence[Window], reader: WindowReader) -> Contents:
    """Read windows on the cluster, ahead of whoever takes them. Ray must be initialised.

    Args:
        windows: in the order in which they are wanted; one may stand there several times.
        reader: reads each of them.

    Yields:
        The window's place in `windows`, 0, 1, …, and its content; see `raytune_ft.data.examples.decode`.

    Raises:
        DataError: a window cannot be read.
        StorageError: the store failed.
        TrainingError: Ray lost the tasks.
    """
    for begin in range(0, len(windows), SEGMENT_WINDOWS):
        yield from _segment(begin, windows[begin : begin + SEGMENT_WINDOWS], reader)


def _segment(begin: int, windows: Sequence[Window], reader: WindowReader) -> Contents:
    """One execution of Ray Data."""
    batches = iter(_dataset(windows, reader).iter_batches(batch_size=None, batch_format="pyarrow"))
    try:
        for batch in batches:
            for place, content, failure in zip(*(batch[name] for name in _ROW.names), strict=True):
                if failure.is_valid:
                    raise pickle.loads(failure.as_py())  # noqa: S301  of _read_windows
                yield begin + place.as_py(), content.as_buffer()
    except (ray.exceptions.RayError, ray.data.exceptions.UserCodeException) as error:
        raise TrainingError(f"the data could not be read: {ray_reason(error)}") from error
    finally:
        batches.close()


def _dataset(windows: Sequence[Window], reader: WindowReader) -> "Dataset":
    # It would say, among other things, that it shows no progress bars.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Tasks ask for less than they use, to find room beside training; there are no more of them than CPUs.
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1.0)))
    groups = groups_of([window.size_bytes for window in windows], at_once)
    # Other sources have tasks of their own that want a whole CPU, which training may not leave.
    numbered = [{"id": group} for group in range(len(groups))]
    dataset = ray.data.from_items(numbered, override_num_blocks=len(groups)).map_batches(
        partial(_read_windows, windows=tuple(windows), groups=groups, reader=reader),
        batch_size=None,
        num_cpus=cluster_task_cpus(),
        concurrency=max(1, min(len(groups), at_once)),
    )
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=STREAM_BYTES)
    dataset.context.enable_progress_bars = False
    return dataset


def groups_of(sizes_bytes: Sequence[int], at_once: int) -> tuple[range, ...]:
    """Places that follow each other and that one task reads: starting a task takes as long as reading a small
    window. They are short at the beginning, where somebody waits for the first, and at the end, where others
    would wait for the last.

    Args:
        sizes_bytes: of the windows.
        at_once: tasks that run side by side.
    """
    groups: list[range] = []
    before_bytes, size_bytes, total_bytes = 0, 0, sum(sizes_bytes)
    for place, window_bytes in enumerate(sizes_bytes):
        size_bytes += window_bytes
        share_bytes = min(before_bytes // at_once, (total_bytes - before_bytes) // (2 * at_once))
        limit_bytes = min(max(share_bytes, WINDOW_BYTES), _TASK_BYTES)
        if groups and size_bytes <= limit_bytes and len(groups[-1]) < _TASK_WINDOWS:
            groups[-1] = range(groups[-1].start, place + 1)
        else:
            groups.append(range(place, place + 1))
            before_bytes += size_bytes - window_bytes
            size_bytes = window_bytes
    return tuple(groups)


def _read_windows(
    batch: dict[str, Any], windows: Sequence[Window], groups: Sequence[range], reader: WindowReader
) -> Iterator[pa.Table]:
    """A task of the stream: a row for each of its windows, up to one that cannot be read.

    It yields, since Ray hides what an ordinary function raises.
    """
    # A task has one CPU; the tokenizer would start a thread for each of the machine's.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows: list[dict[str, Any]] = []
    # Records hold no cycles: the collector would go through them again and again, and find nothing.
    gc.disable()
    try:
        for place in (place for group in batch["id"].tolist() for place in groups[group]):
            rows.append({"window": place, "content": reader.read(windows[place]), "failure": None})
    except RaytuneError as error:
        # As a row, since an exception inside Ray is printed with its traceback and tried again.
        rows.append({"window": place, "content": b"", "failure": pickle.dumps(error)})
    finally:
        gc.enable()
    # One block: each costs the process that runs the execution as much as placing a few steps does.
    yield pa.Table.from_pylist(rows, schema=_ROW)


def ray_reason(error: Exception) -> str:
    """What was behind an exception of Ray, in one line."""
    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and cause.cause is not None:
        cause = cause.cause
    reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no reason given")
    return f"{type(cause).__name__}: {reason[:300]}"
