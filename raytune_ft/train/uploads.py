"""Checkpoints on their way to the run's folder, while training goes on."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointUploadMode

from raytune_ft.errors import RaytuneError, StorageDenied, StorageError, StorageFull
from raytune_ft.storage import Storage, disk_errors

OUTAGE_S = 600.0
"""A store that is away for longer ends the run. Training goes on meanwhile, so there is time."""
_PAUSE_S = 5.0


@dataclass(frozen=True)
class Upload:
    """What one worker's part of a checkpoint took."""

    step: int
    size_bytes: int
    seconds: float


class Uploads:
    """Sends this worker's part of each checkpoint to the store in a thread, one at a time.

    A checkpoint counts once Ray has heard from all workers that their parts are complete; one that was cut
    off anywhere before leaves the former in its place. It is written to a local disk first: what is trained
    changes with the next step.
    """

    def __init__(
        self,
        storage: Storage,
        rank: int,
        *,
        may_write: Callable[[], None],
        on_failure: Callable[[RaytuneError], None],
    ) -> None:
        """Take the place of an earlier worker of the run with this rank, and remove what it left.

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
        self._failure: RaytuneError | None = None
        self._finished: list[Upload] = []
        with disk_errors(str(self._local)):
            if self._local.exists():
                shutil.rmtree(self._local)

    def send(self, write: Callable[[Path], None], metrics: dict[str, Any], *, wait: bool) -> None:
        """Write a part to the local disk and send it; all workers call it for the same step.

        Args:
            write: writes this worker's part into a folder, or nothing where it has none.
            metrics: `step`, and what Ray keeps beside the checkpoint.
            wait: return when it is complete in the store; else as soon as the former is.

        Raises:
            StorageFull: the local disk or the store is full; the former checkpoint stays.
            StorageError: the store failed for longer than `OUTAGE_S`.
            RunHeld: another driver has taken the run over.
        """
        self._idle.wait()
        if self._failure is not None:
            raise self._failure
        folder = self._local / str(metrics["step"])
        checkpoint = None
        try:
            with disk_errors(str(folder)):
                folder.mkdir(parents=True, mode=0o700)
                write(folder)
                if any(folder.iterdir()):
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
        except BaseException:
            # A half-written part would keep the disk full.
            self._drop(folder)
            raise
        if checkpoint is None:
            self._drop(folder)
        else:
            self._idle.clear()
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=lambda _, name: self._upload(folder, name, metrics["step"]),
        )

    def finished(self) -> list[Upload]:
        """Uploads that were completed since the last call."""
        # One may be added meanwhile.
        return [self._finished.pop(0) for _ in range(len(self._finished))]

    def _upload(self, folder: Path, name: str, step: int) -> ray.train.Checkpoint:
        began = time.monotonic()
        try:
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
        may_write: asked before each file; raises where somebody else has taken over.

    Raises:
        StorageFull: the store is full.
        StorageDenied: it refuses to be written to.
        StorageError: it was away for longer than `OUTAGE_S`.
    """
    give_up_at = time.monotonic() + OUTAGE_S
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        key = f"{prefix}/{file.relative_to(folder).as_posix()}"
        while True:
            try:
                may_write()
                storage.write(key, file)
                break
            except (StorageFull, StorageDenied):
                raise
            except StorageError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(_PAUSE_S)
    return sum(file.stat().st_size for file in files)


def _local_folder(uri: str, rank: int) -> Path:
    """Where this worker's parts wait; another for each user, run and rank."""
    run = sha256(uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"raytune-ft-{os.getuid()}-{run}-{rank}"
