"""Removing versions and restoring them: a note beside the record, which stays.

A removal, a promotion, a restoration and the sweep of files (`sweep.py`) may all happen at one moment. Each
first writes what it does and then looks for the others, so that of two at least one sees the other:

- remove writes its note, then looks at the aliases; where one means the version, the note is taken away.
- An alias's move writes its entry, then looks for a note; where there is one, it is taken away. So an alias
  means no removed version, unless a process dies between these two steps.
- The sweep notes that files of a version may be gone, then looks whether the version is still removed; only
  then files are deleted.
- restore takes the note away, then looks for the sweep's; where there is one, the version is removed again.
"""

import uuid
from datetime import UTC, datetime

from raytune_ft.catalog.layout import blob_key, numbered, removed_prefix, swept_prefix
from raytune_ft.catalog.lookup import REASON_CHARACTERS, CatalogView, Removal
from raytune_ft.catalog.record import AdapterRecord
from raytune_ft.catalog.who import who
from raytune_ft.errors import CatalogError
from raytune_ft.spec.job import NAME, VERSION


def remove_version(catalog: CatalogView, reference: str, reason: str = "") -> Removal:
    """Remove a version: no name means it any more, and a sweep may take its files. Its record stays.

    Args:
        catalog: whose version.
        reference: `name@v3`; neither a bare name nor an alias, whose meaning changes.
        reason: one line for those who look for the version later.

    Raises:
        CatalogError: no such version, it is removed already, or an alias means it.
        StorageError: the store failed.
    """
    adapter, version = _explicit(reference)
    if len(reason) > REASON_CHARACTERS or not reason.isprintable():
        raise CatalogError(
            f"reason {reason!r:.100}: must be one printable line of at most {REASON_CHARACTERS} characters"
        )
    catalog.read_living(adapter, version)
    _check_no_alias(catalog, adapter, version)
    removal = Removal(
        adapter=adapter,
        version=version,
        removed_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        removed_by=who(),
        reason=reason,
        token=uuid.uuid4().hex,
    )
    if not _write(catalog, removal) and catalog.read_removal(adapter, version) != removal:
        raise CatalogError(
            f"{catalog.uri}: {adapter}@v{version} was removed by somebody else at the same moment"
        )
    try:
        _check_no_alias(catalog, adapter, version)
    except CatalogError:
        catalog.storage.delete(numbered(removed_prefix(adapter), version))
        raise
    return removal


def restore_version(catalog: CatalogView, reference: str) -> AdapterRecord:
    """Take a removal back, unless files of the version may be gone.

    Args:
        catalog: whose version.
        reference: `name@v3`.

    Raises:
        CatalogError: no such version, it is not removed, or its files are gone.
        StorageError: the store failed.
    """
    adapter, version = _explicit(reference)
    record = catalog.read(adapter, version)
    if catalog.storage.info(numbered(removed_prefix(adapter), version)) is None:
        raise CatalogError(f"{catalog.uri}: {record.reference} is not removed; there is nothing to restore")
    for entry in record.files:
        if catalog.storage.info(blob_key(entry.sha256)) is None:
            raise CatalogError(
                f"{catalog.uri}: {record.reference} cannot be restored: {entry.name} is gone; "
                "publish it again"
            )
    _restore(catalog, adapter, version)
    return record


def restore_promoted(catalog: CatalogView, adapter: str, version: int) -> None:
    """Take a removal back that came while an alias was moved to the version: the promotion wins.

    Raises:
        CatalogError: files of the version may be gone.
    """
    if catalog.storage.info(numbered(removed_prefix(adapter), version)) is not None:
        _restore(catalog, adapter, version)


def _restore(catalog: CatalogView, adapter: str, version: int) -> None:
    key = numbered(removed_prefix(adapter), version)
    note = catalog.storage.read_or_none(key)
    swept = numbered(swept_prefix(adapter), version)
    if catalog.storage.info(swept) is None:
        catalog.storage.delete(key)
        if catalog.storage.info(swept) is None:
            return
        if note is not None:
            catalog.storage.write_once(key, note)
    raise CatalogError(
        f"{catalog.uri}: {adapter}@v{version} cannot be restored: catalog gc has taken its files; "
        "publish it again"
    )


def _explicit(reference: str) -> tuple[str, int]:
    adapter, _, selector = reference.partition("@")
    number = VERSION.fullmatch(selector)
    if not NAME.fullmatch(adapter) or not number or len(selector) > 63:
        raise CatalogError(f"{reference!r:.200}: not a version by its number; write NAME@v3")
    return adapter, int(number[1])


def _check_no_alias(catalog: CatalogView, adapter: str, version: int) -> None:
    meaning = [alias for alias, at in catalog.aliases(adapter).items() if at == version]
    if meaning:
        raise CatalogError(
            f"{catalog.uri}: {adapter}@v{version} is what {', '.join(meaning)} means; it was not removed; "
            "move the alias first, with catalog promote"
        )


def _write(catalog: CatalogView, removal: Removal) -> bool:
    key = numbered(removed_prefix(removal.adapter), removal.version)
    return catalog.storage.write_once(key, removal.model_dump_json(indent=1).encode() + b"\n")
