"""A local or mounted folder as a store."""

import errno
import io
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from raytune_ft.errors import StorageChanged, StorageDenied, StorageError, StorageFull, StorageMissing
from raytune_ft.storage.base import (
    READ_BYTES,
    TEMPORARY_PREFIX,
    ObjectInfo,
    check_key,
    check_prefix,
    join_uri,
    key_problem,
)

# EFBIG is a limit on the size of a file (ulimit -f): to the user the same as a disk that is too small.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@dataclass(frozen=True)
class FolderStorage:
    """Objects are files under `root`, which is created by the first write."""

    root: Path

    @property
    def uri(self) -> str:
        """The folder's absolute path."""
        return str(self.root)

    def check(self) -> None:
        """See Storage."""
        with disk_errors(self.uri):
            if self.root.exists():
                os.scandir(self.root).close()

    def read(self, key: str) -> bytes:
        """See Storage."""
        with self.open(key) as stream, disk_errors(join_uri(self.uri, key)):
            return stream.read()

    def read_or_none(self, key: str) -> bytes | None:
        """See Storage."""
        try:
            return self.read(key)
        except StorageMissing:
            return None

    def open(self, key: str, start: int = 0, stop: int | None = None, *, etag: str | None = None) -> BinaryIO:
        """See Storage. A file that is replaced while it is read gives its old content to the end."""
        body = _FileRange(self.root / check_key(key), join_uri(self.uri, key), start, stop, etag)
        return cast(BinaryIO, io.BufferedReader(body, READ_BYTES))

    def info(self, key: str) -> ObjectInfo | None:
        """See Storage."""
        try:
            with disk_errors(join_uri(self.uri, key)):
                path = self.root / check_key(key)
                return None if path.is_dir() else _describe(key, path.stat())
        except StorageMissing:
            return None

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """See Storage."""
        with disk_errors(self.uri):
            yield from islice(self._matching(check_prefix(prefix)), limit)

    def write(self, key: str, data: bytes | Path) -> None:
        """See Storage."""
        with self._complete_file(key, data) as (temporary, target):
            temporary.replace(target)

    def write_once(self, key: str, data: bytes) -> bool:
        """See Storage."""
        with self._complete_file(key, data) as (temporary, target):
            try:
                # link(2) fails if the name exists, in one step; a rename would replace it.
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise StorageError(
                        f"{self.uri}: this file system has no hard links, and without them two writers could "
                        "overwrite each other; use a local disk, NFS or an s3:// bucket"
                    ) from error
                raise
        return True

    def delete(self, key: str) -> None:
        """See Storage."""
        with disk_errors(join_uri(self.uri, key)):
            (self.root / check_key(key)).unlink(missing_ok=True)

    def download(self, key: str, path: Path) -> None:
        """See Storage."""
        with self.open(key) as stream:
            copy_to_file(stream, path)

    def discard_unfinished(self, before: float, *, dry_run: bool = False) -> Sequence[str]:
        """See Storage."""
        with disk_errors(self.uri):
            found = sorted(path for path in self._temporary_files() if _touched_before(path, before))
            for path in [] if dry_run else found:
                path.unlink(missing_ok=True)
        return [str(path) for path in found]

    def _temporary_files(self) -> Iterator[Path]:
        # Not in the root alone: another storage may have a folder below as its own.
        for folder, _, names in os.walk(self.root):
            yield from (Path(folder, name) for name in names if name.startswith(TEMPORARY_PREFIX))

    def _matching(self, prefix: str) -> Iterator[ObjectInfo]:
        """Files that match `prefix`, sorted; folders beside those that it names are not looked into."""
        *names, _ = prefix.split("/")
        folders = list(accumulate(names, Path.joinpath, initial=self.root))
        if not folders[-1].is_dir():
            self.check()  # For a file where the root should be.
            return
        try:
            above = tuple(_identity(folder.stat()) for folder in folders[:-1])
        except FileNotFoundError:
            return  # Others may go while we look.
        if len(set(above)) == len(above):
            at = "".join(f"{name}/" for name in names)
            yield from self._walk(folders[-1], at, prefix, above)

    def _walk(
        self, folder: Path, at: str, prefix: str, above: tuple[tuple[int, int], ...]
    ) -> Iterator[ObjectInfo]:
        """Files under `folder` (whose key is `at`, '' or ending with '/') that match `prefix`, sorted.

        Links to folders are followed, since Hub caches and data trees use them, but never into a folder
        that is being walked (`above`: device and inode of each).
        """
        try:
            status = folder.stat()
            with os.scandir(folder) as entries:
                names = [(entry.name, entry.is_dir()) for entry in entries]
        except FileNotFoundError:
            return  # The root is created by the first write; others may go while we look.
        identity = _identity(status)
        if identity in above:
            return
        # A folder sorts as its name and '/', so that the whole listing is in the order of full keys.
        names = [(name + "/" if is_folder else name, is_folder) for name, is_folder in names]
        for name, is_folder in sorted(names, key=lambda pair: os.fsencode(pair[0])):
            key = at + name
            if name.startswith(TEMPORARY_PREFIX) or not (key.startswith(prefix) or prefix.startswith(key)):
                continue
            if is_folder:
                yield from self._walk(folder / name, key, prefix, (*above, identity))
            elif key.startswith(prefix):
                yield from self._listed(folder / name, key)

    def _listed(self, path: Path, key: str) -> Iterator[ObjectInfo]:
        if key_problem(key) is not None:
            raise StorageError(f"{self.uri}: the file name {key!r} {key_problem(key)}; rename or remove it")
        try:
            yield _describe(key, path.stat())
        except FileNotFoundError:
            return  # A dangling link, or a file that was removed since.

    @contextmanager
    def _complete_file(self, key: str, data: bytes | Path) -> Iterator[tuple[Path, Path]]:
        """Write `data` beside its place and to the disk; the caller gives it its name. The rest goes."""
        target = self.root / check_key(key)
        size_bytes = len(data) if isinstance(data, bytes) else _size_of_source(data)
        with disk_errors(join_uri(self.uri, key), size_bytes):
            _make_folders(target.parent)
            temporary = self.root / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
            try:
                with temporary.open("xb") as stream:
                    _fill(stream, data)
                yield temporary, target
                _sync_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)


class _FileRange(io.RawIOBase):
    """Some bytes of a file as a raw stream, which looks after each read whether it is the same file still."""

    def __init__(self, path: Path, place: str, start: int, stop: int | None, etag: str | None) -> None:
        super().__init__()
        self._place = place
        self._stop = stop
        self._offset = start
        self._etag = etag
        with disk_errors(place):
            self._file = path.open("rb", buffering=0)
            self._file.seek(start)
        try:
            self._check()
        except StorageChanged:
            self._file.close()
            raise

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if self._stop is not None:
            view = view[: max(0, self._stop - self._offset)]
        with disk_errors(self._place):
            count = self._file.readinto(view) if view else 0
        self._check()
        self._offset += count
        return count

    def readall(self) -> bytes:
        # The inherited one reads 8 KiB at a time.
        return b"".join(iter(lambda: self.read(READ_BYTES) or b"", b""))

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _check(self) -> None:
        if self._etag is None:
            return
        with disk_errors(self._place):
            found = _describe("", os.fstat(self._file.fileno()))
        if found.etag != self._etag:
            raise StorageChanged(
                f"{self._place}: changed: not version {self._etag} any more, but {found.etag}; run again"
            )


@contextmanager
def disk_errors(place: str, size_bytes: int | None = None) -> Iterator[None]:
    """Turn operating system errors about `place` into StorageError and its kinds.

    Args:
        place: path or uri for the message.
        size_bytes: what was to be written, if anything.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if error.errno in _FULL:
            amount = "the data was" if size_bytes is None else f"{size_bytes:,} bytes were"
            raise StorageFull(
                f"{place}: the disk is full: {amount} not written; nothing of it is visible; "
                "free space and run again"
            ) from error
        if error.errno in _DENIED:
            raise StorageDenied(
                f"{place}: {reason}; give this user the right to it or name another folder"
            ) from error
        if error.errno in (errno.ENOENT, errno.EISDIR):
            remedy = "no such file" if error.errno == errno.ENOENT else "a folder, not a file"
            raise StorageMissing(f"{place}: {remedy}; check the name") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise StorageError(
                f"{place}: a file stands where a folder is needed; name another folder"
            ) from error
        raise StorageError(f"{place}: {reason}; check the disk or mount and run again") from error


def copy_to_file(stream: IO[bytes], path: Path) -> None:
    """Copy a stream to a local file that appears complete or not at all.

    Raises:
        StorageFull: no space is left.
        StorageError: the stream or the disk failed.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as target:
                shutil.copyfileobj(stream, target, 1 << 20)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _touched_before(path: Path, before: float) -> bool:
    try:
        return path.lstat().st_mtime < before
    except FileNotFoundError:
        return False  # Its writer has ended meanwhile.


def _size_of_source(path: Path) -> int:
    with disk_errors(str(path)):
        return path.stat().st_size


def _fill(stream: BinaryIO, data: bytes | Path) -> None:
    if isinstance(data, bytes):
        stream.write(data)
    else:
        with data.open("rb") as source:
            shutil.copyfileobj(source, stream, 1 << 20)
    stream.flush()
    os.fsync(stream.fileno())


def _describe(key: str, status: os.stat_result) -> ObjectInfo:
    etag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
    return ObjectInfo(key, status.st_size, etag, status.st_mtime)


def _make_folders(folder: Path) -> None:
    """Create a folder and those above it so that they survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
