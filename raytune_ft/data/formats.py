"""From the bytes of a file to raw records: jsonl, json, Natural Instructions, csv, parquet, arrow, gzip.

The format is found by content, never by name: a `.json` file may hold JSON lines. One malformed record
never stops a file; a file that cannot be read as a whole does.
"""

import gzip
import io
import zlib
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from raytune_ft.data import columnar, documents, text
from raytune_ft.data.access import ObjectFile, open_object, read_blocks, unchanged
from raytune_ft.data.documents import SAMPLED_LINES, is_json
from raytune_ft.data.raw import BadRecord, RawRecord, printable
from raytune_ft.data.sources import DataObject
from raytune_ft.data.windows import Window
from raytune_ft.errors import DataError
from raytune_ft.spec import FieldsSpec

__all__ = [
    "HEAD_BYTES",
    "BadRecord",
    "RawRecord",
    "find_format",
    "named_columns",
    "printable",
    "read_records",
    "read_window",
]

HEAD_BYTES = 1 << 20
"""How much of a file is looked at to find its format."""
GZIP = b"\x1f\x8b"
ARROW_FILE, ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_KNOWN_FORMATS = "jsonl, json, csv, parquet or arrow"
_BLOCK_BYTES = 1 << 18
_OVERHANG_BYTES = 64 << 10
"""Read with a window of lines beyond its end, where its last line mostly ends."""


def read_window(
    found: DataObject, window: Window, columns: Collection[str] = ()
) -> Iterator[RawRecord | BadRecord]:
    """Records of one window of an object, in order.

    Args:
        found: the object.
        window: which part of it.
        columns: see `read_records`.

    Raises:
        DataError: the object cannot be read, or is not the one that was listed any more.
        StorageError: the store failed.
    """
    with unchanged(found):
        if window.unit == "object":
            with open_object(found) as stream:
                yield from read_records(stream, found.uri, window.format, columns)
        elif window.unit == "bytes":
            yield from _BYTE_READERS[window.format](found, window)
        elif window.unit == "row_groups":
            file = ObjectFile(found)
            yield from columnar.read_row_groups(file, found.uri, window.start, window.stop)
        else:
            yield from columnar.read_batches(ObjectFile(found), found.uri, window.start, window.stop)


def read_records(
    stream: BinaryIO, uri: str, format: str = "auto", columns: Collection[str] = ()
) -> Iterator[RawRecord | BadRecord]:
    """Records of one file, in order.

    Args:
        stream: its bytes, from the beginning; it is read once and need not be seekable.
        uri: where it is, for messages.
        format: what to read it as, or `auto`; see `SourceSpec.format`.
        columns: names that the job says records have, see `named_columns`: an object that has one of them is
            a record, and holds none by id.

    Raises:
        DataError: the file cannot be read as a whole.
    """
    try:
        head, rest = _peek(stream)
        if head.startswith(GZIP):
            head, rest = _peek(gzip.GzipFile(fileobj=rest))
        if is_blank(head):
            return
        format = find_format(head, uri) if format == "auto" else format
        if format == "json":
            yield from documents.read_document(rest, uri, columns)
        else:
            yield from _READERS[format](rest, uri)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{uri}: the gzip data is damaged or cut off ({error}); write the file again"
        ) from None


def named_columns(fields: FieldsSpec) -> frozenset[str]:
    """The columns that a source's `fields` name: of dotted paths the first part.

    >>> sorted(named_columns(FieldsSpec(prompt="q.text", completion="a")))
    ['a', 'q']
    """
    paths = fields.model_dump().values()
    return frozenset(path.partition(".")[0] for path in paths if isinstance(path, str))


def is_blank(head: bytes) -> bool:
    """Whether a file that begins so ends there, and holds nothing."""
    return len(head) < HEAD_BYTES and not head.removeprefix(text.BOM).strip()


def find_format(head: bytes, uri: str) -> str:
    """Format of a file that begins with `head`.

    Raises:
        DataError: it is none that can be read.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((ARROW_FILE, ARROW_STREAM)):
        return "arrow"
    if head.startswith(_UTF16):
        raise DataError(f"{uri}: the text is UTF-16; save it as UTF-8, as iconv -f UTF-16 -t UTF-8 does")
    if head.startswith(_LFS_POINTER):
        raise DataError(f"{uri}: a pointer of Git LFS, not the file itself; run git lfs pull in the clone")
    content = head.removeprefix(text.BOM).lstrip()
    first, _, following = content.partition(b"\n")
    if content.startswith((b"{", b"[")):
        return "jsonl" if following.strip() and is_json(first) else "json"
    if any(is_json(line) and line.lstrip().startswith(b"{") for line in content.split(b"\n")[:SAMPLED_LINES]):
        return "jsonl"
    if _is_text(first) and (text.delimiter_of(first) or first.strip().strip(b'"') == b"text"):
        return "csv"
    if is_json(first, of=object):
        return "jsonl"
    raise DataError(f"{uri}: neither {_KNOWN_FORMATS}; convert it, or set the source's format")


def _read_lines_of(found: DataObject, window: Window) -> Iterator[RawRecord | BadRecord]:
    """The lines that begin in the window; the last may end beyond."""
    stop = window.stop
    blocks = _blocks_from(found, max(window.start - 1, 0), stop)
    # Whether a line begins at `start` is told by the byte before.
    start, blocks = text.from_next_line(blocks, window.start - 1, stop) if window.start else (0, blocks)
    return text.read_jsonl(blocks, found.uri, start, stop, numbered=window.start == 0)


def _blocks_from(found: DataObject, start: int, stop: int) -> Iterator[bytes]:
    """The bytes from `start` on, of which those after `stop` are asked for in small parts."""
    end = min(stop + _OVERHANG_BYTES, found.size_bytes)
    yield from read_blocks(found, start, end)
    while end < found.size_bytes:
        start, end = end, min(end + 4 * _OVERHANG_BYTES, found.size_bytes)
        yield from read_blocks(found, start, end)


def _read_csv_of(found: DataObject, window: Window) -> Iterator[RawRecord | BadRecord]:
    blocks = read_blocks(found, window.start, window.stop)
    if window.start == 0:
        return text.read_csv(blocks, found.uri)
    return text.read_csv_part(blocks, found.uri, window.context, window.start)


def _read_document_of(found: DataObject, window: Window) -> Iterator[RawRecord | BadRecord]:
    content = b"".join(read_blocks(found, window.start, window.stop))
    return documents.read_document_part(content, found.uri, window.context)


def _read_stream_of(found: DataObject, window: Window) -> Iterator[RawRecord | BadRecord]:
    schema_bytes, before = map(int, window.context.split())
    parts = (*read_blocks(found, 0, schema_bytes), *read_blocks(found, window.start, window.stop))
    return columnar.read_stream_part(b"".join(parts), found.uri, before)


_BYTE_READERS = {
    "jsonl": _read_lines_of,
    "csv": _read_csv_of,
    "json": _read_document_of,
    "natural-instructions": _read_document_of,
    "arrow": _read_stream_of,
}


def _is_text(line: bytes) -> bool:
    try:
        return "\0" not in line.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _peek(stream: Any) -> tuple[bytes, BinaryIO]:
    """The first bytes of a stream, and a stream that still has them."""
    parts = []
    wanted = HEAD_BYTES
    while wanted and (part := stream.read(wanted)):
        parts.append(part)
        wanted -= len(part)
    head = b"".join(parts)
    return head, io.BufferedReader(_Rewound(head, stream), 1 << 16)


class _Rewound(io.RawIOBase):
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = memoryview(head)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)
        part = self._head[: len(target)] or self._rest.read(len(target))
        self._head = self._head[len(part) :]
        target[: len(part)] = part
        return len(part)


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: stream.read(_BLOCK_BYTES), b"")


def _read_lines(stream: BinaryIO, uri: str) -> Iterator[RawRecord | BadRecord]:
    return text.read_jsonl(_blocks(stream), uri)


def _read_csv(stream: BinaryIO, uri: str) -> Iterator[RawRecord | BadRecord]:
    return text.read_csv(_blocks(stream), uri)


_READERS = {
    "jsonl": _read_lines,
    "natural-instructions": documents.read_natural_instructions,
    "csv": _read_csv,
    "parquet": columnar.read_parquet,
    "arrow": columnar.read_arrow,
}
