"""The adapters of a catalog with their aliases, filtered; a damaged one stops no other.

One listing says what there is, and a snapshot what it holds: see snapshot.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pydantic import ValidationError

from raytune_ft.catalog.layout import (
    ADAPTERS,
    NEWEST_SNAPSHOT,
    VERSIONS_SNAPSHOT,
    numbered,
    versions_prefix,
)
from raytune_ft.catalog.listed import Listed, by_adapter
from raytune_ft.catalog.lookup import AliasEntry, CatalogView
from raytune_ft.catalog.record import AdapterRecord, parse_record
from raytune_ft.catalog.snapshot import Snapshot
from raytune_ft.errors import CatalogError
from raytune_ft.storage import ObjectInfo, Storage, join_uri

MOST_VERSIONS = 20
"""Of one adapter in `list_versions`."""
MOST_RECORDS = 5_000
"""Of all adapters in `list_versions`, unless the newest of each are more already."""


@dataclass(frozen=True)
class Filter:
    """What a listing shows; each field narrows it."""

    adapter: str = "*"
    """Glob of the name."""
    base: str = ""
    """Part of the base's path, or the beginning of its digest."""
    alias: str | None = None
    """The version that this alias means, instead of the newest; adapters without it are left out."""
    min_scores: Mapping[str, float] = field(default_factory=dict)
    """Least score after training, by metric; a version without the metric is left out."""

    def fits(self, record: AdapterRecord) -> bool:
        """Whether a version passes by its base and scores."""
        scores = record.scores_after or {}
        reached = all(name in scores and scores[name] >= least for name, least in self.min_scores.items())
        return reached and (self.base in record.base.path or record.base.digest.startswith(self.base))


@dataclass(frozen=True)
class Listing:
    """Versions with the aliases of their adapters, by name, and what could not be read."""

    rows: tuple[tuple[AdapterRecord, dict[str, int]], ...]
    damaged: tuple[str, ...]
    """One message for each adapter that is left out for it."""
    notes: tuple[str, ...] = ()
    """What is wrong and does no harm."""


@dataclass(frozen=True)
class History:
    """One adapter: its newest versions and those that aliases mean."""

    records: tuple[AdapterRecord, ...]
    """The newest first; at least one."""
    versions: int
    """How many there are, whether or not they are in `records`."""
    aliases: dict[str, int]


@dataclass(frozen=True)
class Histories:
    """All adapters by name, and what could not be read."""

    adapters: tuple[History, ...]
    damaged: tuple[str, ...]
    notes: tuple[str, ...]


def list_catalog(catalog: CatalogView, only: Filter = Filter()) -> Listing:
    """One version of each adapter that passes a filter: the newest, or the one that an alias means.

    Takes one listing and one more request, and one for each object that changed since the snapshot was
    written. Writes the snapshot where that pays and is allowed.

    Raises:
        StorageError: the store failed.
    """
    listed = {name: of for name, of in _listed(catalog.storage).items() if fnmatchcase(name, only.adapter)}
    reader = _Reader(catalog, NEWEST_SNAPSHOT)
    aliases = reader.aliases(listed)
    wanted = [
        (name, version)
        for name, of in aliases.items()
        if (version := next(iter(listed[name].living)) if only.alias is None else of.get(only.alias))
    ]
    records = reader.records(listed, wanted)
    if only.adapter == "*":
        newest = [next(iter(of.living.values())) for of in listed.values()]
        reader.save(listed, aliases, newest)
    return Listing(
        rows=tuple((record, aliases[name]) for (name, _), record in records.items() if only.fits(record)),
        damaged=tuple(sorted(reader.damaged)),
        notes=reader.notes,
    )


def list_versions(catalog: CatalogView) -> Histories:
    """The versions of all adapters: the newest `MOST_VERSIONS` of each, fewer where adapters are many.

    Raises:
        StorageError: the store failed.
    """
    listed = _listed(catalog.storage)
    reader = _Reader(catalog, VERSIONS_SNAPSHOT)
    aliases = reader.aliases(listed)
    most = max(1, min(MOST_VERSIONS, MOST_RECORDS // max(1, len(listed))))
    wanted = [
        (name, version)
        for name, of in aliases.items()
        for at, version in enumerate(listed[name].living)
        if at < most or version in of.values()
    ]
    by_name: dict[str, list[AdapterRecord]] = defaultdict(list)
    for (name, _), record in reader.records(listed, wanted).items():
        by_name[name].append(record)
    reader.save(listed, aliases, (listed[name].living[version] for name, version in wanted))
    adapters = [
        History(tuple(records), len(listed[name].living), aliases[name]) for name, records in by_name.items()
    ]
    return Histories(tuple(adapters), tuple(sorted(reader.damaged)), reader.notes)


class _Reader:
    """Reads what a listing shows, as far as possible from a snapshot."""

    def __init__(self, catalog: CatalogView, key: str) -> None:
        self._catalog = catalog
        self._snapshot = Snapshot(catalog.storage, key)
        self.damaged: list[str] = []

    @property
    def notes(self) -> tuple[str, ...]:
        return (self._snapshot.note,) if self._snapshot.note else ()

    def aliases(self, listed: Mapping[str, Listed]) -> dict[str, dict[str, int]]:
        """Version that each alias means, of each adapter but those with a damaged one."""
        contents = self._snapshot.contents(
            info for of in listed.values() for _, info in _last_moves(of).values()
        )
        found = {}
        for name, of in listed.items():
            try:
                found[name] = {
                    alias: self._alias_entry(name, alias, number, contents.get(info.key)).version
                    for alias, (number, info) in _last_moves(of).items()
                }
            except CatalogError as error:
                self.damaged.append(str(error))
        return found

    def records(
        self, listed: Mapping[str, Listed], wanted: Iterable[tuple[str, int]]
    ) -> dict[tuple[str, int], AdapterRecord]:
        """The records of versions by adapter and number, but for damaged ones."""
        wanted = list(wanted)
        present = [listed[name].living.get(version) for name, version in wanted]
        contents = self._snapshot.contents(filter(None, present))
        found = {}
        for name, version in wanted:
            key = numbered(versions_prefix(name), version)
            try:
                found[name, version] = self._record(name, version, contents.get(key))
            except CatalogError as error:
                self.damaged.append(str(error))
        return found

    def save(
        self,
        listed: Mapping[str, Listed],
        aliases: Mapping[str, Mapping[str, int]],
        records: Iterable[ObjectInfo],
    ) -> None:
        """Write the snapshot anew where that pays: records, last moves, and the versions they lead to."""
        self._snapshot.save({info.key: info for info in _useful(listed, aliases, records)}.values())

    def _alias_entry(self, name: str, alias: str, number: int, content: bytes | None) -> AliasEntry:
        if content is not None:
            with suppress(ValidationError):
                return AliasEntry.model_validate_json(content)
        return self._catalog.read_alias_entry(name, alias, number)

    def _record(self, name: str, version: int, content: bytes | None) -> AdapterRecord:
        if content is not None:
            place = join_uri(self._catalog.uri, numbered(versions_prefix(name), version))
            # A snapshot may be altered too: what is wrong with a record, the record itself says.
            with suppress(CatalogError):
                return parse_record(content, name, version, place)
        return self._catalog.read_living(name, version)


def _useful(
    listed: Mapping[str, Listed], aliases: Mapping[str, Mapping[str, int]], records: Iterable[ObjectInfo]
) -> Iterator[ObjectInfo]:
    yield from records
    for name, of in aliases.items():
        yield from (info for _, info in _last_moves(listed[name]).values())
        yield from (listed[name].living[at] for at in of.values() if at in listed[name].living)


def _listed(storage: Storage) -> dict[str, Listed]:
    """What stands under each adapter's name; adapters without any version left are left out."""
    adapters, _ = by_adapter(storage.list(ADAPTERS))
    return {name: of for name, of in adapters.items() if of.living}


def _last_moves(listed: Listed) -> dict[str, tuple[int, ObjectInfo]]:
    """Number and object of the last move of each alias."""
    return {alias: next(iter(moves.items())) for alias, moves in listed.moves.items()}
