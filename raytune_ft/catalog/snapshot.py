"""Contents of many small objects in one, so that a large catalog is listed with few requests.

A snapshot is derived: each content in it stands beside the etag under which it was read, and is used only
where a listing shows that etag still. So it is never older than the catalog, anybody may delete it, and of
several who write it at once the last one wins. It is gzip: a line of JSON, then the contents one after
another.
"""

import gzip
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt, ValidationError

from raytune_ft.catalog.record import MAX_RECORD_BYTES, Entry
from raytune_ft.errors import StorageChanged, StorageError, StorageMissing
from raytune_ft.storage import ObjectInfo, Storage, join_uri

MAX_STORED_BYTES = 64 << 20
MAX_CONTENTS_BYTES = 256 << 20
MAX_BYTES = MAX_CONTENTS_BYTES + (64 << 20)
"""Of a snapshot once it is unpacked, with its index: what claims more is not the catalog's."""
MAX_CONTENT_BYTES = 256 << 10
"""Larger contents are read each time."""
WORTH_WRITING = 64
"""A snapshot is written once so many contents were not in it."""
_READERS = 8
_GZIP = 16 + zlib.MAX_WBITS


class _Index(Entry):
    """The first line of a snapshot."""

    schema_version: Literal[1] = 1
    entries: tuple[tuple[str, str, NonNegativeInt], ...]
    """Key, etag and size in bytes of each content, in their order."""


class _Unusable(Exception):
    """A snapshot that is not what this module writes."""


@dataclass(frozen=True)
class _Kept:
    etag: str
    content: bytes


class Snapshot:
    """One derived object, and what was read beside it."""

    def __init__(self, storage: Storage, key: str) -> None:
        """Read it. One that is damaged, foreign or too large is as good as none.

        Args:
            storage: the catalog's.
            key: the derived object's.

        Raises:
            StorageError: the store failed.
        """
        self._storage = storage
        self._key = key
        self._read_anew = 0
        self.note: str | None = None
        """Why the one that is there was not used."""
        try:
            self._kept = self._load()
        except _Unusable as error:
            self.note = f"{join_uri(storage.uri, key)}: {error}; it is not used; delete it, nothing is lost"
            self._kept = {}

    def contents(self, objects: Iterable[ObjectInfo]) -> dict[str, bytes]:
        """Content of each object, as far as it is still what the listing showed.

        Args:
            objects: as a listing shows them.

        Returns:
            By key. An object is missing that is gone, has changed since or is too large for a record: reading
            it by itself says why.

        Raises:
            StorageError: the store failed.
        """
        found, missing = {}, []
        for info in objects:
            kept = self._kept.get(info.key)
            if kept is not None and kept.etag == info.etag:
                found[info.key] = kept.content
            else:
                missing.append(info)
        with ThreadPoolExecutor(_READERS) as readers:
            for info, content in zip(missing, readers.map(self._read, missing), strict=True):
                if content is None:
                    continue
                found[info.key] = content
                if len(content) <= MAX_CONTENT_BYTES:
                    self._kept[info.key] = _Kept(info.etag, content)
                    self._read_anew += 1
        return found

    def save(self, useful: Iterable[ObjectInfo]) -> None:
        """Write the snapshot where enough was not in it; who may not write goes without.

        Args:
            useful: what is to be kept, as the listing showed it; all else is dropped.
        """
        if self._read_anew <= WORTH_WRITING:
            return
        entries, contents, size_bytes = [], [], 0
        for info in useful:
            kept = self._kept.get(info.key)
            if kept is None or kept.etag != info.etag:
                continue
            size_bytes += len(kept.content)
            if size_bytes > MAX_CONTENTS_BYTES:
                break
            entries.append((info.key, info.etag, len(kept.content)))
            contents.append(kept.content)
        index = _Index(entries=tuple(entries)).model_dump_json().encode()
        packed = gzip.compress(b"\n".join([index, b"".join(contents)]), compresslevel=3, mtime=0)
        if len(packed) > MAX_STORED_BYTES:
            return
        try:
            self._storage.write(self._key, packed)
        except StorageError:
            return  # A reader's credentials do not allow it, or the store is full: the listing stands.

    def _read(self, info: ObjectInfo) -> bytes | None:
        if info.size_bytes > MAX_RECORD_BYTES:
            return None
        try:
            with self._storage.open(info.key, etag=info.etag) as stream:
                return stream.read(MAX_RECORD_BYTES)
        except (StorageMissing, StorageChanged):
            return None

    def _load(self) -> dict[str, _Kept]:
        try:
            with self._storage.open(self._key) as stream:
                packed = stream.read(MAX_STORED_BYTES + 1)
        except StorageMissing:
            return {}
        line, _, contents = _unpack(packed).partition(b"\n")
        try:
            index = _Index.model_validate_json(line)
        except ValidationError:
            raise _Unusable("its first line is not a snapshot's index") from None
        if sum(size_bytes for _, _, size_bytes in index.entries) != len(contents):
            raise _Unusable("its contents have not the size that its index says")
        return _cut(index, contents)


def _cut(index: _Index, contents: bytes) -> dict[str, _Kept]:
    kept, start = {}, 0
    for key, etag, size_bytes in index.entries:
        kept[key] = _Kept(etag, contents[start : start + size_bytes])
        start += size_bytes
    return kept


def _unpack(packed: bytes) -> bytes:
    """What was compressed, up to a limit that no small object can make large."""
    if len(packed) > MAX_STORED_BYTES:
        raise _Unusable(f"above {MAX_STORED_BYTES:,} bytes")
    unpacking = zlib.decompressobj(wbits=_GZIP)
    try:
        unpacked = unpacking.decompress(packed, MAX_BYTES + 1)
    except zlib.error:
        raise _Unusable("not gzip, or damaged") from None
    if len(unpacked) > MAX_BYTES:
        raise _Unusable(f"above {MAX_BYTES:,} bytes once it is unpacked")
    if not unpacking.eof or unpacking.unused_data:
        raise _Unusable("truncated, or more than one snapshot")
    return unpacked
