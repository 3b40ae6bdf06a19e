"""Events and failures from the workers to the driver, through the cluster's key-value store.

The store lives in Ray's control service, so a watcher needs no actor of its own, and an event outlives the
worker that wrote it.
"""

import json
import pickle
from collections.abc import Iterator
from typing import Any

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from raytune_ft.errors import RaytuneError

Event = dict[str, Any]


def _key(channel: str, name: int | str) -> bytes:
    return f"raytune_ft/{channel}/{name}".encode()


def record_failure(channel: str, error: RaytuneError) -> None:
    """Note why a run cannot go on; the first to note it is kept."""
    _internal_kv_put(_key(channel, "failure"), pickle.dumps(error), overwrite=False)


def recorded_failure(channel: str) -> RaytuneError | None:
    """What a worker of this launch noted, in any attempt."""
    noted = _internal_kv_get(_key(channel, "failure"))
    if noted is None:
        return None
    error: RaytuneError = pickle.loads(noted)  # noqa: S301  written by `record_failure` in this cluster
    return error


class EventWriter:
    """The worker's end: events are numbered from the first one that this process writes."""

    def __init__(self, channel: str) -> None:
        self._channel = channel
        self._next = int(_internal_kv_get(_key(channel, -1)) or 0)

    def write(self, event: Event) -> None:
        """Append one event."""
        _internal_kv_put(_key(self._channel, self._next), json.dumps(event).encode(), overwrite=True)
        self._next += 1
        # Where the next one goes, for a worker that takes over after this one was lost.
        _internal_kv_put(_key(self._channel, -1), str(self._next).encode(), overwrite=True)


class EventReader:
    """The driver's end: reads each event once and removes it."""

    def __init__(self, channel: str) -> None:
        self._channel = channel
        self._next = 0

    def read(self) -> Iterator[Event]:
        """Events that have come since the last call, in their order."""
        while (value := _internal_kv_get(_key(self._channel, self._next))) is not None:
            _internal_kv_del(_key(self._channel, self._next))
            self._next += 1
            yield json.loads(value)

    def close(self) -> None:
        """Leave nothing in the store."""
        for _ in self.read():
            pass
        for name in (-1, "failure"):
            _internal_kv_del(_key(self._channel, name))
