"""Objects divided into windows: from their size, from a footer, or by one scan that is kept."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as cached
from itertools import accumulate
from typing import BinaryIO, cast

from pydantic import TypeAdapter, ValidationError

from raytune_ft.data import columnar, documents, text
from raytune_ft.data.access import ObjectFile, open_object, read_blocks, unchanged
from raytune_ft.data.borders import Range, csv_ranges, json_structure
from raytune_ft.data.documents import WHOLE_LIMIT_BYTES
from raytune_ft.data.formats import ARROW_FILE, GZIP, HEAD_BYTES, find_format, is_blank
from raytune_ft.data.sources import DataObject
from raytune_ft.data.windows import WINDOW_BYTES, Unit, Window, byte_ranges, group
from raytune_ft.errors import DataError, StorageDenied, StorageFull
from raytune_ft.storage import Storage

SCAN_BYTES = 16 << 20
"""Up to this a csv file or JSON document is one window, which is cheaper than to look for records in it."""
_SCANNED_BYTES = 4 << 20
"""Looked at at once."""
_SCHEMA = 1
"""Version of what is kept of a scan; counted up when windows are divided otherwise."""


@dataclass(frozen=True)
class Division:
    """How an object is divided. What is kept of a scan."""

    unit: Unit
    format: str
    ranges: tuple[Range, ...]
    shared: str | None = None
    """A csv file's header, the JSON of the definition of a Natural Instructions task, or how many bytes the
    schema of an Arrow stream has."""


def divide(found: DataObject, object_index: int, format: str, cache: Storage | None) -> tuple[Window, ...]:
    """The windows of an object. At least one, also of an empty object.

    Args:
        found: the object.
        object_index: its place among those of the job.
        format: what to read it as, or `auto`.
        cache: where the outcome of a scan is kept, under `index/`; nowhere where None.

    Raises:
        DataError: its format is unknown, it is damaged or not what was listed, or too large for what cannot
            be divided.
        StorageError: the store failed.
    """
    with unchanged(found):
        division, sizes = _divide(found, format, cache)
    return tuple(
        Window(
            object=object_index,
            source=found.source,
            part=part,
            unit=division.unit,
            start=start,
            stop=stop,
            size_bytes=size_bytes,
            format=division.format,
            context=_context(division, before),
        )
        for part, ((start, stop, before), size_bytes) in enumerate(zip(division.ranges, sizes, strict=True))
    )


def _divide(found: DataObject, format: str, cache: Storage | None) -> tuple[Division, Sequence[int]]:
    """How an object is divided, and the bytes of each window."""
    if found.size_bytes <= 1.5 * WINDOW_BYTES:
        return _whole(found, format, "")
    with open_object(found, 0, HEAD_BYTES) as stream:
        head = stream.read()
    if head.startswith(GZIP):
        return _whole(found, format, "gzip cannot be divided")
    if is_blank(head):
        return _whole(found, format, "")
    if format == "auto":
        format = find_format(head, found.uri)
    if format == "parquet":
        return _row_groups(found)
    if format == "arrow":
        if head.startswith(ARROW_FILE):
            return _batches(found)
        # Smaller ones are read as a whole, as they always were.
        held_bytes = WHOLE_LIMIT_BYTES
    else:
        held_bytes = SCAN_BYTES
    if format == "jsonl":
        division = _lines(found)
    elif found.size_bytes <= held_bytes:
        return _whole(found, format, "")
    else:
        division = _scanned(found, format, head, cache)
    return division, [stop - start for start, stop, _ in division.ranges]


def _context(division: Division, before: int) -> str:
    if division.unit == "bytes" and division.format in ("json", "natural-instructions"):
        return documents.part_context(before, division.shared)
    if division.unit == "bytes" and division.format == "arrow":
        return f"{division.shared} {before}"
    return division.shared or ""


def _whole(found: DataObject, format: str, why: str) -> tuple[Division, Sequence[int]]:
    _check_size(found, found.size_bytes, why)
    return Division("object", format, ((0, found.size_bytes, 0),)), [found.size_bytes]


def _check_size(found: DataObject, size_bytes: int, why: str) -> None:
    if size_bytes > WHOLE_LIMIT_BYTES:
        raise DataError(
            f"{found.uri}: {why}, so {size_bytes:,} bytes would be held in memory at once, and the limit is "
            f"{WHOLE_LIMIT_BYTES:,}; write it as jsonl without gzip, as parquet in small row groups, or in "
            "several files"
        )


def _lines(found: DataObject) -> Division:
    ranges = byte_ranges(found.size_bytes, WINDOW_BYTES)
    return Division("bytes", "jsonl", tuple((start, stop, 0) for start, stop in ranges))


def _row_groups(found: DataObject) -> tuple[Division, Sequence[int]]:
    sizes = columnar.parquet_group_sizes(ObjectFile(found), found.size_bytes, found.uri)
    for number, size_bytes in enumerate(sizes):
        _check_size(found, size_bytes, f"row group {number} cannot be divided")
    return _grouped("row_groups", "parquet", sizes)


def _batches(found: DataObject) -> tuple[Division, Sequence[int]]:
    count = columnar.arrow_batch_count(ObjectFile(found), found.uri)
    # The footer's sizes cannot be had; writers make batches of about one size.
    sizes = [found.size_bytes // count] * count if count else []
    for size_bytes in sizes[:1]:
        _check_size(found, size_bytes, "a record batch cannot be divided")
    return _grouped("batches", "arrow", sizes)


def _grouped(unit: Unit, format: str, sizes: Sequence[int]) -> tuple[Division, Sequence[int]]:
    groups = group(sizes, WINDOW_BYTES) or ((0, 0),)
    division = Division(unit, format, tuple((start, stop, 0) for start, stop in groups))
    return division, [sum(sizes[start:stop]) for start, stop in groups]


def _scanned(found: DataObject, format: str, head: bytes, cache: Storage | None) -> Division:
    """How a csv file or a JSON document is divided, by what is kept of an earlier scan or by a new one."""
    key = _key(found, format)
    kept = None if cache is None else _read(cache, key, found.size_bytes)
    division = kept or _scan(found, format, head)
    if cache is not None and kept is None:
        with suppress(StorageDenied, StorageFull):  # The next run scans again.
            cache.write(key, _encode(division))
    if division.unit == "object":
        why = "its batches share dictionaries" if format == "arrow" else f"its {format} is no list of records"
        _check_size(found, found.size_bytes, why)
    if division.format not in ("jsonl", "csv"):
        what = "a record batch" if format == "arrow" else "one of its records"
        largest_bytes = max(stop - start for start, stop, _ in division.ranges)
        _check_size(found, largest_bytes, f"{what} cannot be divided")
    return division


def _scan(found: DataObject, format: str, head: bytes) -> Division:
    whole = Division("object", format, ((0, found.size_bytes, 0),))
    if format == "csv":
        header = text.read_header(read_blocks(found, 0, found.size_bytes), found.uri)
        if header is None:
            return whole
        blocks = read_blocks(found, header.end, found.size_bytes, _SCANNED_BYTES)
        (_, stop, _), *others = csv_ranges(blocks, header.end, header.delimiter, WINDOW_BYTES)
        return Division("bytes", "csv", ((0, stop, 0), *others), header.line)
    if format == "arrow":
        return _stream(found) or whole
    structure = json_structure(read_blocks(found, 0, found.size_bytes, _SCANNED_BYTES), WINDOW_BYTES)
    # Of a text that is no document and too large for a closer look, lines are what it may be.
    unclear = structure.kind in ("incomplete", "object of many") and found.size_bytes > WHOLE_LIMIT_BYTES
    later_lines = head.split(b"\n")[1 : documents.SAMPLED_LINES]
    if format == "json" and (
        structure.kind == "several values"
        or (unclear and any(documents.is_json(line, of=dict) for line in later_lines))
    ):
        return _lines(found)
    file = cast(BinaryIO, ObjectFile(found))
    parts = documents.document_ranges(structure, file, only_tasks=format == "natural-instructions")
    return whole if parts is None else Division("bytes", format, *parts)


def _stream(found: DataObject) -> Division | None:
    """How an Arrow stream is divided; None where it cannot be."""
    parts = columnar.stream_batches(ObjectFile(found), found.uri)
    if parts is None:
        return None
    schema_bytes, batches = parts
    starts = list(accumulate((size_bytes for size_bytes, _ in batches), initial=schema_bytes))
    rows = list(accumulate((rows for _, rows in batches), initial=0))
    groups = group([size_bytes for size_bytes, _ in batches], WINDOW_BYTES) or ((0, 0),)
    ranges = tuple((starts[start], starts[stop], rows[start]) for start, stop in groups)
    return Division("bytes", "arrow", ranges, str(schema_bytes))


def _key(found: DataObject, format: str) -> str:
    facts = [_SCHEMA, found.uri, found.size_bytes, found.etag, format, WINDOW_BYTES]
    return f"index/{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json"


def _read(cache: Storage, key: str, size_bytes: int) -> Division | None:
    """What is kept of a scan; None where that is nothing, or damaged."""
    try:
        digest, _, content = (cache.read_or_none(key) or b"").partition(b"\n")
    except StorageDenied:
        # A store that may not be listed answers so for what is not there.
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    try:
        division = _divisions().validate_json(content, strict=True)
    except ValidationError:
        return None
    borders = [border for start, stop, _ in division.ranges for border in (start, stop)]
    is_whole = bool(borders) and borders == sorted(borders) and 0 <= borders[0] <= borders[-1] <= size_bytes
    return division if is_whole else None


def _encode(division: Division) -> bytes:
    """A digest of what follows, and the division as JSON."""
    content = _divisions().dump_json(division)
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


@cached
def _divisions() -> TypeAdapter[Division]:
    return TypeAdapter(Division)
