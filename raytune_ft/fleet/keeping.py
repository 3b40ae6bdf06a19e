"""Checkpoints of the jobs of a lane on their way to the bucket, while training goes on."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from raytune_ft.fleet.checkpoints import JobCheckpoints
from raytune_ft.storage import disk_errors
from raytune_ft.train.engine import Snapshot
from raytune_ft.train.uploads import Upload


class JobKeeping:
    """Sends the checkpoints of one job in a thread, one after another.

    Nobody waits for the store: the other jobs of the lane would. One that comes while the former is still on
    its way is left out, unless something depends on it.
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
        self._finished: list[Upload] = []

    def send(self, take: Callable[[], Snapshot | None], metrics: dict[str, Any], *, wait: bool) -> None:
        """See `raytune_ft.train.recorder.Keeping`.

        Raises:
            StorageFull: the local disk or the store is full; the former checkpoint stays.
            StorageError: the store failed for too long.
        """
        last = self._last
        if last is not None and last.done():
            last.result()
        elif last is not None and not wait:
            return
        snapshot = take()
        if snapshot is not None:
            step, loss = metrics["step"], metrics.get("validation_loss")
            self._last = self._threads.submit(self._upload, last, snapshot, step, loss)

    def finished(self) -> Sequence[Upload]:
        """See `raytune_ft.train.recorder.Keeping`."""
        # One may be added meanwhile.
        return [self._finished.pop(0) for _ in range(len(self._finished))]

    def drain(self) -> None:
        """Wait for what is on its way; one that failed is as if it had not been sent."""
        if self._last is not None:
            self._last.exception()

    def _upload(
        self, former: "Future[None] | None", snapshot: Snapshot, step: int, validation_loss: float | None
    ) -> None:
        if former is not None:
            # It was handed in before, so that it has a thread already.
            former.exception()
        began = time.monotonic()
        with disk_errors(str(self._folder)):
            folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            with disk_errors(str(folder)):
                snapshot(folder)
            size_bytes = self._checkpoints.add(folder, step, validation_loss, may_write=self._may_write)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._finished.append(Upload(step, size_bytes, time.monotonic() - began))
        self._on_kept(step)
