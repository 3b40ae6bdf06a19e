"""Where a version came from: the versions that training began from, one after another, and their aliases."""

from dataclasses import dataclass

from raytune_ft.catalog.aliases import alias_history
from raytune_ft.catalog.lookup import CatalogView
from raytune_ft.catalog.record import AdapterRecord
from raytune_ft.errors import CatalogError


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


@dataclass(frozen=True)
class Lineage:
    """A version, its parent, and so on."""

    chain: tuple[Ancestor, ...]
    """The version that was asked for first, the oldest last."""
    broken: str | None
    """Why the chain ends before a version without parent; None where it does not."""


def lineage_of(catalog: CatalogView, reference: str) -> Lineage:
    """Follow the parents of a version as far as the catalog has them.

    Raises:
        CatalogError: no such version, or its record or an alias's log is damaged.
        StorageError: the store failed.
    """
    record = catalog.resolve(reference)
    chain = [Ancestor(record, _periods(catalog, record))]
    seen = {record.reference}
    broken = None
    while record.parent is not None and broken is None:
        try:
            record = catalog.resolve(record.parent)
        except CatalogError as error:
            broken = str(error)
            continue
        if record.reference in seen:
            broken = f"{record.reference}: is its own ancestor; a record was altered or damaged"
            continue
        seen.add(record.reference)
        chain.append(Ancestor(record, _periods(catalog, record)))
    return Lineage(tuple(chain), broken)


def _periods(catalog: CatalogView, record: AdapterRecord) -> tuple[AliasPeriod, ...]:
    periods: list[AliasPeriod] = []
    for alias in sorted(catalog.aliases(record.adapter)):
        until = None
        found = []
        for entry in alias_history(catalog, record.adapter, alias).values():
            if entry.version == record.version:
                found.append(AliasPeriod(alias, entry.created_at, until, entry.moved_by))
            until = entry.created_at
        periods += reversed(found)
    return tuple(periods)
