"""Moving an alias, forward and back: each move is the next entry of a log, which one writer alone creates."""

import uuid
from datetime import UTC, datetime

from raytune_ft.catalog.layout import alias_prefix, numbered
from raytune_ft.catalog.lookup import AliasEntry, CatalogView
from raytune_ft.catalog.removal import restore_promoted
from raytune_ft.catalog.who import who
from raytune_ft.errors import CatalogError
from raytune_ft.spec.values import NAME, VERSION


def move_alias(
    catalog: CatalogView,
    adapter: str,
    alias: str,
    version: int,
    *,
    forward_only: bool = False,
    expect: int | None = None,
) -> AliasEntry:
    """Let an alias mean a version that is there, unless it does. See `Catalog.set_alias`."""
    check_alias(alias)
    catalog.resolve(f"{adapter}@v{version}")
    while True:
        number, current = catalog.newest_alias_entry(adapter, alias)
        if expect is not None and (current.version if current else 0) != expect:
            wanted = f"v{expect}" if expect else "nothing"
            raise CatalogError(
                f"{catalog.uri}: {adapter}@{alias} means {_meaning(current)}, not {wanted} as expected; "
                "it was not moved; look at it with catalog history, and promote again"
            )
        if current and current.version == version:
            return current
        # Not the present meaning alone: what somebody has taken back by hand, no retry brings again.
        if current and forward_only and _highest(catalog, adapter, alias, current) >= version:
            return current
        entry = _entry(version, current, restores=None)
        if _append(catalog, adapter, alias, number + 1, entry):
            restore_promoted(catalog, adapter, version)
            return entry


def roll_back(catalog: CatalogView, adapter: str, alias: str) -> AliasEntry:
    """Let an alias mean again what it meant before its last move.

    A rollback is undone by no other rollback: the entry that it writes names the older one whose state it
    restores, and the next goes on from there, further back. So v1, v2, v3 and two rollbacks end at v1.

    Raises:
        CatalogError: the alias has no earlier meaning, somebody moves it at the same moment, or the version
            that it meant is removed or damaged.
        StorageError: the store failed.
    """
    _check_names(adapter, alias)
    number, current = catalog.newest_alias_entry(adapter, alias)
    if current is None:
        catalog.resolve(f"{adapter}@{alias}")
        raise CatalogError(f"{catalog.uri}: {adapter}@{alias} appeared just now; run again")
    before = _origin(catalog, adapter, alias, number, current) - 1
    if not before:
        raise CatalogError(
            f"{catalog.uri}: {adapter}@{alias} means {_meaning(current)}, and meant nothing before; "
            "move it with catalog promote"
        )
    earlier = catalog.read_alias_entry(adapter, alias, before)
    restores = _origin(catalog, adapter, alias, before, earlier)
    catalog.resolve(f"{adapter}@v{earlier.version}")
    entry = _entry(earlier.version, current, restores=restores)
    if not _append(catalog, adapter, alias, number + 1, entry):
        raise CatalogError(
            f"{catalog.uri}: {adapter}@{alias} was moved by somebody else at the same moment; "
            "look at it with catalog history, and roll back again if that is still right"
        )
    restore_promoted(catalog, adapter, earlier.version)
    return entry


def alias_history(catalog: CatalogView, adapter: str, alias: str) -> dict[int, AliasEntry]:
    """All moves of an alias by number, the last one first.

    Raises:
        CatalogError: there is no such adapter or alias, or an entry is damaged.
        StorageError: the store failed.
    """
    _check_names(adapter, alias)
    moves = catalog.alias_moves(adapter, alias)
    if not moves:
        catalog.resolve(f"{adapter}@{alias}")
    return {number: catalog.read_alias_entry(adapter, alias, number) for number in moves}


def check_alias(alias: str) -> None:
    """Refuse an alias that could not be told from a version.

    Raises:
        CatalogError: the name is not plain, or has the form of a version.
    """
    if not NAME.fullmatch(alias) or VERSION.fullmatch(alias):
        raise CatalogError(
            f"alias {alias!r:.100}: must be 1 to 63 of a-z, 0-9 and '-', begin and end with a letter or "
            "digit, and not be a version such as v3"
        )


def _check_names(adapter: str, alias: str) -> None:
    if not NAME.fullmatch(adapter) or not NAME.fullmatch(alias):
        raise CatalogError(f"{f'{adapter}@{alias}'!r:.200}: not an adapter's alias; write NAME ALIAS")
    check_alias(alias)


def _origin(catalog: CatalogView, adapter: str, alias: str, number: int, entry: AliasEntry) -> int:
    """Number of the move that first made the state after this one: its own, but for a rollback."""
    if entry.restores is None:
        return number
    # Each names a move that is none itself, so one step suffices and no damaged log leads in a circle.
    if entry.restores >= number or catalog.read_alias_entry(adapter, alias, entry.restores).restores:
        raise CatalogError(
            f"{catalog.uri}: move {number} of {adapter}@{alias} restores move {entry.restores}, which cannot "
            "be; the log was altered or damaged; move the alias with catalog promote"
        )
    return entry.restores


def _highest(catalog: CatalogView, adapter: str, alias: str, newest: AliasEntry) -> int:
    """The highest version that an alias has meant, up to its newest move."""
    if newest.highest is not None:
        return newest.highest
    return max(entry.version for entry in alias_history(catalog, adapter, alias).values())


def _entry(version: int, current: AliasEntry | None, restores: int | None) -> AliasEntry:
    return AliasEntry(
        version=version,
        previous=current.version if current else None,
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        token=uuid.uuid4().hex,
        moved_by=who(),
        restores=restores,
        highest=_highest_with(version, current),
    )


def _highest_with(version: int, current: AliasEntry | None) -> int | None:
    if current is None:
        return version
    return None if current.highest is None else max(version, current.highest)


def _append(catalog: CatalogView, adapter: str, alias: str, number: int, entry: AliasEntry) -> bool:
    """Whether this very entry is the log's next one."""
    key = numbered(alias_prefix(adapter, alias), number)
    content = entry.model_dump_json().encode()
    return catalog.storage.write_once(key, content) or catalog.storage.read(key) == content


def _meaning(entry: AliasEntry | None) -> str:
    if entry is None:
        return "nothing"
    by = f" by {entry.moved_by}" if entry.moved_by else ""
    return f"v{entry.version} (moved{by} at {entry.created_at})"
