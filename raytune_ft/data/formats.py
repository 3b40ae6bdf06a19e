"""From the bytes of a file to raw records: jsonl, json, Natural Instructions, csv, parquet, arrow, gzip.

The format is found by content, never by name: a `.json` file may hold JSON lines. One malformed record
never stops a file; a file that cannot be read as a whole does.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, BinaryIO

from raytune_ft.data.columnar import read_arrow, read_parquet
from raytune_ft.errors import DataError

HEAD_BYTES = 1 << 20
"""How much of a file is looked at to find its format."""
_SAMPLED_LINES = 20
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ARROW_STREAM = b"\xff\xff\xff\xff"
_KEPT_CHARACTERS = 2000
_KNOWN_FORMATS = "jsonl, json, csv, parquet or arrow"


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as its file holds it; an object unless the file is wrong."""

    value: Any
    position: str
    """Place within the file: `line 3`, `record 12`."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be trained on, and why."""

    uri: str
    position: str
    reason: str
    record: str
    """Its beginning, as text."""

    @property
    def place(self) -> str:
        """File and position in one."""
        return f"{self.uri}:{self.position}"

    @classmethod
    def of(cls, uri: str, raw: RawRecord, reason: str) -> "BadRecord":
        """The bad record for a raw one."""
        text = json.dumps(raw.value, ensure_ascii=False, default=str)
        return cls(uri, raw.position, printable(reason), printable(text))


def printable(text: str) -> str:
    """The beginning of a text, in characters that every file and terminal can hold."""
    return text[:_KEPT_CHARACTERS].encode("utf-8", "backslashreplace").decode("utf-8")


def read_records(stream: BinaryIO, uri: str, format: str = "auto") -> Iterator[RawRecord | BadRecord]:
    """Records of one file, in order.

    Args:
        stream: its bytes, from the beginning; it is read once and need not be seekable.
        uri: where it is, for messages.
        format: what to read it as, or `auto`; see `SourceSpec.format`.

    Raises:
        DataError: the file cannot be read as a whole.
    """
    try:
        head, rest = _peek(stream)
        if head.startswith(b"\x1f\x8b"):
            head, rest = _peek(gzip.GzipFile(fileobj=rest))
        if not head.removeprefix(_BOM).strip() and len(head) < HEAD_BYTES:
            return
        yield from _READERS[find_format(head, uri) if format == "auto" else format](rest, uri)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{uri}: the gzip data is damaged or cut off ({error}); write the file again"
        ) from None


def find_format(head: bytes, uri: str) -> str:
    """Format of a file that begins with `head`.

    Raises:
        DataError: it is none that can be read.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", _ARROW_STREAM)):
        return "arrow"
    if head.startswith(_UTF16):
        raise DataError(f"{uri}: the text is UTF-16; save it as UTF-8")
    text = head.removeprefix(_BOM).lstrip()
    first, _, following = text.partition(b"\n")
    if text.startswith((b"{", b"[")):
        return "jsonl" if following.strip() and _is_json(first) else "json"
    if any(_is_json(line) and line.lstrip().startswith(b"{") for line in text.split(b"\n")[:_SAMPLED_LINES]):
        return "jsonl"
    if _is_text(first) and (_delimiter(first) or first.strip().strip(b'"') == b"text"):
        return "csv"
    if _is_json(first, of=object):
        return "jsonl"
    raise DataError(f"{uri}: neither {_KNOWN_FORMATS}; convert it, or set the source's format")


def _read_lines(stream: BinaryIO, uri: str) -> Iterator[RawRecord | BadRecord]:
    for number, line in enumerate(stream, 1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if content.strip():
            yield _parse_line(content.rstrip(b"\r\n"), uri, f"line {number}")


def _parse_line(line: bytes, uri: str, position: str) -> RawRecord | BadRecord:
    try:
        return RawRecord(json.loads(line.decode("utf-8")), position)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        reason = f"not JSON at column {error.colno}: {error.msg}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # An integer of more digits than Python converts.
        reason = f"not JSON: {error}"
    return BadRecord(uri, position, reason, printable(line.decode("utf-8", "backslashreplace").strip()))


def _read_document(stream: BinaryIO, uri: str) -> Iterator[RawRecord | BadRecord]:
    content = stream.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if _may_be_lines(content, error):
            yield from _read_lines(io.BytesIO(content), uri)
            return
        raise DataError(f"{uri}: {_document_problem(error)}") from None
    del content
    yield from _records_of(value)


def _may_be_lines(content: bytes, error: Exception) -> bool:
    """Whether a broken document is JSON lines whose first line is broken, or too long to be told from one."""
    whole_first = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
    return whole_first or (
        content.removeprefix(_BOM).lstrip().startswith(b"{")
        and any(_is_json(line) for line in content.split(b"\n", _SAMPLED_LINES)[:_SAMPLED_LINES])
    )


def _document_problem(error: Exception) -> str:
    match error:
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {error.start + 1}; save it as UTF-8"
        case json.JSONDecodeError():
            return f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}; is it complete?"
        case RecursionError():
            return "JSON nested too deeply to read"
    return f"not JSON: {error}"


def _records_of(value: Any) -> Iterator[RawRecord]:
    """Records of a JSON document: an array, Natural Instructions, `examples`, an object by id, or one."""
    if isinstance(value, dict) and _is_natural_instructions(value):
        value = _instances_of(value)
    elif isinstance(value, dict) and isinstance(value.get("examples"), list | dict):
        value = value["examples"]
    if isinstance(value, list):
        yield from (RawRecord(record, f"record {number}") for number, record in enumerate(value, 1))
    elif isinstance(value, dict) and value and all(isinstance(record, dict) for record in value.values()):
        yield from (RawRecord(record, f"record {json.dumps(key)}") for key, record in value.items())
    elif value != {}:
        yield RawRecord(value, "record 1")


def _is_natural_instructions(value: dict[str, Any]) -> bool:
    return "Definition" in value and isinstance(value.get("Instances"), list)


def _instances_of(task: dict[str, Any]) -> list[Any]:
    """Instances of a Natural Instructions task, each with the task's definition as its instruction."""
    definition = task["Definition"]
    if isinstance(definition, list):
        definition = "\n".join(map(str, definition))
    return [
        {"instruction": definition, **instance} if isinstance(instance, dict) else instance
        for instance in task["Instances"]
    ]


def _read_natural_instructions(stream: BinaryIO, uri: str) -> Iterator[RawRecord | BadRecord]:
    try:
        task = json.loads(stream.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{uri}: {_document_problem(error)}") from None
    if not isinstance(task, dict) or not _is_natural_instructions(task):
        raise DataError(f"{uri}: no Definition with a list of Instances, and format is natural-instructions")
    yield from _records_of(task)


def _read_csv(stream: BinaryIO, uri: str) -> Iterator[RawRecord | BadRecord]:
    # Bytes that are not UTF-8 become lone surrogates, so that they spoil their own record only.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    lines = _Remembered(text)
    csv.field_size_limit(sys.maxsize)
    # The header's line is read by itself to find the delimiter; column names do not span lines.
    first = next((line for line in lines if line.strip()), "")
    delimiter = _delimiter(first.encode("utf-8", "replace")) or ","
    header = next(csv.reader([first], delimiter=delimiter))
    if len(set(header)) < len(header):
        raise DataError(f"{uri}: the header names a column twice: {', '.join(header)}")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.seen.clear()
        position = f"line {lines.count + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRecord(uri, position, f"not CSV: {error}", printable("".join(lines.seen)))
            continue
        if row:
            yield _csv_record(header, row, uri, position)


def _csv_record(header: list[str], row: list[str], uri: str, position: str) -> RawRecord | BadRecord:
    raw = RawRecord(dict(zip(header, row, strict=False)), position)
    if len(row) != len(header):
        reason = f"{len(row)} fields, and the header has {len(header)}"
    elif any("\udc80" <= character <= "\udcff" for value in row for character in value):
        reason = "not UTF-8"
    else:
        return raw
    return BadRecord.of(uri, raw, reason)


class _Remembered:
    """An iterator over lines that counts them and keeps those since `seen` was last cleared."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.count = 0
        self.seen: list[str] = []

    def __iter__(self) -> "_Remembered":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.count += 1
        self.seen.append(line)
        return line


def _delimiter(header: bytes) -> str:
    """The separator that a header line uses most, or '' if it uses none."""
    best = max(b",\t;", key=header.count)
    return chr(best) if header.count(best) else ""


def _is_text(line: bytes) -> bool:
    try:
        return "\0" not in line.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _is_json(line: bytes, of: type | UnionType = dict | list) -> bool:
    try:
        return isinstance(json.loads(line), of)
    except (ValueError, RecursionError):
        return False


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


def _peek(stream: Any) -> tuple[bytes, BinaryIO]:
    """The first bytes of a stream, and a stream that still has them."""
    parts = []
    wanted = HEAD_BYTES
    while wanted and (part := stream.read(wanted)):
        parts.append(part)
        wanted -= len(part)
    head = b"".join(parts)
    return head, io.BufferedReader(_Rewound(head, stream), 1 << 16)


def _read_parquet(stream: BinaryIO, uri: str) -> Iterator[RawRecord]:
    return (RawRecord(row, f"record {n}") for n, row in enumerate(read_parquet(stream, uri), 1))


def _read_arrow(stream: BinaryIO, uri: str) -> Iterator[RawRecord]:
    return (RawRecord(row, f"record {n}") for n, row in enumerate(read_arrow(stream, uri), 1))


_READERS = {
    "jsonl": _read_lines,
    "json": _read_document,
    "natural-instructions": _read_natural_instructions,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
