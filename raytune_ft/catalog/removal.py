"""Removing versions and restoring them: a note beside the record, which stays.

A removal, a promotion, a restoration and the sweep of files (`sweep.py`) may all happen at one moment. Each
first writes what it does and then looks for the others, so that of two at least one sees the other:

- remove writes its note, then looks at the aliases; where one means the version, the note is taken away.
- An alias's move writes its entry, then looks for a note; where there is one, it is taken away. So an alias
  means no removed version, unless a process dies between these two steps.
- A removal ends once: it is restored, or the sweep may take the files. Whoever notes first how it ends has
  decided it: both create the same object, under the sha256 of the removal's own note. So a version is
  restored only if no sweep takes its files, whoever dies at whatever moment. A restoration that dies between
  its two steps leaves the version removed, and the next one completes it.
"""

import hashlib
import uuid
from datetime import UTC, datetime
from typing import Literal

from pydantic import ValidationError

from raytune_ft.catalog.layout import blob_key, numbered, removed_prefix, settled_key
from raytune_ft.catalog.lookup import REASON_CHARACTERS, CatalogView, Removal
from raytune_ft.catalog.record import AdapterRecord, Entry, UtcTime
from raytune_ft.catalog.who import who
from raytune_ft.errors import CatalogError
from raytune_ft.spec.values import NAME, VERSION
from raytune_ft.storage import join_uri

End = Literal["restored", "swept"]


class Settlement(Entry):
    """How a removal ended."""

    schema_version: Literal[1] = 1
    end: End
    settled_at: UtcTime
    settled_by: str


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
    key = numbered(removed_prefix(adapter), version)
    note = removal.model_dump_json(indent=1).encode() + b"\n"
    if not catalog.storage.write_once(key, note) and catalog.read_small(key) != note:
        raise CatalogError(
            f"{catalog.uri}: {adapter}@v{version} was removed by somebody else at the same moment"
        )
    try:
        _check_no_alias(catalog, adapter, version)
    except CatalogError:
        _take_back(catalog, adapter, version, note)
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
    note = catalog.read_removal_note(adapter, version)
    if note is None:
        raise CatalogError(f"{catalog.uri}: {record.reference} is not removed; there is nothing to restore")
    for entry in record.files:
        if catalog.storage.info(blob_key(entry.sha256)) is None:
            raise CatalogError(
                f"{catalog.uri}: {record.reference} cannot be restored: {entry.name} is gone; "
                "publish it again"
            )
    _take_back(catalog, adapter, version, note)
    return record


def restore_promoted(catalog: CatalogView, adapter: str, version: int) -> None:
    """Take a removal back that came while an alias was moved to the version: the promotion wins.

    Raises:
        CatalogError: files of the version may be gone.
    """
    note = catalog.read_removal_note(adapter, version)
    if note is not None:
        _take_back(catalog, adapter, version, note)


def settle(catalog: CatalogView, adapter: str, note: bytes, end: End) -> bool:
    """Let a removal end so, unless it has ended already.

    Args:
        catalog: whose.
        adapter: its name.
        note: the removal's own note, as it is kept.
        end: how.

    Returns:
        Whether this is how it ended, now or before.

    Raises:
        CatalogError: how it ended cannot be read.
        StorageError: the store failed.
    """
    settled = Settlement(
        end=end, settled_at=datetime.now(UTC).isoformat(timespec="milliseconds"), settled_by=who()
    )
    content = settled.model_dump_json(indent=1).encode() + b"\n"
    return catalog.storage.write_once(_key(adapter, note), content) or _end(catalog, adapter, note) == end


def is_swept(catalog: CatalogView, record: AdapterRecord) -> bool:
    """Whether a version is removed and its files may be gone, so that it is never restored.

    Raises:
        CatalogError: how its removal ended cannot be read.
        StorageError: the store failed.
    """
    note = catalog.read_removal_note(record.adapter, record.version)
    return note is not None and _end(catalog, record.adapter, note) == "swept"


def _end(catalog: CatalogView, adapter: str, note: bytes) -> End | None:
    """How a removal has ended; None where it has not."""
    key = _key(adapter, note)
    content = catalog.read_small(key)
    try:
        return None if content is None else Settlement.model_validate_json(content).end
    except ValidationError:
        place = join_uri(catalog.uri, key)
        raise CatalogError(f"{place}: not a removal's end; the object was altered or damaged") from None


def _key(adapter: str, note: bytes) -> str:
    return settled_key(adapter, hashlib.sha256(note).hexdigest())


def _take_back(catalog: CatalogView, adapter: str, version: int, note: bytes) -> None:
    """Restore what a note has removed. Another note that came since stays."""
    if not settle(catalog, adapter, note, "restored"):
        raise CatalogError(
            f"{catalog.uri}: {adapter}@v{version} cannot be restored: catalog gc has taken its files; "
            "publish it again"
        )
    if catalog.read_removal_note(adapter, version) == note:
        catalog.storage.delete(numbered(removed_prefix(adapter), version))


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
