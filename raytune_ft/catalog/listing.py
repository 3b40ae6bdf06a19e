"""The adapters of a catalog with their aliases, filtered; a damaged one stops no other."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from raytune_ft.catalog.lookup import CatalogView
from raytune_ft.catalog.record import AdapterRecord
from raytune_ft.errors import CatalogError

_READERS = 8


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


def list_catalog(catalog: CatalogView, only: Filter = Filter()) -> Listing:
    """One version of each adapter that passes a filter: the newest, or the one that an alias means.

    Raises:
        StorageError: the store failed.
    """
    newest = {
        name: version
        for name, version in catalog.newest_versions().items()
        if fnmatchcase(name, only.adapter)
    }

    def read(name: str) -> tuple[AdapterRecord, dict[str, int]] | str | None:
        try:
            aliases = catalog.aliases(name)
            version = newest[name] if only.alias is None else aliases.get(only.alias)
            record = None if version is None else catalog.read(name, version)
        except CatalogError as error:
            return str(error)
        return (record, aliases) if record is not None and only.fits(record) else None

    with ThreadPoolExecutor(_READERS) as readers:
        found = list(readers.map(read, newest))
    return Listing(
        rows=tuple(row for row in found if isinstance(row, tuple)),
        damaged=tuple(message for message in found if isinstance(message, str)),
    )
