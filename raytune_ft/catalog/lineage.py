"""Where a version came from: what training began from or weights were merged from, and their aliases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytune_ft.catalog.lookup import AliasEntry, CatalogView, split_reference
from raytune_ft.catalog.record import AdapterRecord
from raytune_ft.errors import CatalogError

_MAX_DEPTH = 32
"""Merges of merges are followed no deeper: each takes a frame of the stack."""


@dataclass(frozen=True)
class AliasPeriod:
    """A time in which an alias meant a version."""

    alias: str
    since: str
    """ISO time of the move to the version."""
    until: str | None
    """ISO time of the move away; None: it means the version now."""
    moved_by: str


@dataclass(frozen=True)
class Ancestor:
    """One version of a chain."""

    record: AdapterRecord
    periods: tuple[AliasPeriod, ...]
    """By alias, then by time."""
    merged_from: tuple["Lineage", ...]
    """Of each version that it was merged from, in the record's order."""


@dataclass(frozen=True)
class Lineage:
    """A version, its parent, and so on."""

    reference: str
    """As it was asked for, or as a record names it."""
    chain: tuple[Ancestor, ...]
    """The version first, the oldest last; empty where even the first is not to be had."""
    broken: str | None
    """Why the chain ends before a version without parent; None where it does not."""


def lineage_of(catalog: CatalogView, reference: str) -> Lineage:
    """Follow the parents of a version, and what it was merged from, as far as the catalog has them.

    Raises:
        CatalogError: no such version, or its record or an alias's log is damaged.
        StorageError: the store failed.
    """
    record = catalog.resolve(reference)
    return _Walk(catalog).follow(reference, record, below=frozenset())


class _Walk:
    """Follows each version once, however many were made from it: records are not trusted to be few."""

    def __init__(self, catalog: CatalogView) -> None:
        self._catalog = catalog
        self._seen: set[str] = set()
        self._logs: dict[str, Mapping[str, Sequence[AliasEntry]]] = {}

    def follow(self, reference: str, record: AdapterRecord, below: frozenset[str]) -> Lineage:
        """The chain from a version on; `below` are the versions that it is an ancestor of."""
        chain: list[Ancestor] = []
        broken = None
        following: AdapterRecord | None = record
        while following is not None:
            record = following
            self._seen.add(record.reference)
            below |= {record.reference}
            merged = tuple(self._source(record, source, below) for source in record.merged_from)
            chain.append(Ancestor(record, _periods(self._log(record.adapter), record), merged))
            following = None
            if record.parent is not None:
                following, broken = self._next(record, record.parent, below)
        return Lineage(reference, tuple(chain), broken)

    def _source(self, child: AdapterRecord, reference: str, below: frozenset[str]) -> Lineage:
        record, broken = self._next(child, reference, below)
        if record is not None and len(below) > _MAX_DEPTH:
            broken = (
                f"{record.reference}: more than {_MAX_DEPTH} versions from the first; look at it by itself"
            )
        if record is None or broken is not None:
            return Lineage(reference, (), broken)
        return self.follow(reference, record, below)

    def _next(
        self, child: AdapterRecord, reference: str, below: frozenset[str]
    ) -> tuple[AdapterRecord | None, str | None]:
        """The record of what a version was made from, or why it is not followed."""
        try:
            record = self._find(reference)
        except CatalogError as error:
            return None, str(error)
        if record is None:
            return None, f"{reference}: is not in {self._catalog.uri}"
        if child.origin is not None and not _is_copy(record, child.origin.catalog, reference):
            # The names in a copy are those of its first catalog, and may mean something else here.
            return None, f"{reference}: of {child.origin.catalog}; look there"
        if record.reference in below:
            return None, f"{record.reference}: is its own ancestor; a record was altered or damaged"
        if record.reference in self._seen:
            return None, "stands above"
        return record, None

    def _find(self, reference: str) -> AdapterRecord | None:
        adapter, _, version = split_reference(reference)
        if version is None:
            return self._catalog.resolve(reference)
        # Not resolved: records may name many versions that are not there, and a message about each would
        # take listings of the whole catalog.
        return self._catalog.find_living(adapter, version)

    def _log(self, adapter: str) -> Mapping[str, Sequence[AliasEntry]]:
        """All moves of each alias of an adapter, the last one first; read once."""
        if adapter not in self._logs:
            self._logs[adapter] = {
                alias: [self._catalog.read_alias_entry(adapter, alias, number) for number in moves]
                for alias, moves in self._catalog.moves(adapter).items()
            }
        return self._logs[adapter]


def _is_copy(record: AdapterRecord, catalog: str, reference: str) -> bool:
    return record.origin is not None and (record.origin.catalog, record.origin.reference) == (
        catalog,
        reference,
    )


def _periods(logs: Mapping[str, Sequence[AliasEntry]], record: AdapterRecord) -> tuple[AliasPeriod, ...]:
    periods: list[AliasPeriod] = []
    for alias, log in sorted(logs.items()):
        until = None
        found = []
        for entry in log:
            if entry.version == record.version:
                found.append(AliasPeriod(alias, entry.created_at, until, entry.moved_by))
            until = entry.created_at
        periods += reversed(found)
    return tuple(periods)
