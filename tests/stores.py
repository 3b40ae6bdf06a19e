"""Stores that fail on purpose, around real ones; and something to publish."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from raytune_ft.catalog import BaseModelRef, Catalog, RecordDraft
from raytune_ft.errors import StorageDenied
from raytune_ft.storage import ObjectInfo, Storage, open_storage


class WrappedStorage:
    """Passes everything on; the base of those that do not."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    @property
    def uri(self) -> str:
        return self.inner.uri

    def check(self) -> None:
        self.inner.check()

    def read(self, key: str) -> bytes:
        return self.inner.read(key)

    def read_or_none(self, key: str) -> bytes | None:
        return self.inner.read_or_none(key)

    def open(self, key: str, start: int = 0, stop: int | None = None, *, etag: str | None = None) -> BinaryIO:
        return self.inner.open(key, start, stop, etag=etag)

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        return self.inner.list(prefix, limit)

    def info(self, key: str) -> ObjectInfo | None:
        return self.inner.info(key)

    def write(self, key: str, data: bytes | Path) -> None:
        self.inner.write(key, data)

    def write_once(self, key: str, data: bytes) -> bool:
        return self.inner.write_once(key, data)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def download(self, key: str, path: Path) -> None:
        self.inner.download(key, path)

    def discard_unfinished(self, before: float, *, dry_run: bool = False) -> Sequence[str]:
        return self.inner.discard_unfinished(before, dry_run=dry_run)


class Crash(Exception):
    """The process dies here."""


class CrashingStorage(WrappedStorage):
    """Dies around its n-th write: just before it, or just after it."""

    def __init__(self, inner: Storage, crash_at: int, *, written: bool) -> None:
        super().__init__(inner)
        self.crash_at = crash_at
        self.written = written
        self.writes = 0

    def _passes(self) -> bool:
        """Whether the next write is done; raises Crash where it is not."""
        self.writes += 1
        if self.writes == self.crash_at and not self.written:
            raise Crash
        return self.writes == self.crash_at

    def write(self, key: str, data: bytes | Path) -> None:
        dies = self._passes()
        super().write(key, data)
        if dies:
            raise Crash

    def write_once(self, key: str, data: bytes) -> bool:
        dies = self._passes()
        created = super().write_once(key, data)
        if dies:
            raise Crash
        return created


class ForgetfulStorage(WrappedStorage):
    """Loses every answer to a conditional write and repeats the request, as a client does."""

    def write_once(self, key: str, data: bytes) -> bool:
        super().write_once(key, data)
        return super().write_once(key, data)


class CarelessStorage(WrappedStorage):
    """Takes every write for the first one, as stores without conditional writes do."""

    def write_once(self, key: str, data: bytes) -> bool:
        super().write(key, data)
        return True


class KeepingStorage(WrappedStorage):
    """Gives no right to delete, as careful owners of a bucket do."""

    def delete(self, key: str) -> None:
        raise StorageDenied(f"{self.uri}/{key}: denied")


class InterruptedStorage(WrappedStorage):
    """Something else happens just before the n-th request; -1: never. Counts the requests."""

    def __init__(self, inner: Storage, at: int, happens: Callable[[], object]) -> None:
        super().__init__(inner)
        self.keys: list[str] = []
        self._at = at
        self._happens = happens

    @property
    def requests(self) -> int:
        return len(self.keys)

    def _request(self, key: str) -> None:
        self.keys.append(key)
        if len(self.keys) == self._at + 1:
            self._happens()

    def read(self, key: str) -> bytes:
        self._request(key)
        return super().read(key)

    def read_or_none(self, key: str) -> bytes | None:
        self._request(key)
        return super().read_or_none(key)

    def open(self, key: str, start: int = 0, stop: int | None = None, *, etag: str | None = None) -> BinaryIO:
        self._request(key)
        return super().open(key, start, stop, etag=etag)

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        self._request(prefix)
        return super().list(prefix, limit)

    def info(self, key: str) -> ObjectInfo | None:
        self._request(key)
        return super().info(key)

    def write(self, key: str, data: bytes | Path) -> None:
        self._request(key)
        super().write(key, data)

    def write_once(self, key: str, data: bytes) -> bool:
        self._request(key)
        return super().write_once(key, data)

    def delete(self, key: str) -> None:
        # The one moment that nothing covers is that between gc's last look at a content and its deletion.
        if not key.startswith("blobs/"):
            self._request(key)
        super().delete(key)


def draft(**changes: Any) -> RecordDraft:
    """The least that can be said of an adapter."""
    values: dict[str, Any] = {
        "adapter": "capital",
        "base": BaseModelRef(path="s3://models/tiny", digest="d" * 64),
        "method": {"kind": "lora", "rank": 8},
        "job": {"name": "capital"},
        "data": {"fingerprint": "f" * 64, "counts": {"train": 3}},
        "seed": 0,
        "steps": 10,
        "tokens": 1000,
        "learned_tokens": 100,
        "loss": 1.5,
        "code_version": "0.1.0",
        "library_versions": {"torch": "2.13.0"},
        "machine": {"system": "Linux"},
        "scores_before": {"exact_match": 0.0},
        "scores_after": {"exact_match": 0.75},
    }
    return RecordDraft(**{**values, **changes})


def adapter_files(folder: Path, *, content: bytes = b"weights") -> Mapping[str, Path]:
    """Files of a version. The catalog looks at names and bytes, never inside."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "adapter_model.safetensors": content,
        "adapter_config.json": b"{}",
        "README.md": b"# capital\n",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in contents}


def publish_through_crashes(uri: str, writer: int, count: int, folder: Path, adapter: str) -> dict[str, int]:
    """Publish `count` versions, dying at random writes and starting over until each is done.

    Returns:
        Version of each publish id.
    """
    chance = random.Random(writer)
    versions = {}
    for number in range(count):
        publish_id = f"writer-{writer}-{number}"
        files = adapter_files(folder / publish_id, content=publish_id.encode())
        while publish_id not in versions:
            storage = CrashingStorage(open_storage(uri), chance.randint(1, 8), written=chance.random() < 0.5)
            with suppress(Crash):
                record = Catalog(storage).publish(draft(adapter=adapter), files, publish_id=publish_id)
                versions[publish_id] = record.version
    return versions


def check_race(catalog: Catalog, adapter: str, published: Mapping[str, int]) -> None:
    """Nothing lost, nothing twice, no gap, nothing half visible."""
    assert list(catalog.versions(adapter)) == list(range(1, len(published) + 1))
    assert sorted(published.values()) == list(catalog.versions(adapter))
    for publish_id, version in published.items():
        record = catalog.resolve(f"{adapter}@v{version}")
        assert record.publish_id == publish_id
        weights = next(entry for entry in record.files if entry.name.endswith(".safetensors"))
        assert catalog.storage.read(f"blobs/{weights.sha256}") == publish_id.encode()
