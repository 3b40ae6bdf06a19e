"""Where workers get their windows: from Ray's object store, or from an execution that runs ahead of them."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
import ray.train.collective

from raytune_ft.data.examples import TokenisedWindow, decode
from raytune_ft.data.reader import WindowReader
from raytune_ft.data.stream import stream_windows
from raytune_ft.data.windows import Window
from raytune_ft.train.assignment import TrainingData
from raytune_ft.train.steps import OpenWindows

_CONTENTS_AHEAD = 2


def open_feed(data: TrainingData, rank: int, workers: int) -> OpenWindows:
    """How a worker opens windows. All workers of a run have to call this, and then open the same ones.

    Several workers share one execution, so that nothing is tokenised twice: an actor passes each window's
    content to all of them through the object store. Token ids are small beside what training on them takes.
    """
    if data.course.counted:
        return lambda numbers: (decode(ray.get(data.contents[number])) for number in numbers)
    if workers == 1:
        return lambda numbers: _streamed(data.windows, data.reader, numbers)
    shared_stream = ray.remote(num_cpus=0)(_SharedStream)
    actor = shared_stream.remote(data.windows, data.reader, workers) if rank == 0 else None
    shared = ray.train.collective.broadcast_from_rank_zero(actor)
    return _from_actor(shared, rank)


def _streamed(
    windows: Sequence[Window], reader: WindowReader, numbers: Sequence[int]
) -> Iterator[TokenisedWindow]:
    streamed = stream_windows([windows[number] for number in numbers], reader)
    try:
        for _, content in streamed:
            yield decode(content)
    finally:
        streamed.close()


def _from_actor(shared: Any, rank: int) -> OpenWindows:
    opened = 0

    def contents(opening: int, numbers: Sequence[int]) -> Iterator[TokenisedWindow]:
        shared.open.remote(opening, list(numbers))
        asked = deque(
            shared.content.remote(rank, opening, at) for at in range(len(numbers[:_CONTENTS_AHEAD]))
        )
        for at in range(len(numbers)):
            try:
                (content,) = ray.get(asked.popleft())
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            if at + _CONTENTS_AHEAD < len(numbers):
                asked.append(shared.content.remote(rank, opening, at + _CONTENTS_AHEAD))
            yield decode(ray.get(content))

    def open_windows(numbers: Sequence[int]) -> Iterator[TokenisedWindow]:
        nonlocal opened
        opened += 1
        return contents(opened, numbers)

    return open_windows


@dataclass
class _Opened:
    """Windows on their way to all workers."""

    stream: Generator[tuple[int, Any], None, None]
    arrived: int = 0
    waiting: dict[int, tuple[Any, set[int]]] = field(default_factory=dict)
    """Contents that not all workers have taken, and who has."""


class _SharedStream:
    """One execution for all workers of a run. It ends with the worker that started it."""

    def __init__(self, windows: Sequence[Window], reader: WindowReader, workers: int) -> None:
        self._windows = windows
        self._reader = reader
        self._workers = workers
        self._opened: dict[int, _Opened] = {}

    def open(self, opening: int, numbers: Sequence[int]) -> None:
        """Begin to stream; the first worker to ask does it for all."""
        if opening not in self._opened:
            windows = [self._windows[number] for number in numbers]
            self._opened[opening] = _Opened(stream_windows(windows, self._reader))
            # Workers are a few steps apart at most: nobody is two epochs behind.
            if before := self._opened.pop(opening - 2, None):
                before.stream.close()

    def content(self, rank: int, opening: int, at: int) -> list[Any]:
        """A reference to the content at a place of what was opened; each worker asks in order."""
        opened = self._opened[opening]
        if at == opened.arrived:
            _, content = next(opened.stream)
            opened.waiting[at] = (ray.put(content), set())
            opened.arrived += 1
        reference, taken = opened.waiting[at]
        taken.add(rank)
        if len(taken) == self._workers:
            del opened.waiting[at]
        return [reference]
