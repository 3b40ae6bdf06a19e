"""Files that are damaged, odd or made to do harm: what is good in them, and a reason for what is not."""

import csv
import gzip
import io
import json
import math
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from raytune_ft.data import index, text
from raytune_ft.data.formats import BadRecord, RawRecord, read_records, read_window
from raytune_ft.data.index import divide
from raytune_ft.data.sources import DataObject, list_objects
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec, SourceSpec

ROWS = [{"prompt": f"{n}+{n}", "completion": "é" * (n % 9)} for n in range(100)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WINDOW_BYTES", 500)
    monkeypatch.setattr(index, "SCAN_BYTES", 1000)


def stored(path: Path, content: bytes) -> DataObject:
    path.write_bytes(content)
    (found,) = list_objects(DataSpec(sources=(SourceSpec(uri=str(path)),)))
    return found


def records_of(found: DataObject, format: str = "auto") -> Iterator[RawRecord | BadRecord]:
    for window in divide(found, 0, format, None):
        yield from read_window(found, window)


def good(records: list[RawRecord | BadRecord]) -> list[Any]:
    return [record.value for record in records if isinstance(record, RawRecord)]


def bad(records: list[RawRecord | BadRecord]) -> list[tuple[str, str]]:
    return [(record.place, record.reason) for record in records if isinstance(record, BadRecord)]


# ---- gzip


@pytest.mark.parametrize("cut", [1, 9, 100])
def test_gzip_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    found = stored(tmp_path / "x.gz", gzip.compress(LINES)[:-cut])
    with pytest.raises(DataError) as raised:
        list(records_of(found))
    assert str(raised.value).startswith(f"{found.uri}: the gzip data is damaged or cut off (")


def test_gzip_with_something_after_it(tmp_path: Path) -> None:
    found = stored(tmp_path / "x.gz", gzip.compress(LINES) + b"garbage")
    with pytest.raises(DataError) as raised:
        list(records_of(found))
    assert str(raised.value) == (
        f"{found.uri}: the gzip data is damaged or cut off (Not a gzipped file (b'ga')); write the file again"
    )


def test_gzip_with_a_damaged_byte(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(LINES))
    content[len(content) // 2] ^= 4
    with pytest.raises(DataError, match="the gzip data is damaged or cut off"):
        list(records_of(stored(tmp_path / "x.gz", bytes(content))))


def test_gzip_of_several_members(tmp_path: Path) -> None:
    middle = len(LINES) // 2
    content = gzip.compress(LINES[:middle]) + gzip.compress(b"") + gzip.compress(LINES[middle:])
    assert good(list(records_of(stored(tmp_path / "x.gz", content)))) == ROWS


def test_a_document_that_gzip_hides_the_size_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytune_ft.data.documents.WHOLE_LIMIT_BYTES", 1 << 20)
    found = stored(tmp_path / "x.gz", gzip.compress(b'["' + b"x" * (4 << 20) + b'"]'))
    with pytest.raises(DataError) as raised:
        list(records_of(found))
    assert str(raised.value) == (
        f"{found.uri}: a JSON document of more than 1,048,576 bytes is not held in memory at once; write its "
        "records as jsonl or parquet, or in several files"
    )


# ---- lines


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n \n"])
def test_line_ends(tmp_path: Path, end: bytes, bom: bytes, last: bytes) -> None:
    content = bom + LINES.replace(b"\n", end) + last
    assert good(list(records_of(stored(tmp_path / "x", content)))) == ROWS


@pytest.mark.parametrize("shift", range(-2, 3))
def test_a_line_that_begins_where_a_window_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    begin = LINES.index(b"\n", 500) + 1
    monkeypatch.setattr(index, "WINDOW_BYTES", begin + shift)
    found = stored(tmp_path / "x", LINES)
    windows = divide(found, 0, "auto", None)
    assert windows[1].start == begin + shift
    assert good([record for window in windows for record in read_window(found, window)]) == ROWS
    first = good(list(read_window(found, windows[0])))
    assert len(first) == LINES[:begin].count(b"\n") + (shift > 0)


@pytest.mark.usefixtures("small_windows")
def test_text_that_is_not_utf8_at_the_border_of_windows(tmp_path: Path) -> None:
    content = bytearray(b'{"a": 1}\n' + (b'{"a": "' + "é".encode() * 100 + b'"}\n') * 20)
    content[1000] = 0xFF  # Of the second window the first byte.
    found = stored(tmp_path / "x", bytes(content))
    records = list(records_of(found))
    assert len(records) == 21
    ((place, reason),) = bad(records)
    line = content.rindex(b"\n", 0, 1000) + 1
    assert place == f"{found.uri}:byte {line}"
    assert reason.startswith("not UTF-8 at byte ")


ODD_LINES = {
    b'{"a": "\0"}': "not JSON at column 8: Invalid control character at",
    b"\0": "not JSON at column 1: Expecting value",
    b'{"a": 1': "not JSON at column 8: Expecting ',' delimiter",
    b'{"a": ' + b"[" * 50_000: "nested too deeply",
    b'{"a": '
    + b"9" * 5000
    + b"}": "not JSON: Exceeds the limit (4300 digits) for integer string conversion: "
    "value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit",
    b'{"a": "\xed\xa0\x80"}': "not UTF-8 at byte 8 of the line",
    b'{"a": 1} {"a": 2}': "not JSON at column 10: Extra data",
}


@pytest.mark.parametrize(("line", "reason"), ODD_LINES.items(), ids=range(len(ODD_LINES)))
def test_odd_lines_spoil_themselves_only(tmp_path: Path, line: bytes, reason: str) -> None:
    found = stored(tmp_path / "x", LINES + b"\n" + line + b"\n" + LINES)
    records = list(records_of(found))
    assert bad(records) == [(f"{found.uri}:line 101", reason)]
    assert good(records) == ROWS * 2


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    found = stored(
        tmp_path / "x", b'{"prompt": NaN, "completion": "a"}\n{"prompt": -1e999, "completion": "a"}\n'
    )
    values = good(list(records_of(found)))
    assert math.isnan(values[0]["prompt"])
    assert math.isinf(values[1]["prompt"])


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "x.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b" \r\n\t\n", b"\xef\xbb\xbf\n", b"\n" * 5000])
def test_nothing_but_blanks(tmp_path: Path, name: str, content: bytes) -> None:
    packed = gzip.compress(content) if name.endswith("gz") else content
    assert list(records_of(stored(tmp_path / name, packed))) == []


def test_files_of_different_shapes_in_one_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"text": "c"}\n')
    (tmp_path / "b.csv").write_bytes(b"question;answer\nd;e\n")
    parquet.write_table(pa.table({"text": ["f"], "id": [1]}), tmp_path / "c.parquet")
    (tmp_path / "d.json").write_bytes(b'{"Definition": "g", "Instances": [{"input": "h", "output": ["i"]}]}')
    (tmp_path / "e").write_bytes(b"")
    found = list_objects(DataSpec(sources=(SourceSpec(uri=str(tmp_path)),)))
    assert [value for each in found for value in good(list(records_of(each)))] == [
        {"prompt": "a", "completion": "b"},
        {"text": "c"},
        {"question": "d", "answer": "e"},
        {"text": "f", "id": 1},
        {"instruction": "g", "input": "h", "output": ["i"]},
    ]


# ---- huge lines

HUGE_BYTES = 100 << 20
HUGE = b'{"a": "' + b"x" * HUGE_BYTES + b'"}\n'


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, 1)


@pytest.mark.parametrize(
    ("content", "position", "reason", "limit_bytes"),
    [
        pytest.param(
            lambda: b'{"a": 1}\n' + HUGE + b'{"a": 2}\n',
            "line 2",
            "line of more than 16 MiB",
            48 << 20,
            id="jsonl",
        ),
        pytest.param(
            lambda: b'{"a": 1}\n' * 200_000 + HUGE + b'{"a": 2}\n',
            "byte 1800000",
            "line of more than 16 MiB",
            48 << 20,
            id="jsonl, not in the first window",
        ),
        pytest.param(
            lambda: gzipped(b'{"a": 1}\n' + HUGE + b'{"a": 2}\n'),
            "line 2",
            "line of more than 16 MiB",
            48 << 20,
            id="gzip",
        ),
        # A csv reader keeps four bytes of each character.
        pytest.param(
            lambda: b"a,b\n1,1\n" + b'1,"' + b"x" * HUGE_BYTES + b'"\n2,2\n',
            "line 3",
            "record of more than 16 MiB",
            256 << 20,
            id="csv",
        ),
        pytest.param(
            lambda: gzipped(b'a,b\n1,1\n1,"open\n' + (b"x" * 999 + b"\n") * 20_000 + b"2,2\n"),
            "line 3",
            "record of more than 16 MiB",
            256 << 20,
            id="csv whose quote is never closed",
        ),
    ],
)
def test_a_huge_record_is_passed_over_in_little_memory(
    tmp_path: Path, content: Callable[[], bytes], position: str, reason: str, limit_bytes: int
) -> None:
    found = stored(tmp_path / "x", content())
    tracemalloc.start()
    try:
        first = last = None
        huge = []
        for record in records_of(found):
            if isinstance(record, RawRecord):
                first, last = first or record.value, record.value
            elif record.reason == reason:
                huge.append(record)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [(record.position, len(record.record)) for record in huge] == [(position, 2000)]
    assert [str(next(iter(value.values()))) for value in (first, last) if value is not None] == ["1", "2"]
    assert peak_bytes < limit_bytes


@pytest.mark.usefixtures("small_windows")
def test_a_quote_that_is_never_closed_spoils_no_more_than_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 1000)
    rows = b"".join(b"q%d,a%d\n" % (n, n) for n in range(2000))
    found = stored(tmp_path / "x", b"q,a\n" + rows[:5000] + b'\n"open,x\n' + rows[5000:])
    records = list(records_of(found))
    assert [reason for _, reason in bad(records)][-1] == "record of more than 0.000953674 MiB"
    assert len(good(records)) > 1700
    assert good(records)[-1] == {"q": "q1999", "a": "a1999"}


# ---- csv


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.usefixtures("small_windows")
def test_csv_line_ends(tmp_path: Path, end: str) -> None:
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(ROWS[0]), lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(ROWS)
    found = stored(tmp_path / "x", b"\xef\xbb\xbf" + lines.getvalue().encode())
    assert len(divide(found, 0, "csv", None)) > 2
    assert good(list(records_of(found, "csv"))) == ROWS


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"q,\xff\n", "the header is not UTF-8 at byte 3; save it as UTF-8"),
        (b"\n\n\xefq,a\n", "the header is not UTF-8 at byte 3; save it as UTF-8"),
        (b"q,q\n", "the header names a column twice: q, q"),
        (b"q,a" + b"x" * 100, "the header has more than 50 bytes; is it csv?"),
    ],
)
@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("rows", [b"1,2\n", b"1,2\n" * 1000])
def test_headers_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: bytes, problem: str, rows: bytes
) -> None:
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 50)
    found = stored(tmp_path / "x", header + rows)
    with pytest.raises(DataError) as raised:
        list(records_of(found, "csv"))
    assert str(raised.value) == f"{found.uri}: {problem}"


# ---- parquet and arrow


def as_parquet(count: int, rows_per_group: int = 1000) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": [f"{n * 7919 % 10_007}" for n in range(count)]})
    parquet.write_table(table, sink, row_group_size=rows_per_group)
    return sink.getvalue()


def footer_of(content: bytes) -> bytes:
    return content[-8 - int.from_bytes(content[-8:-4], "little") :]


WHOLE = as_parquet(5000)
BROKEN_PARQUET = {
    "cut off": WHOLE[:-100],
    "nothing but the beginning": b"PAR1" + b"\0" * 2000,
    "the footer of a larger file": WHOLE[: -len(footer_of(WHOLE))] + footer_of(as_parquet(50_000)),
    "bytes missing in the middle": WHOLE[:1000] + WHOLE[3000:],
    "a footer that is said to be larger than the file": WHOLE[:-8] + b"\xff\xff\xff\x7fPAR1",
}


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("content", BROKEN_PARQUET.values(), ids=list(BROKEN_PARQUET))
def test_parquet_that_is_none_or_lies(tmp_path: Path, content: bytes) -> None:
    found = stored(tmp_path / "x.parquet", content)
    with pytest.raises(DataError) as raised:
        list(records_of(found))
    assert str(raised.value).startswith(f"{found.uri}: not a whole parquet file (")
    assert str(raised.value).endswith("); write it again")


def texts_of_bytes(values: list[bytes]) -> pa.Array:
    array = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(array), *array.buffers()[1:])


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_columns_that_are_not_utf8_spoil_their_rows(tmp_path: Path, format: str) -> None:
    table = pa.table({"text": texts_of_bytes([b"a", b"\xff", b"b"]), "n": [1, 2, 3]})
    sink = io.BytesIO()
    if format == "parquet":
        parquet.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    found = stored(tmp_path / "x", sink.getvalue())
    records = list(records_of(found))
    assert good(records) == [{"text": "a", "n": 1}, {"text": "b", "n": 3}]
    assert bad(records) == [(f"{found.uri}:record 2", "not UTF-8")]


def test_dates_beyond_the_calendar_spoil_their_rows(tmp_path: Path) -> None:
    table = pa.table({"when": pa.array([0, 1 << 62], pa.timestamp("s")), "n": [1, 2]})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    found = stored(tmp_path / "x", sink.getvalue())
    records = list(records_of(found))
    assert [value["n"] for value in good(records)] == [1]
    ((place, reason),) = bad(records)
    assert (place, reason.partition(":")[0]) == (f"{found.uri}:record 2", "not readable")


def as_arrow(new: Callable[[Any, pa.Schema], Any]) -> bytes:
    table = pa.table({"m": [[{"role": "user", "content": "x" * n}] for n in range(40)], "text": ["é"] * 40})
    sink = io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return sink.getvalue()


@pytest.mark.parametrize(
    "content",
    [as_parquet(40, 10), as_arrow(pa.ipc.new_file), as_arrow(pa.ipc.new_stream)],
    ids=["p", "f", "s"],
)
def test_any_flipped_bit_gives_rows_or_a_data_error(content: bytes) -> None:
    """Arrow itself follows damaged offsets out of the memory."""
    draw = random.Random(0)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(content)
        damaged[draw.randrange(8, len(content))] ^= 1 << draw.randrange(8)
        try:
            records = list(read_records(io.BytesIO(damaged), "x"))
            outcomes.add(all(isinstance(record, RawRecord | BadRecord) for record in records))
        except DataError as error:
            outcomes.add(str(error).partition(" (")[0])
    assert {True} < outcomes
    assert False not in outcomes
