"""Checkpoints of the jobs of a lane on their way to the bucket, while training goes on."""

import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.storage import disk_errors
from raytune_ft.train.engine import Snapshot
from raytune_ft.train.kept import JobCheckpoints
from raytune_ft.train.uploads import Upload


@dataclass(frozen=True, eq=False)
class _Sent:
    """A checkpoint on its way."""

    snapshot: Snapshot
    step: int
    measured: Mapping[str, float]
    needed: bool
    """The best so far."""
    wait: bool
    """The last one, or one before the lane goes."""


class JobKeeping:
    """Sends the checkpoints of one job in a thread, one after another.

    Nobody waits for the store: the other jobs of the lane would. One that comes while the former is still on
    its way is left out, unless something depends on it. Only going back to the best one waits for it.
    """

    def __init__(
        self,
        checkpoints: JobCheckpoints,
        threads: Executor,
        folder: Path,
        *,
        may_write: Callable[[], None],
        on_kept: Callable[[int], None],
    ) -> None:
        """Nothing is sent yet.

        Args:
            checkpoints: of the job.
            threads: of the lane.
            folder: of this machine, where they wait.
            may_write: asked before each file; raises where the lane has lost its lease.
            on_kept: told the step of each that is complete in the store.
        """
        self._checkpoints = checkpoints
        self._threads = threads
        self._folder = folder
        self._may_write = may_write
        self._on_kept = on_kept
        self._last: Future[None] | None = None
        self._waiting: list[_Sent] = []
        """Handed in and not begun."""
        self._lock = threading.Lock()
        self._lost: Exception | None = None
        """Why one that was needed could not be kept."""
        self._finished: list[Upload] = []

    def send(
        self,
        take: Callable[[], Snapshot | None],
        metrics: dict[str, Any],
        *,
        wait: bool,
        needed: bool = False,
    ) -> None:
        """See `raytune_ft.train.recorder.Keeping`.

        Raises:
            StorageFull: the local disk or the store is full; the former checkpoint stays.
            StorageError: the store failed for too long.
        """
        if self._lost is not None:
            raise self._lost
        last = self._last
        if last is not None and last.done():
            last.result()
        elif last is not None and not (wait or needed):
            return
        snapshot = take()
        if snapshot is None:
            return
        measured = {n: value for n, value in metrics.items() if n != "step" and math.isfinite(value)}
        sent = _Sent(snapshot, metrics["step"], measured, needed, wait)
        with self._lock:
            # A better one takes the place of the best so far, so that at most two wait in memory.
            outdone = [one for one in self._waiting if needed and one.needed and not one.wait]
            self._waiting = [*(one for one in self._waiting if one not in outdone), sent]
        if not outdone:
            self._last = self._threads.submit(self._upload, last)

    def finished(self) -> Sequence[Upload]:
        """See `raytune_ft.train.recorder.Keeping`."""
        # One may be added meanwhile.
        return [self._finished.pop(0) for _ in range(len(self._finished))]

    def drain(self) -> None:
        """Wait for what is on its way; one that failed is as if it had not been sent."""
        if self._last is not None:
            self._last.exception()

    def kept(self) -> list[int]:
        """See `raytune_ft.train.recorder.Keeping`."""
        self.drain()
        return list(self._checkpoints.steps())

    @contextmanager
    def fetch(self, step: int) -> Iterator[Path]:
        """See `raytune_ft.train.recorder.Keeping`. The lane's other jobs wait as long as it takes.

        Raises:
            StorageMissing: there is none of that step.
        """
        self.drain()
        if self._lost is not None:
            raise self._lost
        with disk_errors(str(self._folder)):
            folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            self._checkpoints.fetch(step, folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, former: "Future[None] | None") -> None:
        if former is not None:
            # It was handed in before, so that it has a thread already.
            former.exception()
        with self._lock:
            sent = self._waiting.pop(0)
        if self._lost is not None:
            # A later checkpoint would make a run of it that cannot publish its best step.
            raise self._lost
        try:
            self._send(sent)
        except Exception as error:
            self._lost = error if sent.needed else None
            raise

    def _send(self, sent: _Sent) -> None:
        began = time.monotonic()
        with disk_errors(str(self._folder)):
            folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            with disk_errors(str(folder)):
                sent.snapshot(folder)
            size_bytes = self._checkpoints.add(folder, sent.step, sent.measured, may_write=self._may_write)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._finished.append(Upload(sent.step, size_bytes, time.monotonic() - began))
        self._on_kept(sent.step)
