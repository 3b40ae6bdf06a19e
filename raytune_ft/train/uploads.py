"""Checkpoints on their way to the run's folder, while training goes on."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray.train
from ray.train import CheckpointConsistencyMode, CheckpointUploadMode

from raytune_ft.errors import RaytuneError, StorageDenied, StorageError, StorageFull, StorageMissing
from raytune_ft.storage import Storage, disk_errors

if TYPE_CHECKING:
    from raytune_ft.train.engine import Snapshot

OUTAGE_S = 600.0
"""A store that is away for longer ends the run. Training goes on meanwhile, so there is time."""
_PAUSE_S = 5.0
_BEGIN_S = OUTAGE_S
"""An upload that has not begun by then never will. Ray has one thread for them, in which it also waits to be
heard: that may take as long as a store is away."""


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

    def send(
        self,
        take: "Callable[[], Snapshot | None]",
        metrics: dict[str, Any],
        *,
        wait: bool,
        needed: bool = False,
    ) -> None:
        """Write a part to the local disk and send it; all workers call it for the same step.

        Args:
            take: makes a snapshot of this worker's part; None where it has none. It is called once the former
                part is sent, for two copies would need twice the memory.
            metrics: `step`, and what Ray keeps beside the checkpoint.
            wait: return when it is complete in the store; else as soon as the former is.
            needed: makes no difference, since none is left out here.

        Raises:
            StorageFull: the local disk or the store was full for the former part; what was kept before stays.
            StorageError: the store failed for longer than `OUTAGE_S`.
            RunHeld: another driver has taken the run over.
        """
        del needed
        self._wait_for_former()
        if self._failure is not None:
            raise self._failure
        folder = self._local / str(metrics["step"])
        snapshot = take()
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

    def kept(self) -> list[int]:
        """See `raytune_ft.train.recorder.Keeping`; all workers may ask."""
        return list(self._reported())

    @contextmanager
    def fetch(self, step: int) -> Iterator[Path]:
        """See `raytune_ft.train.recorder.Keeping`; each worker has its own copy.

        Raises:
            StorageMissing: there is none of that step.
        """
        found = self._reported().get(step)
        if found is None:
            raise StorageMissing(f"{self._storage.uri}: the checkpoint of step {step} is not there")
        with found.as_directory() as folder:
            yield Path(folder)

    def _reported(self) -> dict[int, ray.train.Checkpoint]:
        """The checkpoints that Ray counts, by step, once all that were sent are complete."""
        self._wait_for_former()
        if self._failure is not None:
            raise self._failure
        reported = ray.train.get_all_reported_checkpoints(
            consistency_mode=CheckpointConsistencyMode.COMMITTED, timeout_s=OUTAGE_S
        )
        return {each.metrics["step"]: each.checkpoint for each in reported}

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
            size_bytes = send_folder(self._storage, folder, name, may_write=self._may_write)
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


def send_folder(storage: Storage, folder: Path, prefix: str, *, may_write: Callable[[], None]) -> int:
    """Write all files of a folder below `prefix`, and wait for a store that is away; their bytes.

    Args:
        storage: where to.
        folder: of this machine.
        prefix: of the keys, without a slash at its end.
        may_write: asked before each file and after the last; raises where somebody else has taken over.

    Raises:
        StorageFull: the store is full.
        StorageDenied: it refuses to be written to.
        StorageError: it was away for longer than `OUTAGE_S`, or the folder is empty.
    """
    give_up_at = time.monotonic() + OUTAGE_S
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise StorageError(f"{folder}: was removed before it was sent; keep other programs out of it")

    def write(key: str, file: Path) -> None:
        may_write()
        storage.write(key, file)

    for file in files:
        _insist(partial(write, f"{prefix}/{file.relative_to(folder).as_posix()}", file), give_up_at)
    # Somebody else may have taken over while the last file was on its way.
    _insist(may_write, give_up_at)
    return sum(file.stat().st_size for file in files)


def _insist(act: Callable[[], None], give_up_at: float) -> None:
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
