"""Records of lines: jsonl and csv, from blocks of bytes and in bounded memory."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from raytune_ft.data.raw import KEPT_CHARACTERS, BadRecord, RawRecord, printable
from raytune_ft.errors import DataError

MAX_LINE_BYTES = 16 << 20
"""A longer line, or csv record, is malformed; it is passed over without being held."""
BOM = b"\xef\xbb\xbf"

Line = tuple[int, bytes, int]
"""Where a line begins, its content with its end, and its size. Of one above the limit only the beginning."""


def read_lines(
    blocks: Iterable[bytes], start: int = 0, stop: int = sys.maxsize, *, universal: bool = False
) -> Iterator[Line]:
    """Lines that begin before `stop`. Asks for no block that they do not need.

    Args:
        blocks: bytes from the beginning of a line on.
        start: offset of their first byte.
        stop: offset.
        universal: lines end with CR too, as in csv, and not with LF and CRLF alone.
    """
    ends = b"\n\r" if universal else b"\n"
    limit_bytes = MAX_LINE_BYTES
    held = bytearray()
    size_bytes = 0
    if start >= stop:
        return
    for block in _with_whole_ends(blocks) if universal else blocks:
        for piece in block.splitlines(keepends=True) if universal else io.BytesIO(block):
            is_end = piece[-1] in ends
            size_bytes += len(piece)
            if is_end and not held and size_bytes <= limit_bytes:
                yield start, piece, size_bytes
            else:
                held += piece[: limit_bytes + 1 - len(held)]
                if not is_end and not (size_bytes > limit_bytes and start + size_bytes >= stop):
                    continue
                yield start, _within(held, size_bytes, limit_bytes), size_bytes
                held.clear()
            start += size_bytes
            size_bytes = 0
            if start >= stop:
                return
    if held:
        yield start, _within(held, size_bytes, limit_bytes), size_bytes


def _within(line: bytearray, size_bytes: int, limit_bytes: int) -> bytes:
    return bytes(line if size_bytes <= limit_bytes else line[: min(4 * KEPT_CHARACTERS, limit_bytes)])


def _with_whole_ends(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks that do not end between CR and LF."""
    held = b""
    for block in blocks:
        content = held + block
        held = b"\r" if content.endswith(b"\r") else b""
        yield content.removesuffix(b"\r") if held else content
    yield held


def from_next_line(blocks: Iterator[bytes], start: int, stop: int) -> tuple[int, Iterator[bytes]]:
    """Where the first line begins after the one that `blocks` begin in, and the blocks from there.

    Looks no further than `stop`.
    """
    for block in blocks:
        end = block.find(b"\n") + 1
        if end:
            return start + end, chain((block[end:],), blocks)
        start += len(block)
        if start >= stop:
            break
    return stop, iter(())


def read_jsonl(
    blocks: Iterable[bytes], uri: str, start: int = 0, stop: int = sys.maxsize, *, numbered: bool = True
) -> Iterator[RawRecord | BadRecord]:
    """Records of JSON lines that begin in [start, stop); see `read_lines`.

    Positions are numbers of lines, or offsets where not `numbered`.
    """
    for number, (offset, line, size_bytes) in enumerate(read_lines(blocks, start, stop), 1):
        position = f"line {number}" if numbered else f"byte {offset}"
        # Files that begin with a byte-order mark may have been put one after another.
        content = line.removeprefix(BOM)
        if len(line) < size_bytes:
            yield _too_long(uri, position, "line", content.decode("utf-8", "backslashreplace"))
        elif content.strip():
            yield parse_line(content.rstrip(b"\r\n"), uri, position)


def parse_line(line: bytes, uri: str, position: str) -> RawRecord | BadRecord:
    """The record that a JSON text is, or why it is none."""
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


def _too_long(uri: str, position: str, what: str, beginning: str) -> BadRecord:
    return BadRecord(
        uri, position, f"{what} of more than {MAX_LINE_BYTES / (1 << 20):g} MiB", printable(beginning)
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a csv file, or what stands in its place."""

    line: int
    """Number of its first line, from 1."""
    start: int
    end: int
    """Offsets of its first byte and of that after its last."""
    fields: list[str]
    problem: str | None
    text: str
    """Its beginning, where there is a problem."""


class _TooLong(Exception):
    pass


class _RecordLines:
    """Feeds a csv reader; knows which lines the record under way has."""

    def __init__(self, lines: Iterator[Line], start: int) -> None:
        self._lines = lines
        self.count = 0
        self.end = start
        self.seen: list[str] = []
        self._seen_bytes = 0

    def __iter__(self) -> "_RecordLines":
        return self

    def __next__(self) -> str:
        offset, line, size_bytes = next(self._lines)
        self.count += 1
        self.end = offset + size_bytes
        self._seen_bytes += size_bytes
        # Bytes that are not UTF-8 become lone surrogates, so that they spoil their own record only.
        text = (line if offset else line.removeprefix(BOM)).decode("utf-8", "surrogateescape")
        self.seen.append(text)
        if self._seen_bytes > MAX_LINE_BYTES:
            raise _TooLong
        return text

    def begin(self) -> None:
        """The record before is complete."""
        self.seen.clear()
        self._seen_bytes = 0


def read_rows(blocks: Iterable[bytes], delimiter: str, start: int, lines_before: int = 0) -> Iterator[Row]:
    """Rows of csv, and of what is none; blank lines too.

    After a record that is malformed or too long the next line begins a new one.

    Args:
        blocks: bytes from the beginning of a record on.
        delimiter: between fields.
        start: offset of the first byte.
        lines_before: added to the numbers of lines.
    """
    csv.field_size_limit(sys.maxsize)
    lines = _RecordLines(read_lines(blocks, start, universal=True), start)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        line, begin = lines_before + lines.count + 1, lines.end
        fields: list[str] = []
        problem, text = None, ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem, text = f"not CSV: {error}", "".join(lines.seen)
        except _TooLong:
            problem = f"record of more than {MAX_LINE_BYTES / (1 << 20):g} MiB"
            text = "".join(lines.seen)
        yield Row(line, begin, lines.end, fields, problem, printable(text))


@dataclass(frozen=True, slots=True)
class Header:
    """The first line of a csv file that is not blank."""

    line: str
    end: int
    """Offset after it."""
    lines: int
    """How many lines end there."""

    @property
    def delimiter(self) -> str:
        """What stands between its fields."""
        return delimiter_of(self.line.encode()) or ","


def read_header(blocks: Iterable[bytes], uri: str) -> Header | None:
    """The header of a csv file, None where all is blank. Column names do not span lines.

    Raises:
        DataError: it is too long or not UTF-8.
    """
    for number, (offset, line, size_bytes) in enumerate(read_lines(blocks, universal=True), 1):
        content = line if offset else line.removeprefix(BOM)
        if len(line) < size_bytes:
            raise DataError(f"{uri}: the header has more than {MAX_LINE_BYTES:,} bytes; is it csv?")
        if content.strip():
            try:
                return Header(content.decode("utf-8"), offset + size_bytes, number)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{uri}: the header is not UTF-8 at byte {offset + error.start + 1}; save it as UTF-8"
                ) from None
    return None


def read_columns(header: str, delimiter: str, uri: str) -> list[str]:
    """Names of the columns.

    Raises:
        DataError: two have the same, or the header is not csv.
    """
    csv.field_size_limit(sys.maxsize)
    columns = next(csv.reader([header], delimiter=delimiter))
    if len(set(columns)) < len(columns):
        raise DataError(f"{uri}: the header names a column twice: {', '.join(columns)}")
    return columns


def read_csv(blocks: Iterable[bytes], uri: str) -> Iterator[RawRecord | BadRecord]:
    """Records of a whole csv file, or of one from its beginning to the end of a record.

    Raises:
        DataError: the header cannot be used.
    """
    blocks = iter(blocks)
    seen: list[bytes] = []
    header = read_header(_noted(blocks, seen), uri)
    if header is None:
        return
    columns = read_columns(header.line, header.delimiter, uri)
    rest = chain((b"".join(seen)[header.end :],), blocks)
    for row in read_rows(rest, header.delimiter, header.end, header.lines):
        yield from _record_of(row, columns, uri, f"line {row.line}")


def read_csv_part(
    blocks: Iterable[bytes], uri: str, header: str, start: int
) -> Iterator[RawRecord | BadRecord]:
    """Records of a csv file from the beginning of one on, with the header that stands elsewhere."""
    delimiter = delimiter_of(header.encode()) or ","
    columns = read_columns(header, delimiter, uri)
    for row in read_rows(blocks, delimiter, start):
        yield from _record_of(row, columns, uri, f"byte {row.start}")


def _noted(blocks: Iterable[bytes], seen: list[bytes]) -> Iterator[bytes]:
    for block in blocks:
        seen.append(block)
        yield block


def _record_of(row: Row, columns: list[str], uri: str, position: str) -> Iterator[RawRecord | BadRecord]:
    if row.problem is not None:
        yield BadRecord(uri, position, row.problem, row.text)
    elif row.fields:
        raw = RawRecord(dict(zip(columns, row.fields, strict=False)), position)
        if len(row.fields) != len(columns):
            yield BadRecord.of(uri, raw, f"{len(row.fields)} fields, and the header has {len(columns)}")
        elif not _is_unicode("".join(row.fields)):
            yield BadRecord.of(uri, raw, "not UTF-8")
        else:
            yield raw


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def delimiter_of(header: bytes) -> str:
    """The separator that a header line uses most, or '' if it uses none."""
    best = max(b",\t;", key=header.count)
    return chr(best) if header.count(best) else ""
