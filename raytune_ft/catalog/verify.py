"""Checking a catalog from end to end: records, aliases and content. Nothing that is read is trusted."""

import hashlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from raytune_ft.catalog.layout import ADAPTERS, BLOBS, PUBLISHES, blob_key, publish_key
from raytune_ft.catalog.listed import Listed, by_adapter
from raytune_ft.catalog.lookup import AliasEntry, CatalogView, Removal
from raytune_ft.catalog.record import AdapterRecord, FileEntry
from raytune_ft.catalog.signing import Trust, fingerprint
from raytune_ft.catalog.weights import LENGTH_BYTES, header_problem, length_problem
from raytune_ft.errors import CatalogError, StorageMissing
from raytune_ft.spec.values import NAME
from raytune_ft.storage import Storage, join_uri

_READERS = 8
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong."""

    versions: int
    """Records that were read and are sound, those of removed versions too."""
    files: int
    """Contents that versions name which are not removed, each once however many share it."""
    size_bytes: int
    """Of those contents, as the records say."""
    problems: tuple[str, ...]
    """One message each; none where all is well."""
    notes: tuple[str, ...]
    """What is no part of the catalog and does no harm, such as what a crashed publish left."""


@dataclass(frozen=True)
class _Use:
    """One file of one version."""

    reference: str
    entry: FileEntry


def verify(
    catalog: CatalogView, reference: str | None = None, *, quick: bool = False, trust: Trust = Trust()
) -> Verification:
    """Check all of a catalog, one adapter with its aliases, or one version.

    Args:
        catalog: which.
        reference: `name`, `name@v3` or `name@alias`; None: everything, and what no record names is noted.
        quick: look at the sizes of contents and the headers of weights, not at every byte.
        trust: what is asked of signatures; a signer that is not trusted is noted where none is required.

    Raises:
        CatalogError: the reference means nothing here, or nothing of a catalog is there.
        StorageError: the store failed, which says nothing about what it holds.
    """
    if reference is None:
        catalog.check_there()
    problems: list[str] = []
    notes: list[str] = []
    removed: set[str] = set()
    if reference and "@" in reference:
        records = [catalog.resolve(reference)]
    else:
        if reference and not (NAME.fullmatch(reference) and catalog.newest_version(reference)):
            catalog.resolve(reference)
        prefix = f"{ADAPTERS}{reference}/" if reference else ADAPTERS
        listed, foreign = by_adapter(catalog.storage.list(prefix))
        notes += [f"{join_uri(catalog.uri, found.key)}: not the catalog's" for found in foreign]
        records = _check_records(catalog, listed, problems)
        removed = {f"{name}@v{number}" for name, of in listed.items() for number in of.removed}
    uses: dict[str, list[_Use]] = defaultdict(list)
    for record in records:
        for entry in () if record.reference in removed else record.files:
            uses[entry.sha256].append(_Use(record.reference, entry))
    damaged = bool(problems)
    with ThreadPoolExecutor(_READERS) as readers:
        check = _ContentCheck(catalog.storage, quick)
        for found in readers.map(check, uses.values()):
            problems += found
    if reference is None:
        if damaged:
            notes.append("what no record names is not listed while records or aliases have problems")
        else:
            notes += _orphans(catalog.storage, records)
    problems += _signature_problems(records, trust)
    notes += _unknown_signers(records, trust)
    size_bytes = sum(of[0].entry.size_bytes for of in uses.values())
    return Verification(len(records), len(uses), size_bytes, tuple(problems), tuple(notes))


def _check_records(
    catalog: CatalogView, adapters: Mapping[str, Listed], problems: list[str]
) -> list[AdapterRecord]:
    """The records that are sound; what is wrong with the others, and with the aliases, is added."""
    versions = [(name, number) for name, of in adapters.items() for number in sorted(of.versions)]
    moves = [
        (name, alias, number)
        for name, of in adapters.items()
        for alias, numbers_of in of.moves.items()
        for number in sorted(numbers_of)
    ]
    with ThreadPoolExecutor(_READERS) as readers:
        records = list(readers.map(lambda at: _attempt(lambda: catalog.read(*at)), versions))
        entries = list(readers.map(lambda at: _attempt(lambda: catalog.read_alias_entry(*at)), moves))
    problems += [found for found in (*records, *entries) if isinstance(found, str)]
    for name, of in adapters.items():
        problems += _gap(f"{catalog.uri}: {name}: version v", of.versions)
        for alias, numbers_of in of.moves.items():
            problems += _gap(f"{catalog.uri}: {name}@{alias}: move ", numbers_of)
    read = {at: entry for at, entry in zip(moves, entries, strict=True) if isinstance(entry, AliasEntry)}
    for name, alias, number in read:
        place = f"{catalog.uri}: {name}@{alias}: move {number} "
        problem = _move_problem(read, (name, alias, number), adapters[name].versions)
        problems += [place + problem] if problem else []
    for name, of in adapters.items():
        problems += _removal_problems(catalog, name, of)
    return [record for record in records if isinstance(record, AdapterRecord)]


def _removal_problems(catalog: CatalogView, adapter: str, listed: Listed) -> Iterator[str]:
    for version in sorted(listed.removed):
        found = _attempt(partial(catalog.read_removal, adapter, version))
        if isinstance(found, str):
            yield found
        if version not in listed.versions:
            yield f"{catalog.uri}: {adapter}: v{version} is removed, and its record is not there"
    for alias in listed.moves if listed.removed else ():
        # What cannot be read is a problem already.
        removal = _attempt(partial(_removal_of, catalog, adapter, alias))
        if isinstance(removal, Removal):
            yield f"{catalog.uri}: {adapter}@{alias}: {removal}; restore it or move the alias"


def _removal_of(catalog: CatalogView, adapter: str, alias: str) -> Removal | None:
    # Asked for anew: a listing takes time, and the alias may have moved before the version was removed.
    _, entry = catalog.newest_alias_entry(adapter, alias)
    return catalog.read_removal(adapter, entry.version) if entry else None


def _move_problem(
    read: Mapping[tuple[str, str, int], AliasEntry], at: tuple[str, str, int], versions: Container[int]
) -> str | None:
    """What is wrong with a move, given the others that could be read."""
    entry, (name, alias, number) = read[at], at
    if entry.version not in versions:
        return f"goes to v{entry.version}, which is not there"
    before = read.get((name, alias, number - 1))
    came_from = before.version if before else None
    if (before or number == 1) and entry.previous != came_from:
        return f"says that it came from {_version(entry.previous)}, and it came from {_version(came_from)}"
    known = 0 if number == 1 else before.highest if before else None
    if None not in (known, entry.highest) and entry.highest != max(known or 0, entry.version):
        return f"says that v{entry.highest} is the highest version that it has meant, and it is not"
    if entry.restores is not None:
        restored = read.get((name, alias, entry.restores))
        if entry.restores >= number or (restored and restored.version != entry.version):
            return f"restores move {entry.restores}, which did not go to v{entry.version}"
    return None


def _attempt(read: Callable[[], _Read]) -> _Read | str:
    try:
        return read()
    except CatalogError as error:
        return str(error)


def _version(version: int | None) -> str:
    return "nothing" if version is None else f"v{version}"


def _gap(place: str, found: Collection[int]) -> Iterator[str]:
    # Not a range up to the highest: a foreign object may bear any number.
    missing = max(found, default=0) - len(found)
    if missing:
        first = next(at for at, number in enumerate(sorted(found), start=1) if at != number)
        more = f", nor are {missing - 1:,} more" if missing > 1 else ""
        yield f"{place}{first} is not there{more}, and later ones are; the objects were removed or moved"


def _signature_problems(records: Iterable[AdapterRecord], trust: Trust) -> Iterator[str]:
    for record in records:
        problem = trust.problem(record)
        if problem is not None:
            yield f"{record.reference}: {problem}"


def _unknown_signers(records: Iterable[AdapterRecord], trust: Trust) -> Iterator[str]:
    if trust.required:
        return  # Those are problems.
    signers = Counter(record.signature.public_key for record in records if record.signature)
    for public_key, count in signers.items():
        if public_key not in trust.keys:
            yield f"{fingerprint(public_key)} signed {count:,} versions and is none of the trusted keys"


class _ContentCheck:
    """Looks at one content and says what is wrong with it, for the first version that names it."""

    def __init__(self, storage: Storage, quick: bool) -> None:
        self._storage = storage
        self._quick = quick
        # A header may take 100 MB, and much more once it is parsed: one at a time.
        self._one_header = threading.Lock()

    def __call__(self, uses: Sequence[_Use]) -> list[str]:
        sha256 = uses[0].entry.sha256
        key = blob_key(sha256)
        found = self._storage.info(key)
        if found is None:
            return [self._place(uses) + "is gone; publish the adapter again"]
        wrong = [use for use in uses if use.entry.size_bytes != found.size_bytes]
        if wrong:
            said = wrong[0].entry.size_bytes
            return [self._place(wrong) + f"has {found.size_bytes:,} bytes, and the record says {said:,}"]
        try:
            if not self._quick and self._sha256(key) != sha256:
                return [
                    self._place(uses) + "the content is not that of its sha256; it was altered or damaged"
                ]
            weights = [use for use in uses if use.entry.name.endswith(".safetensors")]
            problem = self._header_problem(key, found.size_bytes) if weights else None
        except StorageMissing:
            return [self._place(uses) + "was removed while it was being read"]
        return [self._place(weights) + problem] if problem else []

    def _place(self, uses: Sequence[_Use]) -> str:
        first = uses[0]
        others = len({use.reference for use in uses}) - 1
        more = f" and in {others} more" if others else ""
        uri = join_uri(self._storage.uri, blob_key(first.entry.sha256))
        return f"{first.reference}{more}: {first.entry.name} ({uri}): "

    def _sha256(self, key: str) -> str:
        digest = hashlib.sha256()
        with self._storage.open(key) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def _header_problem(self, key: str, size_bytes: int) -> str | None:
        with self._one_header, self._storage.open(key) as stream:
            length = stream.read(LENGTH_BYTES)
            problem = length_problem(length, size_bytes)
            if problem is not None:
                return problem
            header_bytes = int.from_bytes(length, "little")
            header = stream.read(header_bytes)
        return header_problem(header, size_bytes - LENGTH_BYTES - header_bytes)


def _orphans(storage: Storage, records: Iterable[AdapterRecord]) -> Iterator[str]:
    """What no record names: a crashed publish left it, or one is under way."""
    named = {blob_key(entry.sha256) for record in records for entry in record.files}
    for found in storage.list(BLOBS):
        if found.key not in named:
            yield f"{join_uri(storage.uri, found.key)}: {found.size_bytes:,} bytes that no record names"
    published = {publish_key(record.publish_id) for record in records}
    for found in storage.list(PUBLISHES):
        if found.key not in published:
            yield f"{join_uri(storage.uri, found.key)}: a publish that has made no version"
