"""Which objects a job's sources name: files, folders and globs in a folder or bucket."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec
from raytune_ft.storage import ObjectInfo, join_uri, open_storage, split_uri


@dataclass(frozen=True)
class DataObject:
    """One file of training data."""

    source: int
    """Index of its source in `data.sources`."""
    root: str
    """Storage that holds it; `open_storage(root).open(key)` reads it."""
    key: str
    size_bytes: int
    etag: str

    @property
    def uri(self) -> str:
        """Where it is, for messages and records."""
        return join_uri(self.root, self.key)


def list_objects(data: DataSpec) -> list[DataObject]:
    """The objects of all sources: sources in the job's order, objects of each sorted by key.

    A folder gives every object below it but those whose name, or a folder's on the way, begins with '.' or
    '_' (`_SUCCESS`, `.cache`). In a glob `*`, `?` and `[...]` stay within a name and `**` crosses folders.

    Raises:
        DataError: a source names nothing.
        StorageError: the store cannot be read.
    """
    found = []
    for source, spec in enumerate(data.sources):
        objects = list(_objects_of(source, spec.uri))
        if not objects:
            raise DataError(
                f"data.sources[{source}].uri = {spec.uri}: no such file, and no folder or glob with files"
            )
        found += objects
    return found


def fingerprint(objects: Sequence[DataObject]) -> str:
    """sha256 over uri, size and etag of each object: the same objects, unchanged, give the same."""
    digest = hashlib.sha256()
    for found in objects:
        digest.update(f"{found.uri}\0{found.size_bytes}\0{found.etag}\n".encode())
    return digest.hexdigest()


def _objects_of(source: int, uri: str) -> Iterator[DataObject]:
    root, key = split_uri(uri)
    storage = open_storage(root)
    # A name may hold a glob's characters; what is there under exactly that name is meant.
    exact = storage.info(key) if key else None
    if exact is not None:
        listing: list[ObjectInfo] = [exact]
    elif re.search(r"[*?[]", key):
        pattern = glob_pattern(key)
        listing = [o for o in storage.list(re.split(r"[*?[]", key)[0]) if pattern.fullmatch(o.key)]
    else:
        folder = f"{key}/" if key else ""
        listing = [o for o in storage.list(folder) if not re.search(r"(^|/)[._]", o.key.removeprefix(folder))]
    for found in listing:
        if not found.key.endswith("/"):
            yield DataObject(source, root, found.key, found.size_bytes, found.etag)


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
