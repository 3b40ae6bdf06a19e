"""One object to tokenised examples and a report, and what the counts refuse. No Ray."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from raytune_ft.data import examples as examples_module
from raytune_ft.data.counts import Counts, DataCounts, ObjectReport, check_counts, count_sources
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import NUMBERS_PER_OBJECT, SCHEMA, tokenise_object
from raytune_ft.data.sources import list_objects
from raytune_ft.data.tokenise import answer_start
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec

TOKENIZER = tiny.tokenizer()
ENCODER = Encoder.of(TOKENIZER)
ANSWER = {"role": "assistant", "content": "z"}
GOOD = [{"instruction": f"say {n}", "output": [str(n), f"{n}."]} for n in range(40)]


def run(data: DataSpec) -> tuple[list[dict[str, Any]], list[ObjectReport]]:
    """Rows and reports of all objects."""
    rows: list[dict[str, Any]] = []
    reports = []
    for index, found in enumerate(list_objects(data)):
        reading = tokenise_object(found, index, data, ENCODER)
        while True:
            try:
                table = next(reading)
            except StopIteration as finished:
                reports.append(finished.value)
                break
            assert table.schema == SCHEMA
            rows += table.to_pylist()
    return rows, reports


def write(folder: Path, name: str, records: Sequence[Any]) -> str:
    path = folder / name
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def spec(*uris: str, **values: Any) -> DataSpec:
    return DataSpec.model_validate({"sources": [{"uri": uri} for uri in uris], **values})


def refused(data: DataSpec, quarantine: str | None = None) -> str:
    with pytest.raises(DataError) as raised:
        check_counts(run(data)[1], data, quarantine)
    return str(raised.value)


def test_rows(tmp_path: Path) -> None:
    rows, (report,) = run(spec(write(tmp_path, "a.jsonl", GOOD)))
    assert [row["number"] for row in rows] == list(range(40))
    assert {row["source"] for row in rows} == {0}
    for row, record in zip(rows, GOOD, strict=True):
        start = answer_start(row["learned"])
        prompt = f"### Instruction:\n{record['instruction']}\n\n### Response:\n"
        assert TOKENIZER.decode(row["input_ids"][:start]) == prompt
        assert TOKENIZER.decode(row["input_ids"][start:]) == f"{record['output'][0]}</s>"
        assert row["references"] == record["output"]
    train = [row for row in rows if row["split"] == "train"]
    assert report.counts == Counts(
        objects=1,
        records=40,
        train=len(train),
        validation=sum(row["split"] == "validation" for row in rows),
        test=sum(row["split"] == "test" for row in rows),
        tokens=sum(len(row["input_ids"]) for row in train),
        learned_tokens=sum(sum(row["learned"]) for row in train),
    )
    assert len(train) < 40
    assert report.end_ids == {TOKENIZER.eos_token_id}
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


def test_numbers_sort_objects_of_a_source(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path, name, [{"prompt": name, "completion": "x"}, {"prompt": name, "completion": "y"}])
    rows, _ = run(spec(str(tmp_path)))
    assert [row["number"] for row in rows] == [0, 1, NUMBERS_PER_OBJECT, NUMBERS_PER_OBJECT + 1]


def test_bad_records_keep_their_place_and_the_others_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "b"}\n{"prompt": \n["x"]\n{"prompt": "c"}\n'
        b'{"prompt": "d", "completion": "e"}\n'
    )
    rows, (report,) = run(spec(str(path)))
    assert [row["number"] for row in rows] == [0, 4]
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


def test_tables_of_a_long_file_continue_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = spec(write(tmp_path, "a.jsonl", GOOD))
    rows, (report,) = run(data)
    monkeypatch.setattr(examples_module, "_RECORDS_PER_TABLE", 7)
    again, (report_again,) = run(data)
    assert (rows, report) == (again, report_again)


def test_only_the_first_bad_records_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "KEPT_BAD_RECORDS", 3)
    _, (report,) = run(spec(write(tmp_path, "a.jsonl", [5] * 10)))
    assert (report.counts.bad, len(report.bad)) == (10, 3)


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    data = spec(write(tmp_path, "a.jsonl", GOOD))
    _, (report,) = run(data)
    _, (moved,) = run(spec(write(tmp_path, "other.jsonl", GOOD)))
    changed = {
        run(other)[1][0].digest
        for other in (
            spec(write(tmp_path, "b.jsonl", GOOD[::-1])),
            spec(write(tmp_path, "c.jsonl", GOOD[1:])),
            spec(data.sources[0].uri, split={"validation": 0.4}),
            DataSpec.model_validate({"sources": [{"uri": data.sources[0].uri, "template": "plain"}]}),
        )
    }
    assert moved.digest == report.digest
    assert len(changed | {report.digest}) == 5


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
    counts = check_counts(run(data)[1], data, None)
    found = counts.to_json()
    assert [source["uri"] for source in found["sources"]] == [source.uri for source in data.sources]
    assert [source["records"] for source in found["sources"]] == [40, 5]
    assert found["total"]["records"] == 45
    assert found["total"] == {
        name: found["sources"][0][name] + found["sources"][1][name] for name in found["total"]
    }
    assert isinstance(counts, DataCounts)
    assert count_sources([], data).total == Counts()


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
    assert check_counts(run(data)[1], data, None).total.bad == 4


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
    monkeypatch.setitem(globals(), "ENCODER", Encoder(**{**vars(ENCODER), "backend": core}))
    assert refused(spec(uri)) == (
        "data: all labels are masked: none of the 3 records has a learned token; "
        "look at the completions, the template and the tokenizer with `raytune-ft data`"
    )
