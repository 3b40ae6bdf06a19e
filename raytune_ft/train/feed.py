"""Where workers get their windows: from Ray's object store, or from an execution that runs ahead of them."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import ray
import ray.exceptions
import ray.train.collective

from raytune_ft.data.examples import TokenisedWindow, decode
from raytune_ft.data.stream import stream_windows
from raytune_ft.data.survey import content_of
from raytune_ft.errors import RaytuneError
from raytune_ft.train.assignment import TrainingData
from raytune_ft.train.steps import OpenWindows

_CONTENTS_AHEAD = 2
_Stream = Callable[[Sequence[int]], Generator[Any, None, None]]
"""Contents of windows, in the order in which they are asked for."""


def open_feed(data: TrainingData, rank: int, workers: int) -> OpenWindows:
    """How a worker opens windows. All workers of a run have to call this, and then open the same ones.

    What was read before training is in Ray's object store. For the rest several workers share one execution,
    so that nothing is tokenised twice: an actor passes each window's content to all of them. Token ids are
    small beside what training on them takes.
    """
    if data.course.counted:
        stream: _Stream = _nothing
    elif workers == 1:
        stream = partial(_streamed, data)
    else:
        actor = ray.remote(num_cpus=0)(_SharedStream).remote(data, workers) if rank == 0 else None
        stream = _from_actor(ray.train.collective.broadcast_from_rank_zero(actor), rank)

    def open_windows(numbers: Sequence[int]) -> Iterator[TokenisedWindow]:
        coming = stream([number for number in numbers if number not in data.contents])
        try:
            for number in numbers:
                kept = data.contents.get(number)
                yield decode(next(coming) if kept is None else content_of(kept))
        finally:
            coming.close()

    return open_windows


def _nothing(_: Sequence[int]) -> Generator[Any, None, None]:
    yield from ()


def _streamed(data: TrainingData, numbers: Sequence[int]) -> Generator[Any, None, None]:
    with closing(stream_windows([data.windows[number] for number in numbers], data.reader)) as streamed:
        yield from (content for _, content in streamed)


def _from_actor(shared: Any, rank: int) -> _Stream:
    openings = count(1)

    def contents(numbers: Sequence[int]) -> Generator[Any, None, None]:
        opening = next(openings)
        shared.open.remote(rank, opening, list(numbers))
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
            yield ray.get(content)

    return contents


@dataclass
class _Opened:
    """Windows on their way to all workers."""

    stream: Generator[Any, None, None]
    arrived: int = 0
    waiting: dict[int, tuple[Any, set[int]]] = field(default_factory=dict)
    """Contents that not all workers have taken, and who has."""
    failure: RaytuneError | None = None
    """What ended the stream, for every worker that asks."""


class _SharedStream:
    """One execution for all workers of a run. It ends with the worker that started it."""

    def __init__(self, data: TrainingData, workers: int) -> None:
        self._data = data
        self._newest = [0] * workers
        """The opening that each worker reads."""
        self._opened: dict[int, _Opened] = {}

    def open(self, rank: int, opening: int, numbers: Sequence[int]) -> None:
        """Begin to stream; the first worker to ask does it for all."""
        if opening not in self._opened:
            self._opened[opening] = _Opened(_streamed(self._data, numbers))
        self._newest[rank] = opening
        for left in [earlier for earlier in self._opened if earlier < min(self._newest)]:
            self._opened.pop(left).stream.close()

    def content(self, rank: int, opening: int, at: int) -> list[Any]:
        """A reference to the content at a place of what was opened; each worker asks in order."""
        opened = self._opened[opening]
        if opened.failure:
            raise opened.failure
        if at == opened.arrived:
            try:
                opened.waiting[at] = (ray.put(next(opened.stream)), set())
            except RaytuneError as error:
                opened.failure = error
                raise
            opened.arrived += 1
        reference, taken = opened.waiting[at]
        taken.add(rank)
        if len(taken) == len(self._newest):
            del opened.waiting[at]
        return [reference]
