"""Files to raw records: every format, found by content, and hostile bytes."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from raytune_ft.data.formats import BadRecord, RawRecord, read_records
from raytune_ft.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ROWS = [
    {"instruction": "Größe?", "input": "a\nb", "output": 'say "x", y'},
    {"instruction": "2", "input": "", "output": "z"},
]


class Trickle(io.RawIOBase):
    """A stream that gives a byte at a time and cannot seek, like a slow network."""

    def __init__(self, content: bytes) -> None:
        self._rest = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._rest.read(min(1, len(buffer)))
        buffer[: len(part)] = part
        return len(part)


def read(content: bytes, format: str = "auto") -> list[RawRecord | BadRecord]:
    return list(read_records(io.BytesIO(content), "x", format))


def values(content: bytes, format: str = "auto") -> list[Any]:
    records = read(content, format)
    assert [record for record in records if isinstance(record, BadRecord)] == []
    return [record.value for record in records if isinstance(record, RawRecord)]


def problems(content: bytes, format: str = "auto") -> list[tuple[str, str]]:
    return [(r.position, r.reason) for r in read(content, format) if isinstance(r, BadRecord)]


def as_csv(delimiter: str = ",", end: str = "\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=1)
    return sink.getvalue()


def as_arrow(new: Callable[[Any, pa.Schema], Any]) -> bytes:
    table = pa.Table.from_pylist(ROWS)
    sink = io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


BOM = b"\xef\xbb\xbf"
TEXTS = {
    "jsonl": "\n".join(json.dumps(row) for row in ROWS).encode(),
    "jsonl, CRLF, blank lines, BOM": b"\xef\xbb\xbf\r\n"
    + "\r\n\r\n".join(map(json.dumps, ROWS)).encode()
    + b"\r\n",
    "jsonl, two files with a BOM each": b"".join(BOM + json.dumps(row).encode() + b"\n" for row in ROWS),
    "json array": json.dumps(ROWS).encode(),
    "json array, a record per line": ("[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]").encode(),
    "json array, indented, BOM": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "json by id": json.dumps({str(at): row for at, row in enumerate(ROWS)}).encode(),
    "json by id, a record per line": ",\n".join(
        f'{bracket}"{at}": {json.dumps(row)}'
        for at, (bracket, row) in enumerate(zip(("{\n", ""), ROWS, strict=True))
    ).encode()
    + b"\n}",
    "examples by id": json.dumps(
        {"metadata": {"n": 2}, "examples": dict(enumerate(ROWS))}, indent=1
    ).encode(),
    "examples in a list": json.dumps({"canary": "x", "examples": ROWS}).encode(),
    "csv": as_csv(),
    "csv, CRLF": as_csv(end="\r\n"),
    "csv, BOM": b"\xef\xbb\xbf" + as_csv(),
    "csv, semicolons": as_csv(";"),
    "csv, tabs": as_csv("\t"),
}
BINARIES = {
    "parquet": as_parquet(),
    "arrow file": as_arrow(pa.ipc.new_file),
    "arrow stream": as_arrow(pa.ipc.new_stream),
}


@pytest.mark.parametrize("content", [*TEXTS.values(), *BINARIES.values()], ids=[*TEXTS, *BINARIES])
def test_format_is_found_by_content(content: bytes) -> None:
    assert values(content) == ROWS


@pytest.mark.parametrize("content", TEXTS.values(), ids=list(TEXTS))
def test_gzip_of_text(content: bytes) -> None:
    assert values(gzip.compress(content)) == ROWS


@pytest.mark.parametrize("content", [*TEXTS.values(), *BINARIES.values()], ids=[*TEXTS, *BINARIES])
def test_stream_in_single_bytes(content: bytes) -> None:
    stream: BinaryIO = Trickle(content)  # type: ignore[assignment]  # RawIOBase reads as a BinaryIO does
    assert [r.value for r in read_records(stream, "x") if isinstance(r, RawRecord)] == ROWS


def test_natural_instructions_put_the_definition_before_each_instance() -> None:
    task = {
        "Definition": ["Name the", "capital."],
        "Instances": [{"input": "Peru", "output": ["Lima", "LIMA"]}],
    }
    expected = [{"instruction": "Name the\ncapital.", "input": "Peru", "output": ["Lima", "LIMA"]}]
    assert values(json.dumps(task).encode()) == expected
    assert values(json.dumps(task).encode(), "natural-instructions") == expected


def test_positions_name_the_place() -> None:
    assert [r.position for r in read(b'\n{"a": 1}\n\n{"a": 2}\n')] == ["line 2", "line 4"]
    assert [r.position for r in read(b'[{"a": 1}, {"a": 2}]')] == ["record 1", "record 2"]
    assert [r.position for r in read(b'{"p\\"q": {"a": 1}, "r": {"a": 2}}')] == [
        'record "p\\"q"',
        'record "r"',
    ]
    assert [r.position for r in read(b'a,b\n1,"x\ny"\n3,4\n')] == ["line 2", "line 4"]
    assert [r.position for r in read(as_parquet())] == ["record 1", "record 2"]


@pytest.mark.parametrize(
    "content", [b"", b"\n \r\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0), b"[]", b"{}"]
)
def test_empty_files_have_no_records(content: bytes) -> None:
    assert read(content) == []


def test_lines_of_texts_and_numbers_are_records_too() -> None:
    assert values(b'"a"\n"b, c"\n') == ["a", "b, c"]
    assert values(b"5\n6\n") == [5, 6]


def test_one_object_is_one_record() -> None:
    assert values(b'{"prompt": "a", "completion": "b"}') == [{"prompt": "a", "completion": "b"}]


NESTED = {"question": {"stem": "2+2?"}, "answer": {"text": "4"}}
NESTED_ALIKE = {"q": {"text": "2+2?"}, "a": {"text": "4"}}
BY_ID = {"q1": {"prompt": "a", "completion": "b"}, "q2": {"prompt": "c", "completion": "d", "system": "e"}}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("value", "columns", "records"),
    [
        (NESTED, (), [NESTED]),
        (NESTED_ALIKE, ("q", "a"), [NESTED_ALIKE]),
        (NESTED_ALIKE, (), list(NESTED_ALIKE.values())),
        ({"stem": {"a": 1}, "choices": {"b": 2}}, (), [{"stem": {"a": 1}, "choices": {"b": 2}}]),
        ({"messages": {"0": {"role": "user"}}}, (), [{"messages": {"0": {"role": "user"}}}]),
        (BY_ID, ("prompt",), list(BY_ID.values())),
        ({"only": BY_ID["q1"]}, (), [BY_ID["q1"]]),
        ({**BY_ID, "q3": {}}, (), [*BY_ID.values(), {}]),
        ({str(at): {str(at): at} for at in range(65)}, (), [{str(at): at} for at in range(65)]),
    ],
)
def test_one_object_with_nested_ones_is_told_from_records_by_id(
    value: dict[str, Any], columns: tuple[str, ...], records: list[Any], indent: int | None
) -> None:
    content = io.BytesIO(json.dumps(value, indent=indent).encode())
    found = list(read_records(content, "x", columns=columns))
    assert [record.value for record in found if isinstance(record, RawRecord)] == records


def test_records_that_are_no_objects_are_given_as_they_are() -> None:
    assert values(b'{"a": 1}\n["x"]\n5\nnull\n') == [{"a": 1}, ["x"], 5, None]


def test_bad_lines_do_not_stop_a_file() -> None:
    content = b'{"a": 1}\n{"a": \n\xff\xfe{"a": 2}\n{"a": 3}\n' + b"[" * 100_000 + b'\n{"a": 4}\n'
    assert problems(content) == [
        ("line 2", "not JSON at column 7: Expecting value"),
        ("line 3", "not UTF-8 at byte 1 of the line"),
        ("line 5", "nested too deeply"),
    ]
    assert [r.value for r in read(content) if isinstance(r, RawRecord)] == [{"a": 1}, {"a": 3}, {"a": 4}]


@pytest.mark.parametrize("first", [b"garbage", b'{"a": ', b"\xff\xff"])
def test_json_lines_whose_first_line_is_broken(first: bytes) -> None:
    records = read(first + b'\n{"a": 1}\n{"a": 2}\n')
    assert [type(record) for record in records] == [BadRecord, RawRecord, RawRecord]


def test_first_line_longer_than_what_is_looked_at() -> None:
    lines = [{"a": "x" * 2_000_000}, {"a": "y"}]
    assert values("\n".join(map(json.dumps, lines)).encode()) == lines


def test_huge_number_spoils_its_line_only() -> None:
    (position, reason), *rest = problems(b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}\n")
    assert (position, rest) == ("line 2", [])
    assert reason.startswith("not JSON: Exceeds the limit")


def test_csv_rows_that_do_not_fit_the_header() -> None:
    content = b'q,a\n1,2\n1\n1,2,3\n"x"y,2\n\xff,2\n5,6\n"open'
    assert problems(content) == [
        ("line 3", "1 fields, and the header has 2"),
        ("line 4", "3 fields, and the header has 2"),
        ("line 5", "not CSV: ',' expected after '\"'"),
        ("line 6", "not UTF-8"),
        ("line 8", "not CSV: unexpected end of data"),
    ]
    assert [r.value for r in read(content) if isinstance(r, RawRecord)] == [
        {"q": "1", "a": "2"},
        {"q": "5", "a": "6"},
    ]


def test_csv_of_one_column_of_text() -> None:
    assert values(b'text\nhello\n"a, b"\n') == [{"text": "hello"}, {"text": "a, b"}]


def test_bad_record_is_kept_short_and_printable() -> None:
    (bad,) = read(b'{"a": 1}\n' + b"\xff" * 5000)[1:]
    assert isinstance(bad, BadRecord)
    assert bad.place == "x:line 2"
    assert bad.record.startswith("\\xff")
    assert len(bad.record) == 2000


UNKNOWN = "x: neither jsonl, json, csv, parquet or arrow; convert it, or set the source's format"
CUT_OFF = (
    "x: the gzip data is damaged or cut off "
    "(Compressed file ended before the end-of-stream marker was reached); write the file again"
)
UTF16 = "x: the text is UTF-16; save it as UTF-8, as iconv -f UTF-16 -t UTF-8 does"
POINTER = "x: a pointer of Git LFS, not the file itself; run git lfs pull in the clone"
NO_TASK = "x: no Definition with a list of Instances, and format is natural-instructions"


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        (b"hello world", "auto", UNKNOWN),
        (b"\x89PNG\r\n\x1a\n\0\0,", "auto", UNKNOWN),
        (b"a,\0b\n1,2\n", "auto", UNKNOWN),
        ('{"a": 1}'.encode("utf-16"), "auto", UTF16),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "auto", POINTER),
        (
            b'[{"a": 1}, {"a"',
            "auto",
            "x: not JSON at line 1, column 16: Expecting ':' delimiter; is it complete?",
        ),
        (
            b'[\n{"a": 1},\n{"a"',
            "auto",
            "x: not JSON at line 3, column 5: Expecting ':' delimiter; is it complete?",
        ),
        (b'[{"a": "\xff"}]', "auto", "x: not UTF-8 at byte 9; save it as UTF-8"),
        (b"[" * 100_000, "json", "x: JSON nested too deeply to read"),
        (b"q,q\n1,2\n", "auto", "x: the header names a column twice: q, q"),
        (b"[]", "natural-instructions", NO_TASK),
        (gzip.compress(b"a" * 1000, mtime=0)[:-9], "auto", CUT_OFF),
    ],
    ids=range(12),
)
def test_file_that_cannot_be_read_as_a_whole(content: bytes, format: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        read(content, format)
    assert str(raised.value) == message


NARROW = {
    "f32": pa.array([0.1, None, 1e-7, 3.0], pa.float32()),
    "f16": pa.array([np.float16(0.1), None, np.float16(6e-8), np.float16(3)], pa.float16()),
    "f64": pa.array([0.1, None, 1 / 3, 3.0], pa.float64()),
    "list": pa.array([[0.1, None], None, [], [2.5]], pa.list_(pa.float32())),
    "pair": pa.array([[0.1, 0.2], None, [0.3, 0.4], [1.0, 2.0]], pa.list_(pa.float32(), 2)),
    "struct": pa.array(
        [{"a": {"b": [{"c": 0.1, "d": None}]}, "e": "x"}, None, {"a": None, "e": None}, {"a": {}, "e": "y"}],
        pa.struct(
            [
                ("a", pa.struct([("b", pa.list_(pa.struct([("c", pa.float32()), ("d", pa.string())])))])),
                ("e", pa.string()),
            ]
        ),
    ),
}
NARROW_VALUES = [
    {"f32": 0.1, "f16": 0.1, "f64": 0.1, "list": [0.1, None], "pair": [0.1, 0.2]}
    | {"struct": {"a": {"b": [{"c": 0.1}]}, "e": "x"}},
    dict.fromkeys(NARROW),
    {"f32": 1e-7, "f16": 6e-8, "f64": 1 / 3, "list": [], "pair": [0.3, 0.4], "struct": {}},
    {"f32": 3.0, "f16": 3.0, "f64": 3.0, "list": [2.5], "pair": [1.0, 2.0], "struct": {"a": {}, "e": "y"}},
]


def in_format(table: pa.Table, format: str) -> bytes:
    sink = io.BytesIO()
    if format == "parquet":
        parquet.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_narrow_numbers_are_their_shortest_decimal_and_fillers_go(format: str) -> None:
    assert values(in_format(pa.table(NARROW), format)) == NARROW_VALUES


def test_messages_of_a_columnar_file_are_those_of_their_lines() -> None:
    """Arrow gives every message and every call's arguments the keys of all."""
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "say", "arguments": {"text": "x"}}}
    chats = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call, other]}]},
    ]
    table = pa.Table.from_pylist(chats)
    assert table.to_pylist() != chats
    assert values(in_format(table, "parquet")) == chats


def test_rows_without_columns_stay() -> None:
    batch = pa.record_batch({"a": [1, 2]}).select([])
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert values(sink.getvalue()) == [{}, {}]


@pytest.mark.parametrize("content", BINARIES.values(), ids=list(BINARIES))
def test_cut_off_columnar_files(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^x: not a whole (parquet|arrow) file \(.+\); write it again$"):
        read(content[: len(content) * 2 // 3])


@given(st.binary(max_size=300))
def test_any_bytes_give_records_or_a_data_error(content: bytes) -> None:
    for start in (b"", b'{"a": 1}\n', b"a,b\n", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"\x1f\x8b"):
        # Whatever else is raised fails the test.
        with suppress(DataError):
            assert all(isinstance(record, RawRecord | BadRecord) for record in read(start + content))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
rows = st.lists(
    st.dictionaries(st.text(max_size=5), json_values, min_size=1, max_size=3), min_size=2, max_size=5
)


@given(rows)
def test_json_lines_round_trip(records: list[dict[str, Any]]) -> None:
    assert values("\n".join(map(json.dumps, records)).encode()) == records


@given(rows, st.sampled_from([None, 2]))
def test_json_array_round_trip(records: list[dict[str, Any]], indent: int | None) -> None:
    assert values(json.dumps(records, indent=indent).encode()) == records


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), max_size=6))
def test_csv_round_trip(pairs: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(["q", "a"])
    try:
        writer.writerows(pairs)
        content = text.getvalue().encode()
    except UnicodeEncodeError:
        return
    assert values(content) == [{"q": q, "a": a} for q, a in pairs]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data sets at {SHARED}")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("instruct/alpaca_like/gsm8k_alpaca_head800.json", 800),
        ("instruct/aqua/dev.json", 254),
        ("instruct/disfl_qa/dev.json", 1000),
        ("instruct/dolly/litgpt_dolly_fixture.json", 12),
        ("instruct/gsm8k/train_head1500.jsonl", 1500),
        ("instruct/messages/tinker_conversations.jsonl", 128),
        ("instruct/prompt_completion/dolly_hhrlhf_head700.jsonl", 700),
        ("instruct/sharegpt/axolotl_conversation.json", 1),
        ("instruct/sharegpt/fastchat_dummy_conversation.json", 500),
        ("tasks/instruction_induction/induce/active_to_passive.json", 900),
        ("tasks/natural_instructions/task1146_country_capital.json", 231),
        ("tasks/mmlu_arrow/abstract_algebra/test/data-00000-of-00001.arrow", 100),
    ],
)
def test_real_files_have_their_records(name: str, count: int) -> None:
    assert len(values((SHARED / name).read_bytes())) == count
