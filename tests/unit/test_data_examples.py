"""Windows to tokenised examples and reports, their file, and what the counts refuse. No Ray."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.data import examples as examples_module
from raytune_ft.data.checks import check_counts
from raytune_ft.data.counts import Counts, DataCounts, Survey, WindowReport, count_sources
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import SCHEMA, TokenisedWindow, decode, encode, tokenise_window
from raytune_ft.data.formats import BadRecord
from raytune_ft.data.index import divide
from raytune_ft.data.sources import list_objects
from raytune_ft.data.tokenise import answer_start
from raytune_ft.data.windows import Window
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec

TOKENIZER = tiny.tokenizer()
ENCODER = Encoder.of(TOKENIZER)
ANSWER = {"role": "assistant", "content": "z"}
GOOD = [{"instruction": f"say {n}", "output": [str(n), f"{n}."]} for n in range(40)]
MANY = GOOD * 3


def survey(data: DataSpec) -> tuple[list[dict[str, Any]], Survey]:
    """Rows of all windows, each with its source, and what was found."""
    rows: list[dict[str, Any]] = []
    windows: list[Window] = []
    reports: dict[int, WindowReport] = {}
    for number, found in enumerate(list_objects(data)):
        for window in divide(found, number, data.sources[found.source].format, None):
            tokenised = tokenise_window(found, window, data, ENCODER)
            assert tokenised.table.schema == SCHEMA
            rows += [{"source": found.source, **row} for row in tokenised.table.to_pylist()]
            reports[len(windows)] = tokenised.report
            windows.append(window)
    return rows, Survey(windows, reports)


def run(data: DataSpec) -> tuple[list[dict[str, Any]], list[WindowReport]]:
    """Rows and reports of all windows."""
    rows, found = survey(data)
    return rows, found.read()


def write(folder: Path, name: str, records: Sequence[Any]) -> str:
    path = folder / name
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def spec(*uris: str, **values: Any) -> DataSpec:
    return DataSpec.model_validate({"sources": [{"uri": uri} for uri in uris], **values})


def refused(data: DataSpec, quarantine: str | None = None) -> str:
    with pytest.raises(DataError) as raised:
        check_counts(survey(data)[1], data, quarantine)
    return str(raised.value)


def test_rows(tmp_path: Path) -> None:
    rows, (report,) = run(spec(write(tmp_path, "a.jsonl", GOOD)))
    assert [row["record"] for row in rows] == list(range(40))
    assert {row["source"] for row in rows} == {0}
    for row, record in zip(rows, GOOD, strict=True):
        start = answer_start(row["learned"])
        prompt = f"### Instruction:\n{record['instruction']}\n\n### Response:\n"
        assert TOKENIZER.decode(row["input_ids"][:start]) == prompt
        assert TOKENIZER.decode(row["input_ids"][start:]) == f"{record['output'][0]}</s>"
        assert row["references"] == record["output"]
    train = [row for row in rows if row["split"] == "train"]
    assert report.counts == Counts(
        records=40,
        train=len(train),
        validation=sum(row["split"] == "validation" for row in rows),
        test=sum(row["split"] == "test" for row in rows),
        tokens=sum(len(row["input_ids"]) for row in train),
        learned_tokens=sum(sum(row["learned"]) for row in train),
        answers=40,
        learned_answers=40,
        ends=40,
    )
    assert len(train) < 40
    assert report.end_ids == (TOKENIZER.eos_token_id,)
    assert report.templates == {"instruction": 40}


def test_equal_inputs_stand_on_one_side(tmp_path: Path) -> None:
    shapes: list[list[Any]] = [
        [{"prompt": f"say {n}", "completion": "x"} for n in range(100)],
        [{"instruction": f"say  {n}\n", "output": "y"} for n in range(100)],
        [{"messages": [{"role": "user", "content": f"say {n}"}, ANSWER]} for n in range(100)],
    ]
    uris = [write(tmp_path, f"{at}.jsonl", records) for at, records in enumerate(shapes)]
    rows, _ = run(spec(*uris, split={"validation": 0.3, "test": 0.3}))
    splits = [[row["split"] for row in rows if row["source"] == source] for source in range(3)]
    assert splits[0] == splits[1] == splits[2]
    assert set(splits[0]) == {"train", "validation", "test"}


def test_a_chat_stands_where_the_chats_that_it_begins_do(tmp_path: Path) -> None:
    """All answers are learned: a question of the test split must not be one's beginning in training."""
    chats = [
        [turn for said in range(turns) for turn in ({"role": "user", "content": f"ask {said} {n}"}, ANSWER)]
        for n in range(30)
        for turns in (1, 2, 3)
    ]
    uri = write(tmp_path, "a.jsonl", [{"messages": chat} for chat in chats])
    rows, _ = run(spec(uri, split={"validation": 0.3, "test": 0.3}))
    splits = [row["split"] for row in rows]
    assert splits[0::3] == splits[1::3] == splits[2::3]
    assert set(splits) == {"train", "validation", "test"}


def test_bad_records_keep_their_place_and_the_others_theirs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "b"}\n{"prompt": \n["x"]\n{"prompt": "c"}\n'
        b'{"prompt": "d", "completion": "e"}\n'
    )
    rows, (report,) = run(spec(str(path)))
    assert [row["record"] for row in rows] == [0, 4]
    assert [(bad.place, bad.reason.partition(":")[0]) for bad in report.bad] == [
        (f"{path}:line 2", "not JSON at column 12"),
        (f"{path}:line 3", "the record is a list, not an object with fields"),
        (f"{path}:line 4", "no completion"),
    ]
    assert (report.counts.records, report.counts.bad) == (5, 3)
    assert report.bad[1].record == '["x"]'


def test_half_a_character_outside_the_prompt(tmp_path: Path) -> None:
    """In a name or a column that no shape looks at, it reaches templates and messages."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        r'{"\ud800": "a"}' + "\n" + r'{"prompt": "p", "note": "\ud800", "completion": "c"}' + "\n",
        encoding="utf-8",
    )
    source = {"uri": str(path), "template": "{{ note }}"}
    rows, (report,) = run(DataSpec.model_validate({"sources": [source]}))
    assert rows == []
    assert [bad.reason.partition("; ")[0] for bad in report.bad] == [
        "no completion: none of completion, response, output, answer, target, continuation, messages, "
        r"conversations or text among its fields (\ud800)",
        r"template {{ note }}: 'utf-8' codec can't encode character '\ud800' in position 0: "
        "surrogates not allowed",
    ]
    for bad in report.bad:
        bad.reason.encode("utf-8")


def test_batches_of_a_long_window_continue_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = spec(write(tmp_path, "a.jsonl", GOOD))
    rows, (report,) = run(data)
    monkeypatch.setattr(examples_module, "_RECORDS_PER_BATCH", 7)
    again, (report_again,) = run(data)
    assert (rows, report) == (again, report_again)


def test_only_the_first_bad_records_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "KEPT_BAD_RECORDS", 3)
    _, (report,) = run(spec(write(tmp_path, "a.jsonl", [5] * 10)))
    assert (report.counts.bad, len(report.bad)) == (10, 3)


def test_long_examples_are_counted(tmp_path: Path) -> None:
    records = [{"prompt": "x" * 50 + str(n), "completion": "y"} for n in range(4)]
    uri = write(tmp_path, "a.jsonl", [*records, {"prompt": "a", "completion": "b"}])
    whole = {"split": {"validation": 0, "test": 0}, "max_tokens": 20}
    rows, (report,) = run(spec(uri, **whole))
    assert (report.counts.dropped, report.counts.cut, len(rows)) == (4, 0, 1)
    rows, (report,) = run(spec(uri, **whole, too_long="cut"))
    assert (report.counts.dropped, report.counts.cut, len(rows)) == (0, 4, 5)
    assert [len(row["input_ids"]) for row in rows] == [20, 20, 20, 20, 3]


def test_counts_as_json(tmp_path: Path) -> None:
    data = spec(write(tmp_path, "a.jsonl", GOOD), write(tmp_path, "b.jsonl", GOOD[:5]))
    counts = check_counts(survey(data)[1], data, None)
    found = counts.to_json()
    assert [source["uri"] for source in found["sources"]] == [source.uri for source in data.sources]
    assert [source["records"] for source in found["sources"]] == [40, 5]
    assert found["total"]["records"] == 45
    assert found["total"] == {
        name: found["sources"][0][name] + found["sources"][1][name]
        for name in found["total"]
        if name != "left_out"
    } | {"left_out": {}}
    assert isinstance(counts, DataCounts)
    assert (found["total"]["objects"], found["estimated"]) == (2, False)
    nothing = count_sources(Survey([], {}), data)
    assert nothing.total == Counts()


def test_empty_source(tmp_path: Path) -> None:
    uri = write(tmp_path, "a.jsonl", GOOD)
    empty = write(tmp_path, "empty.jsonl", [])
    assert refused(spec(uri, empty)) == f"data.sources[1].uri = {empty}: no records; the file is empty"
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in ("a.json", "b.json"):
        write(folder, name, [])
    assert refused(spec(str(folder))) == f"data.sources[0].uri = {folder}: no records; all 2 files are empty"


def test_too_many_bad_records(tmp_path: Path) -> None:
    uri = write(tmp_path, "a.jsonl", [*GOOD, 5, ["x"], {"prompt": "a", "completion": ""}, None])
    expected = (
        "data: 4 of 44 records are malformed (9.09%), and data.max_bad_fraction is 0.01; the first of them:\n"
        f"  {uri}:line 41: the record is a number, not an object with fields\n"
        f"  {uri}:line 42: the record is a list, not an object with fields\n"
        f"  {uri}:line 43: completion is empty"
    )
    assert refused(spec(uri)) == expected
    assert refused(spec(uri), "out/quarantine.jsonl") == f"{expected}\n  all are in out/quarantine.jsonl"
    data = spec(uri, max_bad_fraction=0.1)
    assert check_counts(survey(data)[1], data, None).total.bad == 4


def test_all_examples_too_long(tmp_path: Path) -> None:
    data = spec(write(tmp_path, "a.jsonl", GOOD), max_tokens=8)
    longest = max(len(row["input_ids"]) for row in run(spec(data.sources[0].uri))[0])
    assert refused(data) == (
        f"data: no training example is left: 40 of 40 records are longer than data.max_tokens = 8, "
        f"the longest has {longest} tokens; raise data.max_tokens, or set data.too_long: cut"
    )


def test_nothing_in_the_training_split(tmp_path: Path) -> None:
    rows, _ = run(spec(write(tmp_path, "a.jsonl", GOOD)))
    records = [record for record, row in zip(GOOD, rows, strict=True) if row["split"] == "test"]
    assert refused(spec(write(tmp_path, "b.jsonl", records))) == (
        f"data: no training example is left: of {len(records)} records 0 are malformed, 0 longer than "
        f"data.max_tokens = 512, 0 in the validation split and {len(records)} in the test split; "
        "give more data or a smaller data.split"
    )


def test_all_labels_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = write(tmp_path, "a.jsonl", [{"prompt": "a", "completion": "\u200b"}] * 3)
    # A normaliser that drops what it does not know, as those of some tokenizers do.
    from tokenizers import Tokenizer, normalizers

    core = Tokenizer.from_str(ENCODER.backend.to_str())
    core.normalizer = normalizers.Replace("\u200b", "")
    monkeypatch.setitem(globals(), "ENCODER", replace(ENCODER, backend=core, digest=None))
    assert refused(spec(uri)) == (
        "data: all labels are masked: none of the 3 records has a learned token; "
        "look at the completions, the template and the tokenizer with `raytune-ft data`"
    )


@pytest.mark.parametrize("window_bytes", [1, 60, 500, 4000])
def test_windows_hold_what_the_whole_object_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    data = spec(write(tmp_path, "a.jsonl", [*GOOD, ["bad"], *GOOD]), max_bad_fraction=0.5)
    whole, whole_survey = survey(data)
    monkeypatch.setattr("raytune_ft.data.index.WINDOW_BYTES", window_bytes)
    parts, parts_survey = survey(data)
    assert (len(parts_survey.windows) > 1) == (window_bytes < 4000)
    assert [_without_place(row) for row in parts] == [_without_place(row) for row in whole]
    assert check_counts(parts_survey, data, None) == check_counts(whole_survey, data, None)


def _without_place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "record"}


def test_records_that_say_they_are_the_same_are_all_kept(tmp_path: Path) -> None:
    records = [{"id": 7, "prompt": f"say {n % 2}", "completion": "x"} for n in range(4)]
    rows, (report,) = run(spec(write(tmp_path, "a.jsonl", records)))
    assert len(rows) == report.counts.records == 4
    assert rows[0]["input_ids"] == rows[2]["input_ids"] != rows[1]["input_ids"]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
examples = st.fixed_dictionaries(
    {
        "record": st.integers(0, 2**40),
        "split": st.sampled_from(["train", "validation", "test"]),
        "input_ids": st.lists(st.integers(0, 2**31 - 1), max_size=9),
        "references": st.lists(texts, max_size=3),
    }
)
reports = st.builds(
    WindowReport,
    st.builds(Counts, *[st.integers(0, 2**50)] * 9),
    st.lists(st.builds(BadRecord, texts, texts, texts, texts), max_size=3).map(tuple),
    st.dictionaries(texts, st.integers(0, 9), max_size=2),
    st.dictionaries(texts, st.integers(0, 9), max_size=2),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.integers(0, 9),
)


def tokenised(rows: list[dict[str, Any]], report: WindowReport) -> TokenisedWindow:
    learned = [{**row, "learned": [bool(token % 2) for token in row["input_ids"]]} for row in rows]
    return TokenisedWindow(pa.Table.from_pylist(learned, schema=SCHEMA), report)


@given(st.lists(examples, max_size=5), reports)
def test_file_gives_back_what_was_written(rows: list[dict[str, Any]], report: WindowReport) -> None:
    counts = replace(report.counts, train=sum(row["split"] == "train" for row in rows))
    window = tokenised(rows, replace(report, counts=counts))
    content = encode(window)
    assert decode(content) == decode(pa.py_buffer(content)) == window
    assert encode(decode(content)) == content


ROW = {"record": 1, "split": "train", "input_ids": list(range(300)), "references": ["a"]}
CONTENT = encode(tokenised([ROW] * 3, WindowReport(Counts(records=3, train=3), end_ids=(7,))))


@settings(max_examples=300)
@given(st.integers(0, len(CONTENT) - 1), st.integers(1, 255))
def test_a_changed_byte_is_seen_or_changes_nothing(at: int, change: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[at] ^= change
    try:
        found = decode(bytes(damaged))
    except ValueError:
        return
    assert found == decode(CONTENT)


@given(st.integers(0, len(CONTENT) - 1))
def test_a_cut_file_is_seen(length: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(CONTENT[:length])


def _file(table: pa.Table, batches: int = 1) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for _ in range(batches):
            writer.write_table(table)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    "content",
    [b"", b"ARROW1", b"x" * 1000, _file(pa.table({"a": [1]})), _file(decode(CONTENT).table)],
    ids=["empty", "magic", "junk", "another table", "no report"],
)
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a tokenised window"):
        decode(content)


@pytest.mark.parametrize(
    "changes",
    [{"input_ids": None}, {"input_ids": [5, -1]}, {"split": "test"}, {"references": None}],
    ids=["no tokens", "a negative token", "another count", "no references"],
)
def test_what_somebody_else_put_into_a_cache(changes: dict[str, Any]) -> None:
    row = {**ROW, "learned": [True] * 300, **changes}
    if changes.get("input_ids"):
        row["learned"] = [True] * 2
    table = pa.Table.from_pylist([row], schema=SCHEMA)
    content = encode(TokenisedWindow(table, WindowReport(Counts(records=1, train=1))))
    with pytest.raises(ValueError, match="its examples are not those that its report counts"):
        decode(content)


def sampled(data: DataSpec, windows: int) -> Survey:
    """A survey of the first of many windows that are alike."""
    _, found = survey(data)
    first = found.windows[0]
    alike = [replace(first, part=part, size_bytes=max(1, first.size_bytes)) for part in range(windows)]
    return Survey(alike, {0: found.reports[0]})


def test_a_sample_is_scaled_up_by_bytes(tmp_path: Path) -> None:
    data = spec(write(tmp_path, "a.jsonl", GOOD))
    whole = check_counts(survey(data)[1], data, None)
    counts = check_counts(sampled(data, 10), data, None)
    assert (counts.total.records, counts.total.train) == (400, 10 * whole.total.train)
    assert counts.objects == whole.objects == (1,)
    assert (counts.to_json()["estimated"], whole.to_json()["estimated"]) == (True, False)


@pytest.mark.parametrize("records", [[], [5], [*GOOD, 5]], ids=["none", "one bad", "few"])
def test_a_small_sample_refuses_nothing(tmp_path: Path, records: list[Any]) -> None:
    data = spec(write(tmp_path, "a.jsonl", records))
    assert check_counts(sampled(data, 10), data, None).estimated


@pytest.mark.parametrize(
    ("records", "values", "message"),
    [
        ([*MANY, 5, 5], {}, r"2 of 122 records in a sample of 1 of 10 windows are malformed \(1\.64%\)"),
        (MANY, {"max_tokens": 8}, r"120 of 120 records in a sample of 1 of 10 windows are longer than"),
        (
            MANY,
            {"split": {"validation": 0, "test": 0.99999}},
            r"of 120 records in a sample of 1 of 10 windows 0 are",
        ),
    ],
)
def test_messages_about_a_sample_say_so(
    tmp_path: Path, records: list[Any], values: dict[str, Any], message: str
) -> None:
    data = spec(write(tmp_path, "a.jsonl", records), **values)
    with pytest.raises(DataError, match=message):
        check_counts(sampled(data, 10), data, None)


def test_very_many_empty_files_beside_large_data(tmp_path: Path) -> None:
    data = spec(write(tmp_path, "large.jsonl", GOOD), str(tmp_path))
    large = [Window(0, 0, part, "bytes", part, part + 1, 1 << 20, "jsonl") for part in range(100)]
    empty = [Window(at, 1, 0, "bytes", 0, 0, 0, "jsonl") for at in range(1, 301)]
    read = {at: WindowReport(Counts(records=1, train=1)) for at in range(8)}
    read |= {at: WindowReport(Counts()) for at in range(100, 356)}
    with pytest.raises(DataError, match=r"data.sources\[1\].* no records; all 300 files are empty"):
        check_counts(Survey([*large, *empty], read), data, None)
