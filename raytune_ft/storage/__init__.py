"""Folders and S3 buckets behind one small protocol. The only package that knows boto3 and s3fs."""

import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from raytune_ft.errors import StorageDenied
from raytune_ft.storage.base import (
    ObjectInfo,
    Storage,
    check_key,
    join_uri,
    local_path,
    split_bucket,
    split_uri,
)
from raytune_ft.storage.folder import FolderStorage, copy_to_file, disk_errors

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = [
    "FolderStorage",
    "ObjectInfo",
    "Storage",
    "arrow_filesystem",
    "check_key",
    "conditional_writes_hold",
    "copy_to_file",
    "disk_errors",
    "join_uri",
    "local_path",
    "open_parent",
    "open_storage",
    "split_uri",
]


def open_storage(uri: str) -> Storage:
    """Storage rooted at a folder, `file://` or `s3://` uri. Makes no request and creates nothing.

    Raises:
        BadInput: the uri is of no supported form.
    """
    if uri.startswith("s3://"):
        from raytune_ft.storage.s3 import (
            S3Storage,
        )  # boto3 takes 0.2 s to import, which folders need not wait for

        return S3Storage(uri)
    return FolderStorage(local_path(uri))


def open_parent(uri: str) -> tuple[Storage, str]:
    """Storage of the folder that holds an object, and the object's key (or glob) in it; see `split_uri`."""
    root, key = split_uri(uri)
    return open_storage(root), key


def conditional_writes_hold(storage: Storage) -> bool:
    """Whether `write_once` holds its promise here: create an object twice, see the second refused.

    The object is removed again where the credentials allow it; nothing else of a first run deletes.

    Raises:
        StorageError: the store failed or denied the write.
    """
    key = f"probes/{uuid.uuid4().hex}"
    # The first answer may be a refusal of its own repetition, so only the content counts.
    storage.write_once(key, b"first")
    held = not storage.write_once(key, b"second") and storage.read(key) == b"first"
    with suppress(StorageDenied):
        storage.delete(key)
    return held


def arrow_filesystem(uri: str) -> tuple["pyarrow.fs.FileSystem", str]:
    """File system and path for Ray Train's `storage_filesystem` and `storage_path`.

    For S3 this is s3fs, not pyarrow's own client, which gives up in an outage of a few seconds and loses its
    retries when it is pickled. In a folder a file is replaced as a whole.
    """
    import pyarrow.fs

    if not uri.startswith("s3://"):
        from raytune_ft.storage.arrow import WholeFiles

        return WholeFiles(), str(local_path(uri))
    import s3fs

    from raytune_ft.storage.s3_requests import config, region

    bucket, prefix = split_bucket(uri)
    remote = s3fs.S3FileSystem(
        config_kwargs={**config(), "retries": {"mode": "standard", "max_attempts": 10}},
        client_kwargs={"region_name": region()},
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(remote)), f"{bucket}/{prefix}".rstrip("/")
