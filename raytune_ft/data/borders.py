"""Where the records of large csv files and JSON documents end: one pass over the bytes, mostly in numpy."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from raytune_ft.data import text

Positions = np.ndarray[Any, np.dtype[np.int64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Range = tuple[int, int, int]
"""First byte, byte after the last, records before."""

_QUOTE, _BACKSLASH, _LF, _CR, _COMMA, _COLON = b'"\\\n\r,:'
_OPENING, _CLOSING = b"{[", b"}]"
_STRUCTURAL = np.zeros(256, dtype=np.uint8)
_STRUCTURAL[list(b'"{}[],:')] = 1
_DEPTH = np.zeros(256, dtype=np.int64)
_DEPTH[list(_OPENING)] = 1
_DEPTH[list(_CLOSING)] = -1
MAX_MEMBERS = 64
"""A JSON object of more holds its records by id."""


class _Cuts:
    """Chooses among the ends of records those where windows end."""

    def __init__(self, start: int, window_bytes: int, separator_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._separator_bytes = separator_bytes
        self._starts = [start]
        self._records = [0]
        self._seen = 0

    def add(self, ends: Positions) -> None:
        """Offsets after the next records, ascending."""
        while True:
            at = int(np.searchsorted(ends, self._starts[-1] + self._window_bytes))
            if at >= len(ends):
                break
            self._starts.append(int(ends[at]) + self._separator_bytes)
            self._records.append(self._seen + at + 1)
        self._seen += len(ends)

    def ranges(self, stop: int) -> tuple[Range, ...]:
        """The windows, up to the end of the last record. A small remainder joins the window before it."""
        starts, records = self._starts, self._records
        if len(starts) > 1 and stop - starts[-1] < self._window_bytes / 2:
            starts, records = starts[:-1], records[:-1]
        stops = [*(start - self._separator_bytes for start in starts[1:]), stop]
        return tuple(zip(starts, stops, records, strict=True))


def csv_ranges(blocks: Iterable[bytes], start: int, delimiter: str, window_bytes: int) -> tuple[Range, ...]:
    """Windows of a csv file, from the beginning of a record to the end of one. Records are not counted.

    Args:
        blocks: the file from the end of its header on, in blocks of some MiB, of which few are held.
        start: offset of their first byte.
        delimiter: between fields.
        window_bytes: what a window has at least.
    """
    cuts = _Cuts(start, window_bytes, 0)
    blocks = iter(blocks)
    pending = b""
    for block in blocks:
        pending += block
        ends = _csv_ends(np.frombuffer(pending, dtype=np.uint8), ord(delimiter)) + start
        if len(ends):
            rest = pending[int(ends[-1]) - start :]
        else:
            ends, rest = _parsed_csv_ends(pending, blocks, start, delimiter)
        cuts.add(ends)
        pending, start = rest, int(ends[-1])
    return cuts.ranges(start + len(pending))


def _csv_ends(content: Bytes, delimiter: int) -> Positions:
    """Offsets after the records in csv that begins with one; none where quotes stand at unusual places.

    A line end is one of a record if the quotes before it are even in number. This is what a csv reader finds
    as long as each first quote of a pair begins a field or follows another, and each second one ends a field
    or comes before another.
    """
    none = np.zeros(0, dtype=np.int64)
    quotes = np.flatnonzero(content == _QUOTE)
    around = np.zeros(256, dtype=np.bool_)
    around[[_QUOTE, _LF, _CR, delimiter]] = True
    first, second = quotes[0::2], quotes[1::2]
    first, second = first[first > 0], second[second < len(content) - 1]
    if not (around[content[first - 1]].all() and around[content[second + 1]].all()):
        return none
    ends = np.flatnonzero((content == _LF) | (content == _CR))
    # Of CRLF the second ends the record; whether a CR at the very end is one of them is not known yet.
    following = np.append(content[1:], _LF)[ends]
    ends = ends[(content[ends] == _LF) | (following != _LF)]
    ends = ends[np.searchsorted(quotes, ends) % 2 == 0] + 1
    if len(ends) and int(np.diff(ends, prepend=0).max()) > text.MAX_LINE_BYTES:
        return none
    found: Positions = ends
    return found


def _parsed_csv_ends(
    content: bytes, blocks: Iterator[bytes], start: int, delimiter: str
) -> tuple[Positions, bytes]:
    """Offsets after all records that begin in `content`, and the bytes after the last that were taken.

    The way for what `_csv_ends` cannot tell, by the same reader that will read the records.
    """
    taken, taken_end = b"", start

    def noted() -> Iterator[bytes]:
        nonlocal taken, taken_end
        for taken in chain((content,), blocks):
            taken_end += len(taken)
            yield taken

    ends = []
    for row in text.read_rows(noted(), delimiter, start):
        ends.append(row.end)
        if row.end >= start + len(content):
            break
    return np.array(ends, dtype=np.int64), taken[len(taken) - (taken_end - ends[-1]) :]


@dataclass(frozen=True, slots=True)
class Member:
    """A name and its value in a JSON object."""

    start: int
    colon: int
    stop: int
    """Offsets: from `start` to `colon` is the name, from there to `stop` the value."""
    ranges: tuple[Range, ...] | None
    """Windows of the value's elements, where it is an array."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What the first value of a JSON text is."""

    kind: Literal["array", "object", "several values", "incomplete", "object of many"]
    ranges: tuple[Range, ...] = ()
    """Windows of an array's elements, between commas."""
    members: tuple[Member, ...] = ()
    """Of an object with few."""


def json_structure(blocks: Iterable[bytes], window_bytes: int) -> Structure:
    """What a JSON text holds, by its brackets and commas; it may still turn out not to be JSON.

    Args:
        blocks: all of it, in blocks of some MiB, of which one is held.
        window_bytes: what a window has at least.
    """
    scan = _JsonScan(window_bytes)
    for block in blocks:
        scan.feed(np.frombuffer(block, dtype=np.uint8))
        if scan.many or scan.followed:
            break
    return scan.finish()


class _JsonScan:
    def __init__(self, window_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._offset = 0
        self._escaped = False
        self._in_string = 0
        self._depth = 0
        self._top: int | None = None
        self._end: int | None = None
        self._cuts: _Cuts | None = None
        self._ranges: tuple[Range, ...] | None = None
        """Windows of the array that was closed last: the top one, or the value of the member under way."""
        self._start = self._colon = 0
        self._members: list[Member] = []
        self.many = False
        self.followed = False
        """Whether more comes after the first value."""

    def feed(self, content: Bytes) -> None:
        """Take the next block."""
        at, kinds = self._outside_strings(content)
        if self._end is None and len(at):
            depths = self._depth + np.cumsum(_DEPTH[kinds])
            self._depth = int(depths[-1])
            self._take(at + self._offset, kinds, depths)
        begin = 0 if self._end is None else self._end - self._offset + 1
        if self._end is not None and content[max(begin, 0) :].tobytes().strip():
            self.followed = True
        self._offset += len(content)

    def finish(self) -> Structure:
        """What was found."""
        if self.many:
            return Structure("object of many")
        if self.followed:
            return Structure("several values")
        if self._end is None:
            return Structure("incomplete")
        if self._top == _OPENING[1]:
            return Structure("array", ranges=self._ranges or ())
        return Structure("object", members=tuple(self._members))

    def _outside_strings(self, content: Bytes) -> tuple[Positions, Bytes]:
        """Brackets, commas and colons that are no part of a string: where they are, and which."""
        marks = _STRUCTURAL[content]
        marks[self._escaped_in(content)] = 0
        at = np.flatnonzero(marks)
        kinds = content[at]
        is_quote = kinds == _QUOTE
        in_string = (self._in_string + np.cumsum(is_quote)) % 2
        if len(at):
            self._in_string = int(in_string[-1])
        outside = ~is_quote & (in_string == 0)
        return at[outside], kinds[outside]

    def _escaped_in(self, content: Bytes) -> Positions:
        """Where an odd number of backslashes comes before."""
        slashes = np.flatnonzero(content == _BACKSLASH)
        before = np.zeros(int(self._escaped), dtype=np.int64)
        if self._escaped and len(slashes) and slashes[0] == 0:
            slashes = slashes[1:]
        # Runs of backslashes, by the last of each and the first.
        last = np.append(np.diff(slashes) != 1, np.ones(min(len(slashes), 1), dtype=np.bool_))
        ends = slashes[last]
        starts = slashes[np.roll(last, 1)]
        after = ends[(ends - starts) % 2 == 0] + 1
        self._escaped = bool(len(after)) and int(after[-1]) == len(content)
        return np.concatenate([before, after[: len(after) - self._escaped]])

    def _take(self, at: Positions, kinds: Bytes, depths: Positions) -> None:
        closed = np.flatnonzero(depths <= 0)
        if len(closed):
            last = int(closed[0]) + 1
            at, kinds, depths = at[:last], kinds[:last], depths[:last]
            self._end = int(at[-1])
        if self._top is None:
            self._top = int(kinds[0])
            self._start = int(at[0]) + 1
        is_comma = kinds == _COMMA
        if self._top == _OPENING[1]:
            self._take_elements(at[is_comma & (depths == 1)])
            return
        shallow = (is_comma | (kinds == _COLON)) & (depths == 1)
        opening = np.isin(kinds, list(_OPENING)) & (depths == 2)
        closing = np.isin(kinds, list(_CLOSING)) & (depths <= 1)
        events = np.flatnonzero(shallow | opening | closing)
        # A member has a colon, a comma and perhaps two brackets.
        if len(self._members) + len(events) / 4 > MAX_MEMBERS:
            self.many = True
            return
        self._walk(at[events], kinds[events], depths[events], at[is_comma & (depths == 2)])

    def _take_elements(self, commas: Positions) -> None:
        """Follow the elements of the top array."""
        self._cuts = self._cuts or _Cuts(self._start, self._window_bytes, 1)
        self._cuts.add(commas)
        if self._end is not None:
            self._ranges = self._cuts.ranges(self._end)

    def _walk(self, at: Positions, kinds: Bytes, depths: Positions, commas: Positions) -> None:
        """Follow the members of the top object; `commas` are those within their values' own brackets."""
        for offset, kind, depth in zip(at.tolist(), kinds.tolist(), depths.tolist(), strict=True):
            before = int(np.searchsorted(commas, offset))
            if self._cuts is not None:
                self._cuts.add(commas[:before])
            commas = commas[before:]
            if kind == _COLON:
                self._colon = offset
            elif kind == _OPENING[1]:
                self._cuts = _Cuts(offset + 1, self._window_bytes, 1)
            elif kind in _CLOSING and depth == 1 and self._cuts is not None:
                self._ranges, self._cuts = self._cuts.ranges(offset), None
            elif kind == _COMMA or depth <= 0:
                if self._colon >= self._start:
                    self._members.append(Member(self._start, self._colon, offset, self._ranges))
                self._start, self._ranges = offset + 1, None
        if self._cuts is not None:
            self._cuts.add(commas)
