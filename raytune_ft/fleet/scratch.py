"""A lane's folder on its machine, for what is on its way; and an end to those of lanes that were killed."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raytune_ft.storage import disk_errors

_PREFIX = "raytune-ft-lane-"
_YOUNG_S = 60.0
"""Between its making and its locking a folder looks abandoned."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder, as long as the block lasts. Those of processes that have ended are removed first.

    Raises:
        StorageError: the disk is full, or fails.
    """
    root = Path(tempfile.gettempdir())
    for folder in root.glob(f"{_PREFIX}*"):
        _remove_abandoned(folder)
    with disk_errors(str(root)):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with disk_errors(str(folder)):
            lock = _locked(folder)
        try:
            yield folder
        finally:
            if lock is not None:
                os.close(lock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    # Another's may be gone by now, or be none of ours to look into.
    with suppress(OSError):
        status = folder.stat()
        if status.st_uid == os.getuid() and status.st_mtime < time.time() - _YOUNG_S:
            lock = _locked(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int | None:
    """Lock a folder; None where another process has. The system gives it back when this one ends."""
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
