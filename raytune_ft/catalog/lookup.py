"""Reading a catalog: which versions there are, what a reference means, and fetching the files."""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, ValidationError

from raytune_ft.catalog.folders import new_folder
from raytune_ft.catalog.layout import (
    ADAPTERS,
    BLOBS,
    CACHE,
    PUBLISHES,
    alias_prefix,
    aliases_prefix,
    blob_key,
    numbered,
    numbers,
    removed_prefix,
    versions_prefix,
)
from raytune_ft.catalog.listed import by_adapter
from raytune_ft.catalog.record import MAX_RECORD_BYTES, AdapterRecord, Entry, FileEntry, UtcTime, parse_record
from raytune_ft.catalog.signing import Trust
from raytune_ft.catalog.who import WHO_CHARACTERS
from raytune_ft.errors import CatalogError, StorageMissing
from raytune_ft.spec.values import NAME, VERSION, Name
from raytune_ft.storage import Storage, disk_errors, join_uri

REASON_CHARACTERS = 500
_NAMED_AT_MOST = 10


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


_Who = Annotated[str, AfterValidator(_check_printable), Field(max_length=WHO_CHARACTERS)]


class AliasEntry(Entry):
    """One move of an alias."""

    schema_version: Literal[1] = 1
    version: PositiveInt
    previous: PositiveInt | None
    created_at: UtcTime
    token: str
    """Tells a lost answer to this very write from somebody else's move."""
    moved_by: _Who = ""
    """User and machine, as far as they are known; one line that no terminal obeys."""
    restores: PositiveInt | None = None
    """Number of the earlier move whose state a rollback restores; None for all other moves."""
    highest: PositiveInt | None = None
    """Highest version that the alias has meant, up to this move; None where it was not written down."""


class Removal(Entry):
    """Note that a version is removed: its record stays, and means nothing any more."""

    schema_version: Literal[1] = 1
    adapter: Name
    version: PositiveInt
    removed_at: UtcTime
    removed_by: _Who
    reason: Annotated[str, AfterValidator(_check_printable), Field(max_length=REASON_CHARACTERS)]
    """Empty where none was given."""
    token: str
    """Tells a lost answer to this very write from somebody else's removal."""

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"{self.adapter}@v{self.version} was removed by {self.removed_by} at {self.removed_at}{why}"


@dataclass(frozen=True)
class CatalogView:
    """A catalog that is only read: everything here works with the right to list and read alone."""

    storage: Storage

    @property
    def uri(self) -> str:
        """Where the catalog is."""
        return self.storage.uri

    def resolve(self, reference: str) -> AdapterRecord:
        """The record that `name`, `name@v3` or `name@alias` means; a bare name: the newest one left.

        Raises:
            CatalogError: there is no such adapter, version or alias, it is removed, or the record is damaged.
            StorageError: the store cannot be read.
        """
        adapter, selector, number = split_reference(reference)
        if number is not None:
            version = number
        elif selector:
            _, entry = self.newest_alias_entry(adapter, selector)
            version = entry.version if entry else 0
        else:
            version = self.newest_living(adapter)
            if version:
                return self.read(adapter, version)
            version = self.newest_version(adapter)
        if not version:
            raise CatalogError(self._not_found(adapter, selector))
        return self.read_living(adapter, version)

    def read_living(self, adapter: str, version: int) -> AdapterRecord:
        """The record of a version by its number, if it is not removed.

        Raises:
            CatalogError: it is not there, removed, or damaged.
        """
        record = self.find_living(adapter, version)
        if record is None:
            raise CatalogError(self._not_found(adapter, f"v{version}"))
        return record

    def find_living(self, adapter: str, version: int) -> AdapterRecord | None:
        """Like `read_living`, and None where there is no such version: it lists nothing for a message."""
        content = self.read_record(adapter, version)
        if content is None:
            return None
        record = self._parse(content, adapter, version)
        self.check_living(record)
        return record

    def check_living(self, record: AdapterRecord) -> None:
        """Refuse a version that is removed.

        Raises:
            CatalogError: it is, or the note of it is damaged.
        """
        removal = self.read_removal(record.adapter, record.version)
        if removal is not None:
            raise CatalogError(
                f"{self.uri}: {removal}; restore it with: raytune-ft catalog restore {record.reference}"
            )

    def check_there(self) -> None:
        """Refuse a place where nothing of a catalog is, as a wrong name and a disk that is not mounted are.

        Raises:
            CatalogError: there is no adapter, content, note of a publish or tokenised data.
            StorageError: the store cannot be read.
        """
        kinds = (ADAPTERS, BLOBS, PUBLISHES, CACHE)
        if not any(next(self.storage.list(prefix, 1), None) for prefix in kinds):
            raise CatalogError(f"{self.uri}: holds no adapter; check the name")

    def read(self, adapter: str, version: int) -> AdapterRecord:
        """The record of a version by its number, of a removed one too.

        Raises:
            CatalogError: it is not there, or damaged.
        """
        content = self.read_record(adapter, version)
        if content is None:
            raise CatalogError(self._not_found(adapter, f"v{version}"))
        return self._parse(content, adapter, version)

    def newest_versions(self) -> dict[str, int]:
        """The newest version of each adapter that is not removed, by name, from one listing."""
        adapters, _ = by_adapter(self.storage.list(ADAPTERS))
        return {name: next(iter(of.living)) for name, of in adapters.items() if of.living}

    def versions(self, adapter: str) -> Sequence[int]:
        """All versions of an adapter, removed ones too, ascending; none where there is no such adapter."""
        return sorted(self._numbers(versions_prefix(adapter)))

    def removed_versions(self, adapter: str) -> set[int]:
        """The versions of an adapter that are removed."""
        return set(self._numbers(removed_prefix(adapter)))

    def moves(self, adapter: str) -> Mapping[str, Sequence[int]]:
        """Numbers of all moves of each alias of an adapter, descending, from one listing."""
        adapters, _ = by_adapter(self.storage.list(aliases_prefix(adapter)))
        return {alias: list(of) for found in adapters.values() for alias, of in found.moves.items()}

    def aliases(self, adapter: str) -> dict[str, int]:
        """Version that each alias of an adapter means now."""
        return {
            alias: self.read_alias_entry(adapter, alias, moves[0]).version
            for alias, moves in self.moves(adapter).items()
        }

    def has_contents(self, record: AdapterRecord) -> bool:
        """Whether all contents of a version are there, as far as their sizes tell."""
        found = ((entry, self.storage.info(blob_key(entry.sha256))) for entry in record.files)
        return all(info is not None and info.size_bytes == entry.size_bytes for entry, info in found)

    def pull(self, reference: str, to: Path, *, trust: Trust = Trust()) -> AdapterRecord:
        """Fetch the files of a version into a new folder, which appears complete or not at all.

        Raises:
            CatalogError: no such version, its signature is refused, `to` is a link or there and not empty, or
                a file is not what was published.
            StorageFull: no space is left.
            StorageError: the store or the disk failed.
        """
        record = self.resolve(reference)
        trust.check(record)
        with new_folder(to) as folder:
            for entry in record.files:
                self.fetch(record, entry, folder / entry.name)
        return record

    def newest_version(self, adapter: str) -> int:
        """Highest version of an adapter, removed or not; 0 where there is none."""
        return self._newest(versions_prefix(adapter))

    def newest_living(self, adapter: str) -> int:
        """Highest version of an adapter that is not removed; 0 where there is none."""
        newest = self.newest_version(adapter)
        # Two listings of one key each tell all, unless the newest itself is removed.
        if newest > self._newest(removed_prefix(adapter)):
            return newest
        return max(set(self.versions(adapter)) - self.removed_versions(adapter), default=0)

    def read_removal(self, adapter: str, version: int) -> Removal | None:
        """Who removed a version, when and why; None where nobody did.

        Raises:
            CatalogError: the note is damaged.
        """
        content = self.read_removal_note(adapter, version)
        return None if content is None else self.parse_removal(content, adapter, version)

    def read_removal_note(self, adapter: str, version: int) -> bytes | None:
        """The note that a version is removed as it is kept, or None where it is not."""
        return self.read_small(numbered(removed_prefix(adapter), version))

    def parse_removal(self, content: bytes, adapter: str, version: int) -> Removal:
        """What the note says that was found for a version.

        Raises:
            CatalogError: it is damaged.
        """
        place = join_uri(self.uri, numbered(removed_prefix(adapter), version))
        try:
            removal = Removal.model_validate_json(content)
        except ValidationError:
            raise CatalogError(f"{place}: not a removal's note; the object was altered or damaged") from None
        if (removal.adapter, removal.version) != (adapter, version):
            raise CatalogError(f"{place}: is the note of {removal.adapter}@v{removal.version}; it was moved")
        return removal

    def newest_alias_entry(self, adapter: str, alias: str) -> tuple[int, AliasEntry | None]:
        """Number and content of an alias's last move; (0, None) where there was none."""
        prefix = alias_prefix(adapter, alias)
        number = self._newest(prefix)
        if not number:
            return 0, None
        return number, self.read_alias_entry(adapter, alias, number)

    def alias_moves(self, adapter: str, alias: str) -> Sequence[int]:
        """Numbers of all moves of an alias, descending; none where there is no such alias."""
        return list(self._numbers(alias_prefix(adapter, alias)))

    def read_alias_entry(self, adapter: str, alias: str, number: int) -> AliasEntry:
        """One move of an alias.

        Raises:
            CatalogError: it is not there, or damaged.
        """
        key = numbered(alias_prefix(adapter, alias), number)
        try:
            return AliasEntry.model_validate_json(self.read_small(key) or b"")
        except ValidationError:
            place = join_uri(self.uri, key)
            raise CatalogError(f"{place}: not an alias's entry; the object was altered or damaged") from None

    def read_record(self, adapter: str, version: int) -> bytes | None:
        """A version's record as it is kept, or None where there is no such version."""
        return self.read_small(numbered(versions_prefix(adapter), version))

    def read_small(self, key: str) -> bytes | None:
        """A note or record of the catalog, or None where there is none; not trusted to be of any size.

        Raises:
            CatalogError: it is too large to be one.
        """
        try:
            with self.storage.open(key) as stream:
                content = stream.read(MAX_RECORD_BYTES + 1)
        except StorageMissing:
            return None
        if len(content) > MAX_RECORD_BYTES:
            place = join_uri(self.uri, key)
            raise CatalogError(f"{place}: above {MAX_RECORD_BYTES:,} bytes; the object is not the catalog's")
        return content

    def fetch(self, record: AdapterRecord, entry: FileEntry, path: Path) -> None:
        """Fetch one file of a version to a path where none is.

        Raises:
            CatalogError: the content is gone, or is not what was published.
            StorageError: the store or the disk failed.
        """
        key = blob_key(entry.sha256)
        place = f"{record.reference}: {entry.name} ({join_uri(self.uri, key)})"
        digest, size_bytes = hashlib.sha256(), 0
        try:
            source = self.storage.open(key)
        except StorageMissing as error:
            raise CatalogError(f"{place}: is gone; publish the adapter again") from error
        with source, disk_errors(str(path), entry.size_bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as target:
                while size_bytes <= entry.size_bytes and (chunk := source.read(1 << 20)):
                    digest.update(chunk)
                    size_bytes += len(chunk)
                    target.write(chunk)
        if (digest.hexdigest(), size_bytes) != (entry.sha256, entry.size_bytes):
            raise CatalogError(
                f"{place}: the content is not what was published (sha256 {digest.hexdigest()[:12]}…, "
                f"{size_bytes:,} bytes; the record says {entry.sha256[:12]}…, {entry.size_bytes:,}); "
                "it was altered or damaged; publish the adapter again"
            )

    def _parse(self, content: bytes, adapter: str, version: int) -> AdapterRecord:
        place = join_uri(self.uri, numbered(versions_prefix(adapter), version))
        return parse_record(content, adapter, version, place)

    def _newest(self, prefix: str) -> int:
        first = next(self.storage.list(prefix, 1), None)
        if first is None:
            return 0
        # One key is enough, unless something foreign lies before the others.
        for folder, number in numbers([first]):
            if folder == prefix:
                return number
        return next(self._numbers(prefix), 0)

    def _numbers(self, prefix: str) -> Iterator[int]:
        return (number for folder, number in numbers(self.storage.list(prefix)) if folder == prefix)

    def _not_found(self, adapter: str, selector: str) -> str:
        versions = self.versions(adapter)
        if not versions:
            names = list(self.newest_versions())
            close = difflib.get_close_matches(adapter, names, n=1, cutoff=0.5)
            there = f"did you mean {close[0]}?" if close else f"it holds {_some(names)}"
            return f"{self.uri}: no adapter {adapter}; {there}"
        if VERSION.fullmatch(selector):
            removed = self.removed_versions(adapter)
            there = _some(f"v{version}" for version in reversed(versions) if version not in removed)
            return f"{self.uri}: {adapter} has no version {selector}; it has {there}"
        return f"{self.uri}: {adapter} has no alias {selector}; it has {_some(self.aliases(adapter))}"


def split_reference(reference: str) -> tuple[str, str, int | None]:
    """Adapter of a reference, what follows its '@', and the number where that is a version's.

    Raises:
        CatalogError: it is no reference.
    """
    adapter, at, selector = reference.partition("@")
    if not NAME.fullmatch(adapter) or (at and not NAME.fullmatch(selector)):
        raise CatalogError(f"{reference!r:.200}: not a reference; write NAME, NAME@v3 or NAME@ALIAS")
    number = VERSION.fullmatch(selector)
    return adapter, selector, int(number[1]) if number else None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _NAMED_AT_MOST
    shown = ", ".join(names[:_NAMED_AT_MOST]) or "none"
    return f"{shown} and {rest} more" if rest > 0 else shown
