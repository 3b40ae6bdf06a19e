"""Taking away what nothing needs any more: contents that no living version names, and old tokenised data.

Why no version loses a content, though publishers ask nobody and may use a content that a sweep has chosen:

- Only a content that was written longer ago than the limit is taken. All times here are the store's own. They
  are compared with the store's present time, and the content's is looked at again just before it is deleted.
- All records are read again just before each round of deletions. A record that is there by then protects its
  contents. A round is a few requests long.
- A publisher relies on no content that is older than `contents.FRESH_S` by its own clock: it writes it anew,
  which makes it young. So until its record is there, a content is at most as old as FRESH_S, the error of
  that clock and the time of the upload together. An S3 store refuses requests of a clock that is off by more
  than 15 minutes. With the least limit of an hour that leaves half an hour for the upload.
- Before and after it writes its record, a publisher makes sure that all contents are there, and writes again
  what is gone. This is for uploads that take longer, and for a content that is written anew in the moment
  between the last look at its time and its deletion.
- Files of a removed version are taken only once its removal is settled so that nobody restores it; see
  `removal.py`. No clock matters for that.

Not covered: a content whose time was looked at before a publisher wrote it anew, and whose deletion arrives
after that publisher's last look, so a request that is under way for longer than the rest of the publish; an
upload that takes longer than the limit less half an hour, or a folder whose clock is half an hour off the
publisher's, if the round of deletions under way began before the record and ends after the last look. Verify
finds what that breaks, and a publish of the same content repairs it.
"""

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from raytune_ft.catalog.layout import ADAPTERS, BLOBS, CACHE
from raytune_ft.catalog.listed import by_adapter
from raytune_ft.catalog.lookup import CatalogView
from raytune_ft.catalog.record import AdapterRecord
from raytune_ft.catalog.removal import settle
from raytune_ft.errors import CatalogError, StorageDenied, StorageMissing
from raytune_ft.storage import ObjectInfo, Storage, join_uri

LEAST_AGE_S = 3600.0
"""A younger content may belong to a publish under way; see above for why an hour is enough."""
_ROUND = 64
_THREADS = 8
_CONTENT = re.compile(rf"{BLOBS}[0-9a-f]{{64}}")
_CACHED = re.compile(rf"{CACHE}tokens/[0-9a-f]{{64}}\.arrow")

_Version = tuple[str, int]
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Swept:
    """What was taken away, or would be, by key."""

    contents: tuple[ObjectInfo, ...]
    cached: tuple[ObjectInfo, ...]
    """Tokenised data, which the next run makes again."""
    unfinished: tuple[str, ...] = ()
    """Places of what writers that were killed have left of their uploads."""
    note: str | None = None
    """Why such uploads were not looked for."""

    @property
    def size_bytes(self) -> int:
        """Of all of it."""
        return sum(found.size_bytes for found in (*self.contents, *self.cached))


def sweep(catalog: CatalogView, older_than_s: float, *, dry_run: bool = False) -> Swept:
    """Take away contents that no version names which is there, and tokenised data, once they are old.

    Those are what crashed publishes left and the files of removed versions. Records, aliases, notes of
    publishes and runs stay.

    Args:
        catalog: whose.
        older_than_s: how old a content, and the removal of each version that names it, must be at least.
        dry_run: take nothing away, and tell what would be.

    Raises:
        CatalogError: the age is below `LEAST_AGE_S`, nothing of a catalog is there, or a record cannot be
            read: then nothing is taken.
        StorageError: the store failed; the same call goes on.
    """
    if not older_than_s >= LEAST_AGE_S:
        raise CatalogError(
            f"an age of {older_than_s:,.0f} s is too little: a younger content than {LEAST_AGE_S:,.0f} s may "
            "belong to a publish under way; name a longer one"
        )
    catalog.check_there()
    storage = catalog.storage
    before = _present_time(storage) - older_than_s
    survey = _Survey(catalog, before)
    condemned = survey.removed()
    chosen = list(_chosen(storage, BLOBS, _CONTENT, before, survey.named(except_for=condemned)))
    cached = list(_chosen(storage, CACHE, _CACHED, before, frozenset()))
    if dry_run:
        return Swept(tuple(chosen), tuple(cached), *_unfinished(storage, before, dry_run=True))
    taken: list[ObjectInfo] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        naming = list(survey.naming(condemned, chosen))
        may_go = threads.map(survey.settle_swept, naming)
        condemned -= {at for at, may in zip(naming, may_go, strict=True) if not may}
        for start in range(0, len(chosen), _ROUND):
            survey.look()
            named = survey.named(except_for=condemned & survey.removed())
            free = [found for found in chosen[start : start + _ROUND] if _sha256(found) not in named]
            gone = threads.map(partial(_take, storage, before), free)
            taken += [found for found, done in zip(free, gone, strict=True) if done]
        list(threads.map(storage.delete, [found.key for found in cached]))
    return Swept(tuple(taken), tuple(cached), *_unfinished(storage, before, dry_run=False))


class _Survey:
    """All records of a catalog and which versions are removed, as they were at the last look."""

    def __init__(self, catalog: CatalogView, before: float) -> None:
        self._catalog = catalog
        self._before = before
        self._records: dict[_Version, tuple[ObjectInfo, AdapterRecord]] = {}
        self._removals: dict[_Version, tuple[ObjectInfo, bytes | None]] = {}
        self.look()

    def look(self) -> None:
        """Read what is new or has changed.

        Raises:
            CatalogError: a record or a removal's note cannot be read.
        """
        adapters, _ = by_adapter(self._catalog.storage.list(ADAPTERS))
        records = {(name, at): info for name, of in adapters.items() for at, info in of.versions.items()}
        removals = {(name, at): info for name, of in adapters.items() for at, info in of.removed.items()}
        self._records = _read_new(self._catalog.read, records, self._records)
        self._removals = _read_new(self._read_note, removals, self._removals)

    def removed(self) -> set[_Version]:
        """The versions that are removed for longer than the limit."""
        old = {at for at, (found, _) in self._removals.items() if found.modified_at < self._before}
        return old & self._records.keys()

    def named(self, *, except_for: set[_Version]) -> frozenset[str]:
        """Contents that some other version names."""
        return frozenset(
            entry.sha256
            for at, (_, record) in self._records.items()
            if at not in except_for
            for entry in record.files
        )

    def naming(self, among: Iterable[_Version], chosen: Sequence[ObjectInfo]) -> Iterator[_Version]:
        """Those of some versions that name any of these contents."""
        keys = {_sha256(found) for found in chosen}
        return (at for at in among if any(entry.sha256 in keys for entry in self._records[at][1].files))

    def settle_swept(self, at: _Version) -> bool:
        """Whether files of a removed version may be taken: nobody restores it, now or later."""
        note = self._removals[at][1]
        return note is not None and settle(self._catalog, at[0], note, "swept")

    def _read_note(self, adapter: str, version: int) -> bytes | None:
        content = self._catalog.read_removal_note(adapter, version)
        if content is not None:
            self._catalog.parse_removal(content, adapter, version)
        return content


def _read_new(
    read: Callable[[str, int], _Read],
    listed: Mapping[_Version, ObjectInfo],
    known: Mapping[_Version, tuple[ObjectInfo, _Read]],
) -> dict[_Version, tuple[ObjectInfo, _Read]]:
    """What was listed, read only where it is not known as it is."""
    new = [at for at, found in listed.items() if at not in known or known[at][0] != found]
    with ThreadPoolExecutor(_THREADS) as threads:
        try:
            contents = dict(zip(new, threads.map(lambda at: read(*at), new), strict=True))
        except CatalogError as error:
            raise CatalogError(f"{error}; nothing is taken away while this cannot be read") from None
    return {at: (found, contents[at]) if at in contents else known[at] for at, found in listed.items()}


def _unfinished(storage: Storage, before: float, *, dry_run: bool) -> tuple[tuple[str, ...], str | None]:
    try:
        return tuple(storage.discard_unfinished(before, dry_run=dry_run)), None
    except StorageDenied as error:
        return (), f"unfinished uploads were not looked for: {error}"


def _present_time(storage: Storage) -> float:
    """The store's own, in seconds since the epoch: that of an object which is written for it."""
    key = f"probes/{uuid.uuid4().hex}"
    storage.write(key, b"time")
    found = storage.info(key)
    storage.delete(key)
    if found is None:
        raise StorageMissing(
            f"{join_uri(storage.uri, key)}: was removed as soon as it was written; run again"
        )
    return found.modified_at


def _chosen(
    storage: Storage, prefix: str, form: re.Pattern[str], before: float, named: frozenset[str]
) -> Iterator[ObjectInfo]:
    for found in storage.list(prefix):
        if form.fullmatch(found.key) and found.modified_at < before and _sha256(found) not in named:
            yield found


def _sha256(found: ObjectInfo) -> str:
    return found.key.removeprefix(BLOBS)


def _take(storage: Storage, before: float, found: ObjectInfo) -> bool:
    """Delete a content, unless a publisher has written it anew."""
    now = storage.info(found.key)
    if now is None or now.modified_at >= before:
        return False
    storage.delete(found.key)
    return True
