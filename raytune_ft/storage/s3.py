"""A prefix of an S3 bucket as a store."""

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from raytune_ft.errors import StorageChanged, StorageError
from raytune_ft.storage.base import (
    READ_BYTES,
    ObjectInfo,
    check_key,
    check_prefix,
    join_uri,
    key_problem,
    split_bucket,
)
from raytune_ft.storage.folder import copy_to_file, disk_errors
from raytune_ft.storage.s3_requests import (
    BROKEN_CONNECTION,
    CHECK_OUTAGE_S,
    OUTAGE_S,
    Exists,
    NoObject,
    OutOfRange,
    S3Client,
    Transient,
    UploadGone,
    connect,
    retry,
)

PART_BYTES = 16 << 20
"""Files above this are uploaded in parts, so that a broken connection costs one part."""
MAX_PARTS = 10_000
_UPLOAD_THREADS = 4


class S3Storage:
    """Objects of one bucket under one prefix. Makes no request before it is used."""

    def __init__(self, uri: str) -> None:
        self._bucket, prefix = split_bucket(uri)
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._client_pid = 0

    def __reduce__(self) -> tuple[type["S3Storage"], tuple[str]]:
        return S3Storage, (self.uri,)

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`."""
        return join_uri(f"s3://{self._bucket}", self._prefix.removesuffix("/"))

    def check(self) -> None:
        """See Storage."""
        next(self._listed("", 1, CHECK_OUTAGE_S), None)

    def read(self, key: str) -> bytes:
        """See Storage."""
        with self.open(key) as stream:
            return stream.read()

    def read_or_none(self, key: str) -> bytes | None:
        """See Storage."""
        try:
            return self.read(key)
        except NoObject:
            return None

    def open(self, key: str, start: int = 0, stop: int | None = None, *, etag: str | None = None) -> BinaryIO:
        """See Storage. Goes on at the same byte when the connection breaks."""
        place = join_uri(self.uri, check_key(key))
        body = _ResumingBody(partial(self._send, "get_object", key), place, start, stop, etag)
        return cast(BinaryIO, io.BufferedReader(body, READ_BYTES))

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """See Storage."""
        return islice(self._listed(check_prefix(prefix), min(limit or 1000, 1000), OUTAGE_S), limit)

    def info(self, key: str) -> ObjectInfo | None:
        """See Storage."""
        try:
            head = self._request("head_object", key)
        except NoObject:
            return None
        return _describe(key, head["ContentLength"], head)

    def write(self, key: str, data: bytes | Path) -> None:
        """See Storage."""
        if isinstance(data, bytes):
            self._request("put_object", key, Body=data)
            return
        with disk_errors(str(data)):
            size_bytes = data.stat().st_size
        if size_bytes > PART_BYTES:
            self._write_parts(key, data, size_bytes)
        else:
            with disk_errors(str(data)):
                content = data.read_bytes()
            self._request("put_object", key, Body=content)

    def write_once(self, key: str, data: bytes) -> bool:
        """See Storage."""
        try:
            self._request("put_object", key, Body=data, IfNoneMatch="*")
        except Exists:
            return False
        return True

    def delete(self, key: str) -> None:
        """See Storage."""
        with suppress(NoObject):
            self._request("delete_object", key)

    def download(self, key: str, path: Path) -> None:
        """See Storage."""
        with self.open(key) as stream:
            copy_to_file(stream, path)

    def discard_unfinished(self, before: float, *, dry_run: bool = False) -> Sequence[str]:
        """See Storage."""
        found = [
            (upload["Key"].removeprefix(self._prefix), upload["UploadId"])
            for upload in self._uploads()
            if upload["Initiated"].timestamp() < before
        ]
        for key, upload_id in [] if dry_run else found:
            send = partial(self._send, "abort_multipart_upload", key, UploadId=upload_id)
            with suppress(NoObject, UploadGone):
                retry(send, join_uri(self.uri, key))
        return sorted(f"{join_uri(self.uri, key)} (upload {upload_id})" for key, upload_id in found)

    def _uploads(self) -> Iterator[Mapping[str, Any]]:
        """All uploads in parts that were begun and not ended."""
        arguments = {"Bucket": self._bucket, "Prefix": self._prefix}
        while True:
            send = partial(self._connect().send, "list_multipart_uploads", self.uri, **arguments)
            page = retry(send, self.uri)
            yield from page.get("Uploads", ())
            if not page["IsTruncated"]:
                return
            arguments["KeyMarker"] = page["NextKeyMarker"]
            arguments["UploadIdMarker"] = page["NextUploadIdMarker"]

    def _request(self, operation: str, key: str, **arguments: Any) -> Any:
        return retry(partial(self._send, operation, key, **arguments), join_uri(self.uri, check_key(key)))

    def _send(self, operation: str, key: str, **arguments: Any) -> Any:
        """One request about one object, not repeated."""
        place = join_uri(self.uri, key)
        return self._connect().send(
            operation, place, Bucket=self._bucket, Key=self._prefix + key, **arguments
        )

    def _listed(self, prefix: str, page_keys: int, outage_s: float) -> Iterator[ObjectInfo]:
        place = join_uri(self.uri, prefix)
        arguments = {"Bucket": self._bucket, "Prefix": self._prefix + prefix, "MaxKeys": page_keys}
        while True:
            send = partial(self._connect().send, "list_objects_v2", place, **arguments)
            page = retry(send, place, outage_s)
            for entry in page.get("Contents", ()):
                if entry["Key"].endswith("/") and entry["Size"] == 0:
                    continue  # Consoles put these up to show a folder.
                key = entry["Key"].removeprefix(self._prefix)
                if key_problem(key) is not None:
                    raise StorageError(
                        f"{self.uri}: the object name {key!r} {key_problem(key)}; rename or remove it"
                    )
                yield _describe(key, entry["Size"], entry)
            if not page["IsTruncated"]:
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _write_parts(self, key: str, path: Path, size_bytes: int) -> None:
        """Upload in parts: the object appears with the last request, complete or not at all."""
        upload = self._request("create_multipart_upload", key)["UploadId"]
        part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))

        def send(number: int) -> str:
            with disk_errors(str(path)), path.open("rb") as stream:
                stream.seek((number - 1) * part_bytes)
                body = stream.read(part_bytes)
            return str(
                self._request("upload_part", key, UploadId=upload, PartNumber=number, Body=body)["ETag"]
            )

        try:
            with ThreadPoolExecutor(_UPLOAD_THREADS) as threads:
                etags = tuple(threads.map(send, range(1, -(-size_bytes // part_bytes) + 1)))
            self._complete(key, upload, etags)
        except BaseException:
            with suppress(StorageError):  # The first error is the one to show.
                self._request("abort_multipart_upload", key, UploadId=upload)
            raise

    def _complete(self, key: str, upload: str, etags: Sequence[str]) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, start=1)]
        try:
            self._request("complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": parts})
        except UploadGone:
            # An earlier try may have succeeded and its answer been lost: then the object's etag is that of
            # these parts.
            digests = b"".join(bytes.fromhex(etag.strip('"')) for etag in etags)
            expected = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(etags)}"
            found = self.info(key)
            if found is None or found.etag != expected:
                raise

    def _connect(self) -> S3Client:
        # A forked child must not talk on its parent's connections.
        with self._lock:
            if self._client is None or self._client_pid != os.getpid():
                self._client, self._client_pid = connect(), os.getpid()
            return self._client


def _describe(key: str, size_bytes: int, told: Mapping[str, Any]) -> ObjectInfo:
    # A listing may tell fractions of a second, a header cannot: one object has one time.
    modified_at = float(int(told["LastModified"].timestamp()))
    return ObjectInfo(key, size_bytes, told["ETag"].strip('"'), modified_at)


class _ResumingBody(io.RawIOBase):
    """Some bytes of an object as a raw stream, which asks for the rest after each broken connection."""

    def __init__(
        self, get: Callable[..., Any], place: str, start: int, stop: int | None, etag: str | None
    ) -> None:
        super().__init__()
        self._get = get
        self._place = place
        self._offset = start
        self._stop = stop
        self._expected = etag
        # As the header wants it: a listing's etags have lost their quotes.
        self._etag = None if etag is None else f'"{etag}"'
        self._body: Any = None
        # Asked for at once, so that a missing object shows in open() and not in the first read.
        retry(self._ask, place)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return retry(lambda: self._read_some(buffer), self._place)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(READ_BYTES) or b"", b""))

    def close(self) -> None:
        self._drop_body()
        super().close()

    def _drop_body(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None

    def _ask(self) -> None:
        condition = {} if self._etag is None else {"IfMatch": self._etag}
        if self._offset or self._stop is not None:
            # No range is empty; of one that should be, a byte is asked for and none read.
            last = "" if self._stop is None else max(self._stop - 1, self._offset)
            condition["Range"] = f"bytes={self._offset}-{last}"
        try:
            answer = self._get(**condition)
        except OutOfRange:
            self._body = io.BytesIO()  # The object ends before the first byte that is wanted.
            return
        except Exists:
            if self._expected is None:
                raise StorageChanged(f"{self._place}: changed while it was being read; run again") from None
            raise StorageChanged(
                f"{self._place}: changed: not version {self._expected} any more; run again"
            ) from None
        self._etag, self._body = answer["ETag"], answer["Body"]

    def _read_some(self, buffer: Any) -> int:
        wanted = READ_BYTES if self._stop is None else min(READ_BYTES, self._stop - self._offset)
        if wanted <= 0:
            return 0
        if self._body is None:
            self._ask()
        try:
            count = int(self._body.readinto(memoryview(buffer)[:wanted]))
        except BROKEN_CONNECTION as error:
            self._drop_body()
            raise Transient(f"the connection broke at byte {self._offset:,}") from error
        self._offset += count
        return count
