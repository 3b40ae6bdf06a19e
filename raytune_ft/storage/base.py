"""What every store can do, and what a key and a uri look like."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from raytune_ft.errors import BadInput
from raytune_ft.spec.values import uri_mistake

TEMPORARY_PREFIX = ".tmp-"
"""Names that begin so are writes under way in a folder; they are never listed and never keys."""
READ_BYTES = 256 << 10
"""Asked of a store or disk at once; what a broken connection loses at most."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a store, as a listing shows it."""

    key: str
    """Relative to the storage's uri, '/'-separated."""
    size_bytes: int
    etag: str
    """Changes when the content does. Opaque."""
    modified_at: float
    """When it was written last, in seconds since the epoch (UTC), by the store's own clock. A bucket gives
    whole seconds, and for an upload in parts perhaps the time at which that began."""


class Storage(Protocol):
    """A place that holds named bytes: a folder or a bucket's prefix.

    Keys are relative to `uri` and separated by '/'. A key that `check_key` refuses is a ValueError: whoever
    takes keys from users checks them first. Every method raises StorageError, or one of its kinds, once the
    retries are spent. A storage holds no open connection when it is pickled, and threads may share it.
    """

    @property
    def uri(self) -> str:
        """Where this storage is, without a slash at the end."""

    def check(self) -> None:
        """Make one cheap request, so that a wrong name or wrong credentials show before any work.

        A folder that does not exist yet is fine: the first write creates it.

        Raises:
            StorageDenied: the store refused the credentials, or there are none.
            StorageMissing: there is no such bucket.
            StorageError: the store did not answer, or a file stands where the folder should be.
        """

    def read(self, key: str) -> bytes:
        """Whole content of an object. Raises StorageMissing where there is none."""

    def read_or_none(self, key: str) -> bytes | None:
        """Whole content of an object, or None where there is none."""

    def open(self, key: str, start: int = 0, stop: int | None = None, *, etag: str | None = None) -> BinaryIO:
        """Stream the bytes [start, stop) of an object, as far as it has them.

        Args:
            key: the object's.
            start: first byte.
            stop: the byte after the last one; None: to the end.
            etag: the version that is meant, as a listing shows it; None: the one that is there.

        Raises:
            StorageMissing: there is no such object.
            StorageChanged: it is another version, or becomes one while it is read.
        """

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """Objects whose keys begin with `prefix`, sorted by key as UTF-8 bytes, at all depths.

        Args:
            prefix: any beginning of a key, such as `adapters/` or `adapters/sum`.
            limit: stop after so many.
        """

    def info(self, key: str) -> ObjectInfo | None:
        """Size, etag and time of an object, or None where there is none."""

    def write(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a local file's content. Readers see what was there before, or all of the new."""

    def write_once(self, key: str, data: bytes) -> bool:
        """Store bytes if there is no such object.

        Returns:
            False if there is one. It may be this very write's, when the store's answer was lost and the
            request repeated; a caller that must know reads it back.
        """

    def delete(self, key: str) -> None:
        """Remove an object; fine where there is none."""

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, which appears complete or not at all."""

    def discard_unfinished(self, before: float, *, dry_run: bool = False) -> Sequence[str]:
        """Take away what writers that died have left of their writes: no listing shows it.

        Args:
            before: only what was begun (in a folder: touched last) earlier, in seconds since the epoch
                (UTC) by the store's own clock. A writer that is at work since then loses its write.
            dry_run: take nothing away.

        Returns:
            The place of each, sorted: its uri, and in a bucket the upload's id too.

        Raises:
            StorageDenied: in a bucket this takes the right to list and abort uploads in parts.
        """


def check_key(key: str) -> str:
    """Refuse keys that could leave the storage's root or that some store reads differently.

    Raises:
        ValueError: the key is empty, absolute, has empty, '.' or '..' parts, a backslash or a NUL.

    >>> check_key("adapters/a/1.json")
    'adapters/a/1.json'
    """
    if key_problem(key) is not None:
        raise ValueError(f"key {key!r} {key_problem(key)}")
    return key


def check_prefix(prefix: str) -> str:
    """Like `check_key`, for the beginning of a key: it may be empty or end with '/'."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def key_problem(key: str) -> str | None:
    """What is wrong with a key, or None."""
    if not key:
        return "is empty"
    if "\\" in key or "\0" in key:
        return "holds a backslash or a NUL"
    for part in key.split("/"):
        if part in ("", ".", ".."):
            return "is absolute or has an empty, '.' or '..' part"
        if part.startswith(TEMPORARY_PREFIX):
            return f"has a part that begins with '{TEMPORARY_PREFIX}'"
    return None


def join_uri(root: str, key: str) -> str:
    """Join a root and a key with one slash.

    >>> join_uri("s3://adapters", "a/1.json")
    's3://adapters/a/1.json'
    """
    return f"{root.rstrip('/')}/{key}" if key else root


def split_bucket(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/prefix` into bucket and prefix, the latter without slashes at its ends.

    Raises:
        BadInput: there is no bucket, or its name cannot be one.
    """
    _check_uri(uri)
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket) and {"@", ":"} & set(uri.removeprefix("s3://")):
        raise BadInput(
            "an s3:// uri holds credentials or a host; write s3://bucket/prefix, and set AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        )
    if not _BUCKET.fullmatch(bucket):
        raise BadInput(
            f"{uri}: '{bucket}' is no bucket name; write s3://bucket/prefix, 3 to 63 of a-z, 0-9, '.', '-'"
        )
    prefix = prefix.strip("/")
    if prefix and key_problem(prefix) is not None:
        raise BadInput(f"{uri}: the prefix {key_problem(prefix)}; write s3://bucket/prefix")
    return bucket, prefix


def _check_uri(uri: str) -> None:
    if mistake := uri_mistake(uri):
        raise BadInput(mistake)


def local_path(uri: str) -> Path:
    """Absolute path of a folder's name or `file://` uri; `~` is the home folder.

    Raises:
        BadInput: another scheme, a mistyped uri, another host or an empty uri.
    """
    _check_uri(uri)
    if "://" not in uri:
        path = os.path.expanduser(uri)
    else:
        parts = urlsplit(uri)
        if parts.scheme != "file":
            raise BadInput(f"{uri}: scheme '{parts.scheme}' is not supported; use a folder, file:// or s3://")
        if parts.netloc not in ("", "localhost"):
            raise BadInput(
                f"{uri}: files of host '{parts.netloc}' are out of reach; write file:///{parts.netloc}{parts.path}"
            )
        # Not parts.path: a '?' or '#' is part of a file's name here.
        path = unquote(uri.removeprefix("file://").removeprefix("localhost"))
    if not path.strip() or "\0" in path:
        raise BadInput(f"{uri!r}: not a folder; name a folder, file:///folder or s3://bucket/prefix")
    return Path(os.path.abspath(path))


def split_uri(uri: str) -> tuple[str, str]:
    """Split a uri at its last literal folder, so that the first part opens and the second is a key or glob.

    A uri that ends with '/' is a folder: its key is empty. So is a bucket alone.

    Raises:
        BadInput: the uri is of no supported form.

    >>> split_uri("s3://datasets/tasks/*/train-*.json")
    ('s3://datasets/tasks', '*/train-*.json')
    >>> split_uri("s3://datasets/news/")
    ('s3://datasets/news', '')
    """
    _check_uri(uri)
    if uri.startswith("s3://"):
        bucket, _, path = uri.removeprefix("s3://").partition("/")
        root = f"s3://{bucket}"
    else:
        local = local_path(uri).as_posix()
        root, path = "/", local.removeprefix("/") + ("/" if uri.endswith("/") else "")
    parts = path.split("/")
    literal = next((at for at, part in enumerate(parts) if _GLOB_CHARACTERS & set(part)), len(parts) - 1)
    folder, key = "/".join(parts[:literal]), "/".join(parts[literal:])
    if key and key_problem(key) is not None:
        raise BadInput(f"{uri}: the name '{key}' {key_problem(key)}; correct it")
    return join_uri(root, folder), key
