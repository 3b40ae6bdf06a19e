"""Objects divided into windows: every record exactly once, however small the windows are."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from raytune_ft.data import borders, index, text
from raytune_ft.data.documents import document_ranges, part_context, read_document_part
from raytune_ft.data.formats import BadRecord, RawRecord, read_records, read_window
from raytune_ft.data.index import divide
from raytune_ft.data.sources import DataObject, list_objects
from raytune_ft.data.windows import WINDOW_BYTES, Window, byte_ranges, group
from raytune_ft.errors import DataError, StorageDenied, StorageError, StorageFull
from raytune_ft.spec import DataSpec, SourceSpec
from raytune_ft.storage import FolderStorage, open_storage

ROWS = [
    {"instruction": f"Größe {n}?", "input": "a\nb" * (n % 7), "output": 'say "x", y\\'} for n in range(200)
]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WINDOW_BYTES", 1000)
    monkeypatch.setattr(index, "SCAN_BYTES", 2000)


def listed(path: Path) -> DataObject:
    (found,) = list_objects(DataSpec(sources=(SourceSpec(uri=str(path)),)))
    return found


def stored(path: Path, content: bytes) -> DataObject:
    path.write_bytes(content)
    return listed(path)


def read_all(found: DataObject, windows: Sequence[Window]) -> list[RawRecord | BadRecord]:
    return [record for window in windows for record in read_window(found, window)]


def what(records: Sequence[RawRecord | BadRecord]) -> list[Any]:
    """The records without their positions."""
    return [
        record.value if isinstance(record, RawRecord) else (record.reason, record.record)
        for record in records
    ]


def whole(content: bytes, format: str = "auto") -> list[Any]:
    return what(list(read_records(io.BytesIO(content), "x", format)))


def as_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue().encode()


def as_parquet(rows: Sequence[dict[str, Any]], rows_per_group: int) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink, row_group_size=rows_per_group)
    return sink.getvalue()


def as_arrow(rows: Sequence[dict[str, Any]], rows_per_batch: int) -> bytes:
    table = pa.Table.from_pylist(list(rows))
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return sink.getvalue()


TASK = {"Definition": ["Do", "it."], "Categories": ["x, y", [1]], "Instances": ROWS, "URL": ["z"]}
DIVIDED = {
    "jsonl": ("\n".join(map(json.dumps, ROWS)).encode(), "bytes"),
    "jsonl, CRLF, BOM": (b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ROWS)).encode() + b"\r\n", "bytes"),
    "array": (json.dumps(ROWS).encode(), "bytes"),
    "array, indented": (json.dumps(ROWS, indent=1, ensure_ascii=False).encode(), "bytes"),
    "examples": (json.dumps({"canary": {"a": [1, 2]}, "examples": ROWS, "n": 3}).encode(), "bytes"),
    "task": (json.dumps(TASK, indent=4).encode(), "bytes"),
    "csv": (as_csv(ROWS), "bytes"),
    "parquet": (as_parquet(ROWS, 10), "row_groups"),
    "arrow": (as_arrow(ROWS, 10), "batches"),
}


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(("content", "unit"), DIVIDED.values(), ids=list(DIVIDED))
def test_windows_have_each_record_once(tmp_path: Path, content: bytes, unit: str) -> None:
    found = stored(tmp_path / "x", content)
    windows = divide(found, 3, "auto", None)
    assert what(read_all(found, windows)) == whole(content)
    assert len(windows) > 4
    assert {(window.object, window.source, window.unit) for window in windows} == {(3, 0, unit)}
    assert [window.part for window in windows] == list(range(len(windows)))
    assert all(one.stop <= other.start for one, other in pairwise(windows))
    if unit == "bytes":
        assert all(window.size_bytes == window.stop - window.start for window in windows)


UNDIVIDED = {
    "gzip": gzip.compress(DIVIDED["jsonl"][0], 0),
    "by id": json.dumps({str(at): row for at, row in enumerate(ROWS)}).encode(),
    "examples by id": json.dumps({"examples": dict(enumerate(ROWS))}).encode(),
    "one object": json.dumps({"a": 1, "b": ROWS}).encode(),
}


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("content", UNDIVIDED.values(), ids=list(UNDIVIDED))
def test_what_cannot_be_divided_is_one_window(tmp_path: Path, content: bytes) -> None:
    found = stored(tmp_path / "x", content)
    (window,) = divide(found, 0, "auto", None)
    assert (window.unit, window.start, window.stop, window.size_bytes) == (
        "object",
        0,
        len(content),
        len(content),
    )
    assert what(read_all(found, [window])) == whole(content)


@pytest.mark.usefixtures("small_windows")
def test_csv_and_documents_are_not_scanned_below_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "SCAN_BYTES", 1 << 20)
    for name in ("csv", "array"):
        (window,) = divide(stored(tmp_path / name, DIVIDED[name][0]), 0, "auto", None)
        assert window.unit == "object"


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.json"])
def test_an_empty_object_is_one_window_without_records(tmp_path: Path, name: str) -> None:
    found = stored(tmp_path / name, b"")
    (window,) = divide(found, 0, "auto", None)
    assert window.size_bytes == 0
    assert read_all(found, [window]) == []


@pytest.mark.usefixtures("small_windows")
def test_blank_objects_and_columnar_files_without_rows(tmp_path: Path) -> None:
    blank = stored(tmp_path / "blank", b" \n" * 2000)
    assert read_all(blank, divide(blank, 0, "auto", None)) == []
    for name, content in (("p", as_parquet(ROWS, 10)), ("a", as_arrow(ROWS, 10))):
        rows = (
            parquet.read_table(io.BytesIO(content)) if name == "p" else pa.ipc.open_file(content).read_all()
        )
        # A comment makes the file so large that its footer is looked at.
        none = rows.slice(0, 0).replace_schema_metadata({"comment": "x" * 4000})
        sink = io.BytesIO()
        if name == "p":
            parquet.write_table(none, sink)
        else:
            with pa.ipc.new_file(sink, none.schema):
                pass
        found = stored(tmp_path / name, sink.getvalue())
        (window,) = divide(found, 0, "auto", None)
        assert window.unit == ("row_groups" if name == "p" else "batches")
        assert read_all(found, [window]) == []


@pytest.mark.usefixtures("small_windows")
def test_positions_are_those_of_the_object(tmp_path: Path) -> None:
    lines = stored(tmp_path / "lines", DIVIDED["jsonl"][0])
    first, second, *_ = divide(lines, 0, "auto", None)
    assert next(iter(read_window(lines, first))).position == "line 1"
    line = next(iter(read_window(lines, second)))
    offset = int(line.position.removeprefix("byte "))
    assert json.loads(DIVIDED["jsonl"][0][offset:].split(b"\n")[0]) == line.value  # type: ignore[union-attr]
    rows = stored(tmp_path / "rows", DIVIDED["csv"][0])
    first, second, *_ = divide(rows, 0, "auto", None)
    assert next(iter(read_window(rows, first))).position == "line 2"
    assert next(iter(read_window(rows, second))).position == f"byte {second.start}"
    for name in ("array", "task", "parquet"):
        found = stored(tmp_path / name, DIVIDED[name][0])
        records = read_all(found, divide(found, 0, "auto", None))
        assert [record.position for record in records] == [f"record {n}" for n in range(1, 201)]
    batches = stored(tmp_path / "batches", DIVIDED["arrow"][0])
    records = read_all(batches, divide(batches, 0, "auto", None))
    assert (records[0].position, records[199].position) == ("record 1", "batch 20, record 10")


def test_two_requests_read_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = as_parquet([{"text": f"{n} {n * n}"} for n in range(400_000)], 50_000)
    found = stored(tmp_path / "x", content)
    asked: list[int] = []
    opened = FolderStorage.open

    def note(self: FolderStorage, key: str, start: int = 0, stop: int | None = None, **more: Any) -> Any:
        assert stop is not None
        asked.append(stop - start)
        return opened(self, key, start, stop, **more)

    monkeypatch.setattr(FolderStorage, "open", note)
    windows = divide(found, 0, "auto", None)
    assert len(windows) > 2
    # The head by which the format is found, and the footer.
    assert asked == [1 << 20, 64 << 10]
    asked.clear()
    assert len(read_all(found, windows[1:2])) % 50_000 == 0
    assert len(asked) == 2
    assert sum(asked) < windows[1].size_bytes + (80 << 10)


def as_stream(*batches: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


@pytest.mark.usefixtures("small_windows")
def test_arrow_stream_that_is_too_large_to_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger data sets that the `datasets` library saved are streams of up to 500 MB."""
    batches = pa.Table.from_pylist(ROWS).to_batches(10)
    content = as_stream(*batches)
    found = stored(tmp_path / "x", content)
    (held,) = divide(found, 0, "auto", None)
    assert (held.unit, what(read_all(found, [held]))) == ("object", ROWS)
    monkeypatch.setattr(index, "WHOLE_LIMIT_BYTES", len(content) - 1)
    windows = divide(found, 0, "auto", None)
    assert len(windows) > 4
    assert all(one.stop == other.start for one, other in pairwise(windows))
    records = read_all(found, windows)
    assert what(records) == ROWS
    places = [record.position for record in records if isinstance(record, RawRecord)]
    assert places == [f"record {number}" for number in range(1, 201)]
    with pytest.raises(DataError, match=r"not a whole arrow file \(.+\); write it again"):
        divide(stored(tmp_path / "y", content[: len(content) // 2] + b"x" * len(content)), 0, "auto", None)


def test_too_large_to_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WINDOW_BYTES", 1000)
    monkeypatch.setattr(index, "SCAN_BYTES", 1000)
    monkeypatch.setattr(index, "WHOLE_LIMIT_BYTES", 3000)
    limit = "and the limit is 3,000"
    remedy = "write it as jsonl without gzip, as parquet in small row groups, or in several files"
    long = pa.record_batch({"text": ["x" * 5000]})
    shared = pa.record_batch({"text": pa.array(["x" * 5000, "y"]).dictionary_encode()})
    cases = [
        ("gzip cannot be divided", UNDIVIDED["gzip"]),
        ("its json is no list of records", UNDIVIDED["by id"]),
        ("one of its records cannot be divided", json.dumps([{"a": "x" * 4000}, 1]).encode()),
        (
            "row group 0 cannot be divided",
            as_parquet([{"a": str(n * 7919 % 10_007)} for n in range(3000)], 3000),
        ),
        ("a record batch cannot be divided", as_arrow(ROWS, 1000)),
        ("a record batch cannot be divided", as_stream(long)),
        ("its batches share dictionaries", as_stream(shared)),
    ]
    for reason, content in cases:
        found = stored(tmp_path / "x", content)
        with pytest.raises(DataError) as raised:
            divide(found, 0, "auto", None)
        assert str(raised.value).startswith(f"{found.uri}: {reason}, so ")
        assert str(raised.value).endswith(f" bytes would be held in memory at once, {limit}; {remedy}")


@pytest.mark.usefixtures("small_windows")
def test_documents_that_are_lines_after_all(tmp_path: Path) -> None:
    """The first line is longer than what is looked at to find the format."""
    lines = [{"a": "x" * (2 << 20)}, *ROWS]
    content = "\n".join(map(json.dumps, lines)).encode()
    found = stored(tmp_path / "x", content)
    windows = divide(found, 0, "auto", None)
    assert (windows[0].format, len(windows) > 100) == ("jsonl", True)
    assert what(read_all(found, windows)) == lines


@pytest.mark.usefixtures("small_windows")
def test_lines_whose_first_is_broken_and_that_are_too_large_to_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"a": \n' + DIVIDED["jsonl"][0]
    found = stored(tmp_path / "x", content)
    monkeypatch.setattr(index, "WHOLE_LIMIT_BYTES", 3000)
    windows = divide(found, 0, "auto", None)
    assert len(windows) > 4
    assert what(read_all(found, windows)) == whole(content)


@pytest.mark.usefixtures("small_windows")
def test_one_malformed_record_of_a_divided_document(tmp_path: Path) -> None:
    parts = [json.dumps(row).encode() for row in ROWS]
    parts[100] = b'{"a": nothing}'
    parts[150] = b'{"a": "\xff"}'
    found = stored(tmp_path / "x", b"[" + b",\n".join(parts) + b"]")
    records = read_all(found, divide(found, 0, "auto", None))
    bad = [(r.position, r.reason) for r in records if isinstance(r, BadRecord)]
    assert bad == [
        ("record 101", "not JSON at column 7: Expecting value"),
        ("record 151", "not UTF-8 at byte 8 of the line"),
    ]
    assert len(records) == 200


class CountingStorage(FolderStorage):
    """A folder that notes what is written."""

    written: list[str]

    def write(self, key: str, data: bytes | Path) -> None:
        self.written.append(key)
        super().write(key, data)


@pytest.fixture
def cache(tmp_path: Path) -> CountingStorage:
    storage = CountingStorage(tmp_path / "cache")
    object.__setattr__(storage, "written", [])
    return storage


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("name", ["csv", "task", "array"])
def test_a_scan_is_kept(
    tmp_path: Path, cache: CountingStorage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content = DIVIDED[name][0]
    found = stored(tmp_path / "x", content)
    windows = divide(found, 0, "auto", cache)
    assert windows == divide(found, 0, "auto", None)
    (kept,) = cache.list()
    assert kept.key.startswith("index/")
    with monkeypatch.context() as patch:
        patch.setattr(index, "_scan", None)
        assert divide(found, 0, "auto", cache) == windows
    changed = stored(tmp_path / "x", content + b"\n")
    assert changed.etag != found.etag
    divide(changed, 0, "auto", cache)
    assert len(list(cache.list())) == 2


@pytest.mark.usefixtures("small_windows")
@given(data=st.data())
def test_a_damaged_scan_is_made_again(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    found = stored(folder / "x", DIVIDED["csv"][0])
    cache = open_storage(str(folder / "cache"))
    windows = divide(found, 0, "auto", cache)
    ((key, kept),) = [(each.key, cache.read(each.key)) for each in cache.list()]
    at = data.draw(st.integers(0, len(kept) - 1))
    damaged = data.draw(
        st.sampled_from([kept[:at], kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :], b"", b"{}\n" + kept])
    )
    cache.write(key, damaged)
    assert divide(found, 0, "auto", cache) == windows
    assert cache.read(key) == kept


class RefusingStorage(FolderStorage):
    """A folder that neither gives nor takes."""

    refusal: type[StorageError]

    def write(self, key: str, data: bytes | Path) -> None:
        raise self.refusal(f"{self.uri}/{key}: {type(data).__name__} refused")

    def read_or_none(self, key: str) -> bytes | None:
        raise StorageDenied(f"{self.uri}/{key}: denied")


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("refusal", [StorageDenied, StorageFull])
def test_a_cache_that_cannot_be_used(tmp_path: Path, refusal: type[StorageError]) -> None:
    cache = RefusingStorage(tmp_path / "cache")
    object.__setattr__(cache, "refusal", refusal)
    found = stored(tmp_path / "x", DIVIDED["csv"][0])
    assert divide(found, 0, "auto", cache) == divide(found, 0, "auto", None)


# ---- properties: content, blocks and windows of any size


@given(st.integers(0, 10_000), st.integers(1, 1000))
def test_byte_ranges_cover_all(size_bytes: int, window_bytes: int) -> None:
    ranges = byte_ranges(size_bytes, window_bytes)
    assert [ranges[0][0], *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), size_bytes]
    if len(ranges) > 1:
        assert all(window_bytes / 2 <= stop - start < 1.5 * window_bytes + 1 for start, stop in ranges)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 100))
def test_groups_cover_all(sizes: list[int], window_bytes: int) -> None:
    groups = group(sizes, window_bytes)
    assert [number for start, stop in groups for number in range(start, stop)] == list(range(len(sizes)))
    assert all(stop - start == 1 or sum(sizes[start:stop]) <= window_bytes for start, stop in groups)


def in_blocks(content: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """The content in blocks of these sizes, over and over."""
    at = number = 0
    while at < len(content):
        size_bytes = sizes[number % len(sizes)]
        yield content[at : at + size_bytes]
        at, number = at + size_bytes, number + 1


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
line_pieces = st.sampled_from(
    [b'{"a": 1}', b'{"b": "\xc3\xa9"}', b"\xff", b"{", b" ", b"", b"5", b'"' + b"x" * 50 + b'"', b"\r", b"\0"]
)
json_lines = st.lists(st.tuples(line_pieces, st.sampled_from([b"\n", b"\r\n", b"\n\n"])), max_size=20).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


@given(json_lines, st.binary(max_size=10), sizes, st.integers(1, 60), st.sampled_from([5, 20, 1 << 20]))
def test_lines_in_windows(
    content: bytes, end: bytes, blocks: list[int], window_bytes: int, limit: int
) -> None:
    content = b'{"first": 1}\n' + content + end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "MAX_LINE_BYTES", limit)
        expected = what(list(text.read_jsonl([content], "x")))
        got: list[RawRecord | BadRecord] = []
        for start, stop in byte_ranges(len(content), window_bytes):
            parts = in_blocks(content[max(start - 1, 0) :], blocks)
            begin, parts = text.from_next_line(parts, start - 1, stop) if start else (0, parts)
            got += text.read_jsonl(parts, "x", begin, stop, numbered=start == 0)
    assert what(got) == expected


@given(json_lines, sizes, st.integers(1, 60))
def test_windows_of_json_lines_in_a_folder(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, blocks: list[int], window_bytes: int
) -> None:
    content = b'{"first": 1}\n' + content
    found = stored(tmp_path_factory.mktemp("lines") / "x", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "WINDOW_BYTES", window_bytes)
        got = what(read_all(found, divide(found, 0, "jsonl", None)))
    assert got == whole(content, "jsonl")


csv_fields = st.one_of(
    st.text("ab, \"\n\r'é;", max_size=12).map(lambda field: '"' + field.replace('"', '""') + '"'),
    st.sampled_from(["", "a", '""', '5"', 'a"b"', '"x"y', '"', "é", " ", '"a\n', '"""']),
)
csv_rows = st.lists(
    st.tuples(
        st.lists(csv_fields, min_size=1, max_size=3).map(",".join),
        st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    ),
    max_size=25,
).map(lambda rows: "".join(row + end for row, end in rows).encode())


@given(
    csv_rows,
    st.sampled_from([b"", b"\xff,\xc3\n", b"1,2", b'"open']),
    sizes,
    st.integers(1, 80),
    st.sampled_from([15, 1 << 20]),
)
def test_csv_in_windows(rows: bytes, end: bytes, blocks: list[int], window_bytes: int, limit: int) -> None:
    header = b"q,a\n"
    content = header + rows + end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "MAX_LINE_BYTES", limit)
        expected = what(list(text.read_csv([content], "x")))
        ranges = borders.csv_ranges(in_blocks(content[len(header) :], blocks), len(header), ",", window_bytes)
        assert [ranges[0][0], *(stop for _, stop, _ in ranges)] == [
            *(start for start, _, _ in ranges),
            len(content),
        ]
        got: list[RawRecord | BadRecord] = []
        for start, stop, _ in ranges:
            got += text.read_csv_part(in_blocks(content[start:stop], blocks), "x", "q,a\n", start)
    assert what(got) == expected


@given(
    st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=20),
    st.integers(50, 200),
    st.integers(1, 80),
)
def test_proper_csv_is_divided_without_parsing(
    pairs: list[tuple[str, str]], block: int, window_bytes: int
) -> None:
    content = as_csv([{"q": q, "a": a} for q, a in pairs if (q + a).isprintable()] or [{"q": "1", "a": '"'}])
    _, _, rows = content.partition(b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(borders, "_parsed_csv_ends", None)
        ranges = borders.csv_ranges([rows], 0, ",", window_bytes)
    got = [
        r for start, stop, _ in ranges for r in text.read_csv_part([rows[start:stop]], "x", "q,a\r\n", start)
    ]
    assert what(got) == whole(content, "csv")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text('ab"\\[]{},: é\n', max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\,:', max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
documents = st.one_of(
    st.lists(json_values, max_size=12),
    st.builds(
        lambda records, other: {"o": other, "examples": records, "p": other},
        st.lists(json_values, max_size=8),
        json_values,
    ),
    st.builds(
        lambda records, other: {"Definition": [str(other)], "Instances": records, "examples": other},
        st.lists(json_values, max_size=8),
        json_values,
    ),
    st.dictionaries(st.sampled_from(["examples", "Definition", "Instances", "a"]), json_values, max_size=4),
)


@given(documents, sizes, st.integers(0, 60), st.sampled_from([None, 0, 3]), st.booleans())
def test_documents_in_windows(
    document: Any, blocks: list[int], window_bytes: int, indent: int | None, ascii: bool
) -> None:
    content = json.dumps(document, indent=indent, ensure_ascii=ascii).encode()
    structure = borders.json_structure(in_blocks(content, blocks), window_bytes)
    assert structure.kind == ("array" if isinstance(document, list) else "object")
    found = document_ranges(structure, io.BytesIO(content), only_tasks=False)
    if found is None:
        assert isinstance(document, dict)
        assert not isinstance(document.get("examples"), list)
        return
    ranges, definition = found
    got = [
        record
        for start, stop, before in ranges
        for record in read_document_part(content[start:stop], "x", part_context(before, definition))
    ]
    records = list(read_records(io.BytesIO(content), "x", "json"))
    assert what(got) == what(records)
    assert [record.position for record in got] == [record.position for record in records]


@given(st.lists(json_values, min_size=2, max_size=5), sizes)
def test_several_values_are_told_from_one(values: list[Any], blocks: list[int]) -> None:
    objects = [{"a": value} for value in values]
    content = "\n".join(map(json.dumps, objects)).encode()
    assert borders.json_structure(in_blocks(content, blocks), 1).kind == "several values"
    one = json.dumps(objects).encode()
    assert borders.json_structure(in_blocks(one + b" \n", blocks), 1).kind == "array"
    assert borders.json_structure(in_blocks(one[:-1], blocks), 1).kind == "incomplete"


@given(st.binary(max_size=200), sizes, st.integers(0, 20))
def test_any_bytes_have_some_structure(content: bytes, blocks: list[int], window_bytes: int) -> None:
    for start in (b"[", b"{", b'{"examples": [', b"{[1]: "):
        text = start + content
        structure = borders.json_structure(in_blocks(text, blocks), window_bytes)
        ranges, _ = document_ranges(structure, io.BytesIO(text), only_tasks=False) or ((), None)
        assert all(0 < begin <= end <= len(text) for begin, end, _ in ranges)


def test_lines_are_divided_by_size_alone(tmp_path: Path) -> None:
    content = b'{"a": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}\n' * 80_000
    found = stored(tmp_path / "x.jsonl", content)
    windows = divide(found, 0, "auto", None)
    assert [window.start for window in windows] == [n * WINDOW_BYTES for n in range(6)]
    assert windows[-1].stop == len(content)
    assert sum(1 for _ in read_all(found, windows)) == 80_000
