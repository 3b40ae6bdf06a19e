"""Local folders that are handed out complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune_ft.errors import CatalogError
from raytune_ft.storage import disk_errors
from raytune_ft.storage.base import TEMPORARY_PREFIX


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder beside `to` that takes its name at the end, or is gone.

    Args:
        to: a new or empty folder. Its parents are made.

    Raises:
        CatalogError: `to` is there and not empty, a file, or a link.
        StorageError: the disk failed.
    """
    to = Path(os.path.abspath(to))
    temporary = to.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with disk_errors(str(to)):
        if to.is_symlink():
            # A folder does not replace it, not even where it leads to an empty one.
            raise CatalogError(f"{to}: is a link; name a new or empty folder")
        if to.exists() and not (to.is_dir() and not any(to.iterdir())):
            raise CatalogError(f"{to}: is there already; name a new or empty folder")
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        yield temporary
        with disk_errors(str(to)):
            temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
