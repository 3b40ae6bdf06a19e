"""Where things stand in a catalog.

    blobs/<sha256>                                         content, immutable
    adapters/<name>/versions/<number>.json                 record of a version, written last, once
    adapters/<name>/aliases/<alias>/<number>.json          one entry for each move of an alias
    adapters/<name>/removed/<number>.json                  that a version is removed; its record stays
    adapters/<name>/settled/<sha256>.json                  how a removal ended: restored, or its files may go
    publishes/<publish id>.json                            that a publish has begun; a retry finds its own
    derived/<what>.gz                                      copies of small objects, to list with few requests
    cache/tokens/<sha256>.arrow                            tokenised data; made again where it is not there

A number counts down from 9,999,999,999, so that the newest sorts first and one short listing finds it. What
no record names is not part of the catalog: blobs and begun publishes may be left by a crash.
"""

import re
from collections.abc import Iterable, Iterator

from raytune_ft.storage import ObjectInfo

ADAPTERS = "adapters/"
BLOBS = "blobs/"
CACHE = "cache/"
PUBLISHES = "publishes/"
NEWEST_SNAPSHOT = "derived/newest.gz"
"""Copies of what `list_catalog` reads; see snapshot.py."""
VERSIONS_SNAPSHOT = "derived/versions.gz"
"""Copies of what `list_versions` reads."""
_LAST = 9_999_999_999
_NUMBERED = re.compile(r"(?P<folder>.*/)(?P<number>[0-9]{10})\.json", re.DOTALL)


def blob_key(sha256: str) -> str:
    """Key of a file's content."""
    return f"{BLOBS}{sha256}"


def publish_key(publish_id: str) -> str:
    """Key of the note that a publish has begun."""
    return f"{PUBLISHES}{publish_id}.json"


def versions_prefix(adapter: str) -> str:
    """Beginning of the keys of an adapter's records."""
    return f"{ADAPTERS}{adapter}/versions/"


def aliases_prefix(adapter: str) -> str:
    """Beginning of the keys of all entries of an adapter's aliases."""
    return f"{ADAPTERS}{adapter}/aliases/"


def alias_prefix(adapter: str, alias: str) -> str:
    """Beginning of the keys of one alias's entries."""
    return f"{aliases_prefix(adapter)}{alias}/"


def removed_prefix(adapter: str) -> str:
    """Beginning of the keys of the notes that an adapter's versions are removed."""
    return f"{ADAPTERS}{adapter}/removed/"


def settled_key(adapter: str, sha256: str) -> str:
    """Key of the note how a removal ended, by the sha256 of the removal's own note."""
    return f"{ADAPTERS}{adapter}/settled/{sha256}.json"


def numbered(prefix: str, number: int) -> str:
    """Key of a version or of an alias's entry.

    >>> numbered("adapters/sum/versions/", 3)
    'adapters/sum/versions/9999999996.json'
    """
    return f"{prefix}{_LAST - number:010d}.json"


def numbers(objects: Iterable[ObjectInfo]) -> Iterator[tuple[str, int]]:
    """Prefix and number of each object that has one, in the order given; others are not the catalog's.

    >>> list(numbers([ObjectInfo(f"a/{name}", 1, "", 0.0) for name in ("9999999996.json", "notes")]))
    [('a/', 3)]
    """
    for found in objects:
        match = _NUMBERED.fullmatch(found.key)
        if match and int(match["number"]) < _LAST:
            yield match["folder"], _LAST - int(match["number"])
