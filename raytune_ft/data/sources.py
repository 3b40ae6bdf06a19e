"""Which objects a job's sources name: files, folders and globs in a folder, in a bucket or on the Hub."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raytune_ft.data import hub
from raytune_ft.data.folders import Split, kind_of, must_choose, sort_out, splits
from raytune_ft.errors import DataError, StorageDenied
from raytune_ft.spec import DataSpec
from raytune_ft.storage import ObjectInfo, join_uri, open_storage, split_uri

_SHOWN_NAMES = 6
_LOOKED_AT = 20_000
"""Objects of a folder that is looked through for a split's name: it may be a home folder."""


@dataclass(frozen=True)
class DataObject:
    """One file of training data."""

    source: int
    """Index of its source in `data.sources`."""
    root: str
    """Storage that holds it, or the revision of a data set of the Hub; `raytune_ft.data.access` reads it."""
    key: str
    size_bytes: int
    etag: str

    @property
    def uri(self) -> str:
        """Where it is, for messages and records."""
        return join_uri(self.root, self.key)


@dataclass(frozen=True)
class SourceListing:
    """What one source names."""

    objects: tuple[DataObject, ...]
    """Sorted by key."""
    skipped: tuple[str, ...] = ()
    """Names in its folder that hold no records and were left out, relative to the folder; those of hidden
    folders end with '/' and stand for all below."""

    @property
    def commit(self) -> str | None:
        """The commit that is read of a data set of the Hub; None elsewhere."""
        root = self.objects[0].root
        return root.rpartition("@")[2] if hub.is_hub(root) else None


class _Place(Protocol):
    """What can be listed: a storage, or a revision of a data set of the Hub."""

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[ObjectInfo]: ...

    def info(self, key: str) -> ObjectInfo | None: ...


def list_objects(data: DataSpec) -> list[DataObject]:
    """The objects of all sources: sources in the job's order, objects of each sorted by key.

    Raises:
        DataError: a source names nothing, or a folder of several splits.
        StorageError: the store cannot be read.
    """
    return [found for listing in list_sources(data) for found in listing.objects]


def list_sources(data: DataSpec) -> list[SourceListing]:
    """What each source names, in the job's order. Raises what `list_objects` does."""
    listings = []
    for source, spec in enumerate(data.sources):
        try:
            listings.append(list_source(spec.uri, source))
        except DataError as error:
            raise DataError(f"data.sources[{source}].uri = {error}") from None
    return listings


def list_source(uri: str, source: int = 0) -> SourceListing:
    """What one source names.

    A folder gives every object below it but those that `raytune_ft.data.folders.sort_out` leaves out, and is
    refused where its files are those of several splits. A name that is no file and no folder, but that of a
    split of the folder above, gives the files of this split. In a glob `*`, `?` and `[...]` stay within a
    name and `**` crosses folders; a glob and the name of a file are taken as they are.

    Args:
        uri: of the source.
        source: its index in `data.sources`.

    Raises:
        DataError: it names nothing, or a folder of several splits.
        StorageError: the store cannot be read.
    """
    place, root, key = _open(uri)
    listed, skipped = _listed(place, key, uri)
    if not listed:
        raise DataError(f"{uri}: {_nothing(uri, skipped)}")
    objects = (DataObject(source, root, each.key, each.size_bytes, each.etag) for each in listed)
    return SourceListing(tuple(objects), skipped)


def listing_notices(data: DataSpec, listings: Sequence[SourceListing]) -> Iterator[str]:
    """What a person should know of the listings: the names that were left out, and the Hub's commit."""
    for at, (source, listing) in enumerate(zip(data.sources, listings, strict=True)):
        place = f"data.sources[{at}] ({source.uri})"
        if listing.skipped:
            yield (
                f"{place}: {len(listing.skipped)} left out that by their names hold no records: "
                f"{some_names(listing.skipped)}"
            )
        if listing.commit:
            yield f"{place}: read at commit {listing.commit}"


def fingerprint(objects: Sequence[DataObject]) -> str:
    """sha256 over uri, size and etag of each object: the same objects, unchanged, give the same."""
    digest = hashlib.sha256()
    for found in objects:
        digest.update(f"{found.uri}\0{found.size_bytes}\0{found.etag}\n".encode())
    return digest.hexdigest()


def _open(uri: str) -> tuple[_Place, str, str]:
    """What holds a source, its uri, and the source's key, folder or glob in it."""
    if hub.is_hub(uri):
        dataset, key = hub.split_hub_uri(uri)
        revision = hub.open_revision(dataset)
        return revision, revision.uri, key
    root, key = split_uri(uri)
    return open_storage(root), root, key


def _listed(place: _Place, key: str, uri: str) -> tuple[list[ObjectInfo], tuple[str, ...]]:
    # A name may hold a glob's characters; what is there under exactly that name is meant.
    exact = place.info(key) if key and not key.endswith("/") else None
    if exact is not None:
        return [exact], ()
    if re.search(r"[*?[]", key):
        pattern = glob_pattern(key)
        found = [each for each in place.list(re.split(r"[*?[]", key)[0]) if pattern.fullmatch(each.key)]
        return [each for each in found if not each.key.endswith("/")], ()
    folder = key.rstrip("/")
    listed, skipped, of_split = _below(place, folder)
    if must_choose(of_split):
        raise DataError(f"{uri}: {_several(uri, list(of_split))}")
    of_name = [] if listed or skipped else _of_split(place, folder)
    return of_name or listed, skipped


def _of_split(place: _Place, name: str) -> list[ObjectInfo]:
    """The files of a split in the folder above, where a name that is no file and no folder is that of one."""
    folder, _, split_name = name.rpartition("/")
    if kind_of(split_name) is None:
        return []
    try:
        listed, _, of_split = _below(place, folder, _LOOKED_AT)
    except StorageDenied:
        return []  # Nobody has named this folder.
    wanted = {key for split, keys in of_split.items() if split.name == split_name for key in keys}
    return [each for each in listed if each.key in wanted]


def _below(
    place: _Place, folder: str, limit: int | None = None
) -> tuple[list[ObjectInfo], tuple[str, ...], dict[Split, list[str]]]:
    """Of a folder the objects that may hold records, the names left out, and full keys by split.

    A folder of `limit` objects or more counts as empty.
    """
    prefix = f"{folder}/" if folder else ""
    objects = list(place.list(prefix, limit))
    if len(objects) == limit:
        objects = []
    listed = {each.key.removeprefix(prefix): each for each in objects if not each.key.endswith("/")}
    files = sort_out(listed)
    of_split = splits(files.data, listed)
    keys = {split: [f"{prefix}{each}" for each in found] for split, found in of_split.items()}
    return [listed[each] for each in files.data], files.skipped, keys


def _several(uri: str, found: Sequence[Split]) -> str:
    first = next((split for split in found if split.kind == "train"), found[0])
    return (
        f"holds the splits {some_names([split.name for split in found])}; name the one that is meant, as in "
        f"uri: {join_uri(uri, first.name)}, or take the files of several by a glob"
    )


def some_names(names: Sequence[str]) -> str:
    """The first names, and how many more there are.

    >>> some_names(["a", "b"]), some_names([str(number) for number in range(9)])
    ('a, b', '0, 1, 2, 3, 4, 5 and 3 more')
    """
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _nothing(uri: str, skipped: Sequence[str]) -> str:
    if skipped:
        return f"no data: by their names these hold no records: {some_names(skipped)}"
    return f"no such file, and no folder or glob with files{_hint(uri)}"


def _hint(uri: str) -> str:
    """For a relative folder that looks like an id of the Hub."""
    try:
        name = Path(uri).relative_to(Path.cwd()).as_posix()
    except ValueError:
        return ""
    if hub.DATASET_ID.fullmatch(name) and not Path(uri).parent.exists():
        return f"; for the data set of the Hub write uri: hf://{name}"
    return ""


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob over keys as a regular expression for `fullmatch`.

    >>> bool(glob_pattern("*/train-?.json").fullmatch("news/train-1.json"))
    True
    >>> bool(glob_pattern("*.json").fullmatch("news/train.json"))
    False
    >>> bool(glob_pattern("**/*.json").fullmatch("train.json"))
    True
    """
    rules = (
        (r"\*\*/", r"(?:.*/)?"),
        (r"\*\*", r".*"),
        (r"\*", r"[^/]*"),
        (r"\?", r"[^/]"),
        (r"\[!([^]/]+)\]", r"[^/\1]"),
        (r"\[([^]/]+)\]", r"[\1]"),
    )
    parts = []
    at = 0
    while at < len(glob):
        for rule, replacement in rules:
            match = re.compile(rule).match(glob, at)
            if match:
                parts.append(
                    match.expand(replacement.replace(r"\1", r"\g<1>")) if match.groups() else replacement
                )
                at = match.end()
                break
        else:
            parts.append(re.escape(glob[at]))
            at += 1
    return re.compile("".join(parts), re.DOTALL)
