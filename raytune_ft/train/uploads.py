"""Checkpoints on their way to the run's folder, while training goes on."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray.train
from ray.train import CheckpointUploadMode

from raytune_ft.errors import RaytuneError, StorageDenied, StorageError, StorageFull
from raytune_ft.storage import Storage, disk_errors

if TYPE_CHECKING:
    from raytune_ft.train.engine import Snapshot

OUTAGE_S = 600.0
"""A store that is away for longer ends the run. Training goes on meanwhile, so there is time."""
_PAUSE_S = 5.0
_BEGIN_S = 60.0
"""An upload that has not begun by then never will: a thread waits for each."""


@dataclass(frozen=True)
class Upload:
    """What one worker's part of a checkpoint took."""

    step: int
    size_bytes: int
    seconds: float


class Uploads:
    """Sends this worker's part of each checkpoint to the store in a thread, one at a time.

    A checkpoint counts once Ray has heard from all workers that their parts are complete; one that was cut
    off anywhere before leaves the former in its place. It is written to a local disk first, in the thread as
    well: what is trained changes with the next step, and its copy should not fill the memory for long.
    """

    def __init__(
        self,
        storage: Storage,
        rank: int,
        *,
        may_write: Callable[[], None],
        on_failure: Callable[[RaytuneError], None],
    ) -> None:
        """Remove what earlier workers of the run left on this node's disk.

        Args:
            storage: the run's folder.
            rank: of this worker.
            may_write: asked before each upload; raises where another driver has taken the run over.
            on_failure: told why an upload failed, in the thread that it failed in.
        """
        self._storage = storage
        self._local = _local_folder(storage.uri, rank)
        self._may_write = may_write
        self._on_failure = on_failure
        self._idle = threading.Event()
        self._idle.set()
        self._begun = threading.Event()
        self._held: dict[Path, Snapshot] = {}
        """What was handed to Ray last, until it is written, by where that will be."""
        self._failure: RaytuneError | None = None
        self._finished: list[Upload] = []
        with disk_errors(str(self._local)):
            _remove_abandoned(self._local)

    def wait(self) -> None:
        """Wait until the former part was sent. A copy of the next one would need as much memory again.

        Raises:
            StorageFull: the local disk or the store is full; the checkpoint before stays.
            StorageError: the store failed for longer than `OUTAGE_S`.
            RunHeld: another driver has taken the run over.
        """
        self._wait_for_former()
        if self._failure is not None:
            raise self._failure

    def send(self, snapshot: "Snapshot | None", metrics: dict[str, Any], *, wait: bool) -> None:
        """Write a part to the local disk and send it; all workers call it for the same step.

        Args:
            snapshot: this worker's part; None where it has none.
            metrics: `step`, and what Ray keeps beside the checkpoint.
            wait: return when it is complete in the store; else as soon as the former is.

        Raises:
            StorageFull, StorageError, RunHeld: as `wait` does, of the former part.
        """
        self.wait()
        folder = self._local / str(metrics["step"])
        if snapshot is not None:
            self._idle.clear()
            self._begun.clear()
            self._held[folder] = snapshot
        try:
            ray.train.report(
                metrics,
                checkpoint=None if snapshot is None else ray.train.Checkpoint.from_directory(folder),
                checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
                delete_local_checkpoint_after_upload=False,
                checkpoint_upload_fn=lambda _, name: self._upload(folder, name, metrics["step"]),
            )
        finally:
            if wait:
                self._wait_for_former(begin_s=0.0)

    def finished(self) -> list[Upload]:
        """Uploads that were completed since the last call."""
        # One may be added meanwhile.
        return [self._finished.pop(0) for _ in range(len(self._finished))]

    def _wait_for_former(self, begin_s: float = _BEGIN_S) -> None:
        """Wait for the upload on its way. Ray drops a report, and says nothing, where a worker was lost."""
        if not self._idle.is_set() and not self._begun.wait(begin_s):
            self._held.clear()
            self._idle.set()
        self._idle.wait()

    def _upload(self, folder: Path, name: str, step: int) -> ray.train.Checkpoint:
        self._begun.set()
        began = time.monotonic()
        try:
            self._write_here(folder)
            size_bytes = self._write_all(folder, name, give_up_at=began + OUTAGE_S)
            self._finished.append(Upload(step, size_bytes, time.monotonic() - began))
        except RaytuneError as error:
            # Nobody will ask for a part of it.
            with suppress(StorageError):
                for found in list(self._storage.list(f"{name}/")):
                    self._storage.delete(found.key)
            self._failure = error
            self._on_failure(error)
            raise
        finally:
            self._drop(folder)
            self._idle.set()
        place = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            place.build_checkpoint_path_from_name(name), filesystem=place.storage_filesystem
        )

    def _write_here(self, folder: Path) -> None:
        """Onto the local disk; the copy in memory is let go."""
        snapshot = self._held.pop(folder, None)
        if snapshot is None:
            raise StorageError(f"{folder}: was given up before it was written")
        with disk_errors(str(folder)):
            folder.mkdir(parents=True, mode=0o700)
            snapshot(folder)

    def _drop(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            self._local.rmdir()

    def _write_all(self, folder: Path, name: str, give_up_at: float) -> int:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if not files:
            raise StorageError(f"{folder}: was removed before it was sent; keep other programs out of it")
        for file in files:
            key = f"{name}/{file.relative_to(folder).as_posix()}"
            self._insist(partial(self._write, key, file), give_up_at)
        # Another driver may have taken the run over while the last file was on its way.
        self._insist(self._may_write, give_up_at)
        return sum(file.stat().st_size for file in files)

    def _write(self, key: str, file: Path) -> None:
        self._may_write()
        self._storage.write(key, file)

    def _insist(self, act: Callable[[], None], give_up_at: float) -> None:
        """Do it, again and again until `give_up_at` where the store is away."""
        while True:
            try:
                act()
                return
            except (StorageFull, StorageDenied):
                raise
            except StorageError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(_PAUSE_S)


def _local_folder(uri: str, rank: int) -> Path:
    """Where this worker's parts wait; another for each user, run, rank and process."""
    run = sha256(uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"raytune-ft-{os.getuid()}-{run}-{rank}-{os.getpid()}"


def _remove_abandoned(own: Path) -> None:
    """Remove the folders of workers of the run, of any rank, that have ended; and `own`."""
    of_run = own.name.rsplit("-", 2)[0]
    for folder in own.parent.glob(f"{of_run}-*-*"):
        pid = folder.name.rpartition("-")[2]
        if folder == own or (pid.isdecimal() and not psutil.pid_exists(int(pid))):
            shutil.rmtree(folder, ignore_errors=folder != own)
