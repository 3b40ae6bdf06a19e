"""Putting a version's contents into a catalog while a sweep (`sweep.py`) may take away what nobody names."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

from raytune_ft.catalog.layout import blob_key
from raytune_ft.catalog.record import FileEntry
from raytune_ft.storage import Storage

READ_BACK_BYTES = 64 << 20
"""Content that is in the catalog already is read back up to this size; larger is told by its size alone."""
FRESH_S = 900.0
"""Older content is not relied on but written anew, so that it is young by the store's clock. Far below
the least age at which a sweep takes anything; the rest is for the upload and for a clock that is off."""


class ContentWriter:
    """The contents of one version that is being published."""

    def __init__(self, storage: Storage, files: Mapping[FileEntry, Path]) -> None:
        self._storage = storage
        self._files = files

    def write(self) -> None:
        """Write what is not there, is damaged or is not fresh."""
        for entry, path in self._files.items():
            if not self._holds(entry, fresh=True):
                self._storage.write(blob_key(entry.sha256), path)

    def repair(self) -> None:
        """Write what is not there or is damaged, of a version that is there: its age is of no matter."""
        for entry, path in self._files.items():
            if not self._holds(entry, fresh=False):
                self._storage.write(blob_key(entry.sha256), path)

    def complete(self) -> None:
        """Write again what has gone since, as a sweep may have done; one small request for each content.

        No content is left out, not even one that was written here a moment ago: where an old one stood
        before, a request to delete that may still be on its way.
        """
        for entry, path in self._files.items():
            found = self._storage.info(blob_key(entry.sha256))
            if found is None or found.size_bytes != entry.size_bytes:
                self._storage.write(blob_key(entry.sha256), path)

    def _holds(self, entry: FileEntry, *, fresh: bool) -> bool:
        """Whether the content is there. A damaged one is not, so that publishing again repairs it."""
        key = blob_key(entry.sha256)
        found = self._storage.info(key)
        if found is None or found.size_bytes != entry.size_bytes:
            return False
        # Far in the future is no better: then one of the two clocks is wrong.
        if fresh and abs(time.time() - found.modified_at) > FRESH_S:
            return False
        if entry.size_bytes > READ_BACK_BYTES:
            return True
        content = self._storage.read_or_none(key)
        return content is not None and hashlib.sha256(content).hexdigest() == entry.sha256
