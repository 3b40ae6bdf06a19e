"""The bytes of an object, or of a part of it, as it was when it was listed."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import BinaryIO

from raytune_ft.data import hub
from raytune_ft.data.sources import DataObject
from raytune_ft.errors import DataError, StorageChanged, StorageMissing
from raytune_ft.storage import Storage, open_parent, open_storage

_AHEAD_BYTES = 64 << 10
"""Asked for at least; the footer of most files is within so many bytes of their end."""
_BLOCK_BYTES = 1 << 20


@contextmanager
def unchanged(found: DataObject) -> Iterator[None]:
    """Turn the store's errors about a listed object that is another by now, or gone, into the data's.

    Raises:
        DataError: the object was changed or deleted.
    """
    try:
        yield
    except StorageChanged:
        raise DataError(
            f"{found.uri}: the data changed since this run listed it, with {found.size_bytes:,} bytes and "
            f"version {found.etag}; put it back or start again"
        ) from None
    except StorageMissing:
        raise DataError(
            f"{found.uri}: deleted since this run listed it, with {found.size_bytes:,} bytes and "
            f"version {found.etag}; put it back or start again"
        ) from None


def open_object(found: DataObject, start: int = 0, stop: int | None = None) -> BinaryIO:
    """Stream the bytes [start, stop) of an object.

    Raises:
        StorageChanged: it is not the version that was listed; also while the stream is read.
        StorageMissing: it is gone.
        DataError: it is a file of the Hub, which cannot be had.
    """
    if hub.is_hub(found.root):
        # The whole file, into this machine's cache; a commit's files never change.
        folder, name = open_parent(str(hub.local_copy(found.root, found.key)))
        return folder.open(name, start, stop)
    return store_at(found.root).open(found.key, start, stop, etag=found.etag)


def read_blocks(found: DataObject, start: int, stop: int, block_bytes: int = _BLOCK_BYTES) -> Iterator[bytes]:
    """The bytes [start, stop) of an object in blocks, by one request. Raises what `open_object` does."""
    if start < stop:
        with open_object(found, start, stop) as stream:
            yield from iter(lambda: stream.read(block_bytes), b"")


@lru_cache(maxsize=64)
def store_at(uri: str) -> Storage:
    """The store at a uri, opened once in a process.

    A client of an S3 store takes a tenth of a second to make, longer than a window takes to read.
    """
    return open_storage(uri)


class ObjectFile(io.RawIOBase):
    """An object as a seekable file. Keeps the part that it asked for last."""

    def __init__(self, found: DataObject) -> None:
        super().__init__()
        self._found = found
        self._at = 0
        self._part = b""
        self._part_start = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._found.size_bytes}[whence]
        if origin + offset < 0:
            raise OSError(f"byte {origin + offset} is before the beginning")
        self._at = origin + offset
        return self._at

    def fetch(self, start: int, stop: int) -> None:
        """Ask for a part that will be read in pieces."""
        with open_object(self._found, start, stop) as stream:
            self._part, self._part_start = stream.read(), start

    def read(self, size: int | None = -1) -> bytes:
        end = self._found.size_bytes if size is None or size < 0 else self._at + size
        end = min(end, self._found.size_bytes)
        if end <= self._at:
            return b""
        if not self._part_start <= self._at < end <= self._part_start + len(self._part):
            self.fetch(self._at, max(end, min(self._at + _AHEAD_BYTES, self._found.size_bytes)))
        begin = self._at - self._part_start
        content = self._part[begin : begin + end - self._at]
        self._at += len(content)
        return content
