"""Listing a large catalog: few requests, and never anything else than what is there."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import WrappedStorage, draft

from raytune_ft.catalog import AdapterRecord, CatalogView, FileEntry, Filter, list_catalog, snapshot
from raytune_ft.catalog.layout import (
    NEWEST_SNAPSHOT,
    VERSIONS_SNAPSHOT,
    alias_prefix,
    numbered,
    removed_prefix,
    versions_prefix,
)
from raytune_ft.catalog.listing import MOST_VERSIONS, list_versions
from raytune_ft.catalog.lookup import AliasEntry, Removal
from raytune_ft.errors import StorageDenied
from raytune_ft.storage import ObjectInfo, Storage, open_storage

ADAPTERS = 100


class CountingStorage(WrappedStorage):
    """Counts objects that are opened and listings that are begun."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.opened: list[str] = []
        self.listings = 0
        self.listed = 0

    def open(self, key: str, start: int = 0, stop: int | None = None, *, etag: str | None = None) -> BinaryIO:
        self.opened.append(key)
        return super().open(key, start, stop, etag=etag)

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        self.listings += 1
        for found in super().list(prefix, limit):
            self.listed += 1
            yield found


class ReadOnlyStorage(CountingStorage):
    """Gives no right to write."""

    def write(self, key: str, data: bytes | Path) -> None:  # noqa: ARG002  as in Storage
        raise StorageDenied(f"{self.uri}/{key}: denied")


def put(root: Path, key: str, content: bytes) -> None:
    (root / key).parent.mkdir(parents=True, exist_ok=True)
    (root / key).write_bytes(content)


def record_of(adapter: str, version: int, score: float = 0.5) -> bytes:
    return AdapterRecord(
        **dict(draft(adapter=adapter, scores_after={"exact_match": score})),
        version=version,
        publish_id=f"{adapter}-{version}",
        created_at="2026-01-01T00:00:00Z",
        files=(FileEntry(name="adapter_model.safetensors", sha256="a" * 64, size_bytes=7),),
    ).to_bytes()


def put_version(root: Path, adapter: str, version: int, score: float = 0.5) -> None:
    put(root, numbered(versions_prefix(adapter), version), record_of(adapter, version, score))


def put_alias(root: Path, adapter: str, move: int, version: int) -> None:
    entry = AliasEntry(version=version, previous=None, created_at="2026-01-01T00:00:00Z", token="t")
    key = numbered(alias_prefix(adapter, "production"), move)
    put(root, key, entry.model_dump_json().encode())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A hundred adapters with one version and one alias each; publishing them would be slow."""
    for number in range(ADAPTERS):
        put_version(tmp_path, f"adapter-{number:04}", 1)
        put_alias(tmp_path, f"adapter-{number:04}", 1, 1)
    return tmp_path


def shown(root: Path, only: Filter = Filter()) -> list[tuple[str, float, dict[str, int]]]:
    listing = list_catalog(CatalogView(open_storage(str(root))), only)
    assert not listing.damaged
    return [(record.reference, record.scores_after["exact_match"], of) for record, of in listing.rows]


def opened(root: Path, only: Filter = Filter()) -> list[str]:
    counting = CountingStorage(open_storage(str(root)))
    list_catalog(CatalogView(counting), only)
    assert counting.listings == 1
    return counting.opened


def test_the_second_listing_reads_one_object(root: Path) -> None:
    assert len(opened(root)) == 1 + 2 * ADAPTERS
    before = shown(root)
    assert opened(root) == [NEWEST_SNAPSHOT]
    assert shown(root) == before
    assert len(before) == ADAPTERS


def test_every_store_s_etags_tell_what_changed(storage: Storage) -> None:
    for number in range(snapshot.WORTH_WRITING + 1):
        storage.write(numbered(versions_prefix(f"adapter-{number}"), 1), record_of(f"adapter-{number}", 1))
    list_catalog(CatalogView(storage))
    changed = numbered(versions_prefix("adapter-7"), 1)
    storage.write(changed, record_of("adapter-7", 1, score=0.25))
    counting = CountingStorage(storage)
    rows = list_catalog(CatalogView(counting), Filter(adapter="adapter-7")).rows
    assert [record.scores_after for record, _ in rows] == [{"exact_match": 0.25}]
    assert counting.opened == [NEWEST_SNAPSHOT, changed]


def test_only_what_changed_is_read_and_nothing_old_is_shown(root: Path) -> None:
    shown(root)
    put_version(root, "adapter-0001", 2, score=0.9)
    put_alias(root, "adapter-0002", 2, 1)
    put_version(root, "adapter-0003", 1, score=0.25)
    (root / numbered(versions_prefix("adapter-0004"), 1)).unlink()
    assert sorted(opened(root)) == sorted(
        [
            NEWEST_SNAPSHOT,
            numbered(versions_prefix("adapter-0001"), 2),
            numbered(alias_prefix("adapter-0002", "production"), 2),
            numbered(versions_prefix("adapter-0003"), 1),
        ]
    )
    now = {reference: score for reference, score, _ in shown(root)}
    assert (now["adapter-0001@v2"], now["adapter-0003@v1"]) == (0.9, 0.25)
    assert "adapter-0004@v1" not in now
    assert len(now) == ADAPTERS - 1


def test_a_snapshot_is_written_when_it_pays_and_for_whole_listings_alone(root: Path) -> None:
    few = Filter(adapter="adapter-000*")
    assert len(opened(root, few)) == 1 + 2 * 10
    assert not (root / NEWEST_SNAPSHOT).exists()
    shown(root)
    written = (root / NEWEST_SNAPSHOT).read_bytes()
    assert opened(root, few) == [NEWEST_SNAPSHOT]
    put_version(root, "adapter-0001", 2)
    shown(root)
    assert (root / NEWEST_SNAPSHOT).read_bytes() == written
    for number in range(ADAPTERS):
        put_version(root, f"adapter-{number:04}", 3)
    shown(root)
    assert opened(root) == [NEWEST_SNAPSHOT]
    assert opened(root, Filter(alias="production")) == [NEWEST_SNAPSHOT]


def test_a_version_that_was_removed_is_not_the_newest(root: Path) -> None:
    put_version(root, "adapter-0001", 2)
    put(root, numbered(removed_prefix("adapter-0001"), 2), b"{}")
    put(root, numbered(removed_prefix("adapter-0002"), 1), b"{}")
    names = [reference for reference, _, _ in shown(root)]
    assert "adapter-0001@v1" in names
    assert not any(name.startswith("adapter-0002") for name in names)
    assert len(names) == ADAPTERS - 1


def test_an_alias_of_a_removed_version_shows_nothing_but_a_message(root: Path) -> None:
    put_version(root, "adapter-0001", 2)
    removal = Removal(
        adapter="adapter-0001",
        version=1,
        removed_at="2026-01-01T00:00:00Z",
        removed_by="me",
        reason="",
        token="t",
    )
    put(root, numbered(removed_prefix("adapter-0001"), 1), removal.model_dump_json().encode())
    view = CatalogView(open_storage(str(root)))
    listing = list_catalog(view, Filter(alias="production"))
    assert len(listing.rows) == ADAPTERS - 1
    (message,) = listing.damaged
    assert "adapter-0001@v1 was removed by me" in message
    history = list_versions(view).adapters[1]
    assert [record.version for record in history.records] == [2]


def test_who_may_not_write_lists_all_the_same(root: Path) -> None:
    storage = ReadOnlyStorage(open_storage(str(root)))
    for _ in range(2):
        listing = list_catalog(CatalogView(storage))
        assert (len(listing.rows), listing.damaged, listing.notes) == (ADAPTERS, (), ())
    assert len(storage.opened) == 2 * (1 + 2 * ADAPTERS)


def packed(index: object, contents: bytes = b"") -> bytes:
    return gzip.compress(json.dumps(index).encode() + b"\n" + contents)


BAD_SNAPSHOTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "truncated"),
    "text": (lambda _: b"hello", "not gzip"),
    "truncated": (lambda good: good[:-20], "truncated"),
    "a wrong sum": (lambda good: good[:-8] + bytes([good[-8] ^ 1]) + good[-7:], "not gzip, or damaged"),
    "two of them": (lambda good: good + good, "more than one snapshot"),
    "too large": (lambda good: good + bytes(snapshot.MAX_STORED_BYTES), "above 100,000 bytes"),
    "a bomb": (lambda _: gzip.compress(bytes(1_000_001)), "above 1,000,000 bytes once it is unpacked"),
    "no index": (lambda _: packed([]), "its first line is not"),
    "a later schema": (lambda _: packed({"schema_version": 2, "entries": []}), "its first line is not"),
    "a negative size": (lambda _: packed({"entries": [["a", "b", -1]]}), "its first line is not"),
    "deep": (lambda _: gzip.compress(b"[" * 100_000), "its first line is not"),
    "a wrong size": (lambda _: packed({"entries": [["a", "b", 7]]}, b"123"), "have not the size"),
}


@pytest.mark.parametrize("kind", BAD_SNAPSHOTS)
def test_a_bad_snapshot_is_named_not_used_and_replaced(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "MAX_STORED_BYTES", 100_000)
    monkeypatch.setattr(snapshot, "MAX_BYTES", 1_000_000)
    before = shown(root)
    spoil, message = BAD_SNAPSHOTS[kind]
    put(root, NEWEST_SNAPSHOT, spoil((root / NEWEST_SNAPSHOT).read_bytes()))
    listing = list_catalog(CatalogView(open_storage(str(root))))
    (note,) = listing.notes
    assert note.startswith(f"{root}/{NEWEST_SNAPSHOT}: ")
    assert message in note
    assert len(listing.rows) == ADAPTERS
    assert opened(root) == [NEWEST_SNAPSHOT]
    assert shown(root) == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_are_too_strange_for_a_snapshot(tmp_path: Path, content: bytes, compressed: bool) -> None:
    put_version(tmp_path, "a", 1)
    put(tmp_path, NEWEST_SNAPSHOT, gzip.compress(content) if compressed else content)
    listing = list_catalog(CatalogView(open_storage(str(tmp_path))))
    assert [record.reference for record, _ in listing.rows] == ["a@v1"]


def test_contents_that_a_snapshot_has_wrong_are_read_from_their_place(root: Path) -> None:
    before = shown(root)
    listed = open_storage(str(root)).list("adapters/")
    forged = {"entries": [[info.key, info.etag, 3] for info in listed]}
    put(root, NEWEST_SNAPSHOT, packed(forged, b"bad" * 2 * ADAPTERS))
    assert shown(root) == before


def test_a_damaged_record_is_damaged_each_time(root: Path) -> None:
    put(root, numbered(versions_prefix("adapter-0001"), 1), b"\xff not a record")
    for _ in range(2):
        listing = list_catalog(CatalogView(open_storage(str(root))))
        (message,) = listing.damaged
        assert "adapter-0001" in message
        assert len(listing.rows) == ADAPTERS - 1


def test_a_name_is_resolved_in_few_requests_however_many_adapters_there_are(tmp_path: Path) -> None:
    for number in range(1_000):
        put(tmp_path, numbered(versions_prefix(f"adapter-{number:04}"), 1), b"{}")
    for version in range(1, 31):
        put_version(tmp_path, "sums", version)
        put_alias(tmp_path, "sums", version, version)
    for reference in ("sums", "sums@production", "sums@v7"):
        storage = CountingStorage(open_storage(str(tmp_path)))
        CatalogView(storage).resolve(reference)
        assert len(storage.opened) + storage.listings <= 4
        assert storage.listed <= 4


class TestVersions:
    def test_all_versions_through_a_snapshot_of_their_own(self, root: Path) -> None:
        put_version(root, "adapter-0001", 2)
        view = CatalogView(CountingStorage(open_storage(str(root))))
        first, again = list_versions(view), list_versions(view)
        assert first == again
        assert isinstance(view.storage, CountingStorage)
        assert view.storage.opened.count(VERSIONS_SNAPSHOT) == 2
        assert len(view.storage.opened) == 2 + 2 * ADAPTERS + 1
        history = first.adapters[1]
        assert [record.version for record in history.records] == [2, 1]
        assert (history.versions, history.aliases) == (2, {"production": 1})

    def test_the_newest_and_those_that_aliases_mean(self, tmp_path: Path) -> None:
        for version in range(1, MOST_VERSIONS + 11):
            put_version(tmp_path, "sums", version)
        put_alias(tmp_path, "sums", 1, 3)
        (history,) = list_versions(CatalogView(open_storage(str(tmp_path)))).adapters
        newest = list(range(MOST_VERSIONS + 10, 10, -1))
        assert [record.version for record in history.records] == [*newest, 3]
        assert history.versions == MOST_VERSIONS + 10

    def test_a_damaged_version_stops_no_other(self, tmp_path: Path) -> None:
        for version in (1, 2):
            put_version(tmp_path, "sums", version)
        put(tmp_path, numbered(versions_prefix("sums"), 2), b"{}")
        found = list_versions(CatalogView(open_storage(str(tmp_path))))
        assert [record.reference for of in found.adapters for record in of.records] == ["sums@v1"]
        assert len(found.damaged) == 1
