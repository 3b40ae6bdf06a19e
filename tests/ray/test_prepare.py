"""The data pass through a small local Ray."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny

from raytune_ft.cli.data import data_command
from raytune_ft.data.counts import check_counts
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import SCHEMA, tokenise_object
from raytune_ft.data.prepare import PreparedData, prepare
from raytune_ft.data.sources import list_objects
from raytune_ft.errors import DataError, StorageError
from raytune_ft.spec import JobSpec, parse_job

pytestmark = [
    pytest.mark.ray,
    # Ray Data copies its own context, and warns about fields of it.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context"),
]

TOKENIZER = tiny.tokenizer()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with warnings.catch_warnings():
        # Ray announces changes of its own defaults.
        warnings.simplefilter("ignore")
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
        )
    yield
    ray.shutdown()


def job(folder: Path, *sources: dict[str, Any], **data: Any) -> JobSpec:
    return parse_job(
        {
            "name": "prepare",
            "model": {"path": str(folder / "base")},
            "data": {"sources": list(sources), **data},
            "publish": {"catalog": str(folder / "catalog")},
        }
    )


def write(folder: Path, name: str, records: list[Any]) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def pairs(count: int, prompt: str = "say") -> list[dict[str, str]]:
    return [{"prompt": f"{prompt} {n}", "completion": str(n)} for n in range(count)]


def rows(prepared: PreparedData) -> list[dict[str, Any]]:
    return list(prepared.examples.take_all())


def test_pass_equals_reading_in_process(tmp_path: Path) -> None:
    for name in "cab":
        write(tmp_path, f"many/{name}.jsonl", [*pairs(50, name), "no record"])
    one = write(tmp_path, "one.json", pairs(2000, "one"))
    spec = job(
        tmp_path, {"uri": one}, {"uri": str(tmp_path / "many"), "template": "qa"}, max_bad_fraction=0.1
    )
    prepared = prepare(spec, tokenizer=TOKENIZER)
    expected: list[dict[str, Any]] = []
    reports = []
    for index, found in enumerate(list_objects(spec.data)):
        reading = tokenise_object(found, index, spec.data, Encoder.of(TOKENIZER))
        while True:
            try:
                expected += next(reading).to_pylist()
            except StopIteration as finished:
                reports.append(finished.value)
                break
    assert rows(prepared) == expected
    assert prepared.examples.schema().names == SCHEMA.names
    assert prepared.counts == check_counts(reports, spec.data, None)
    assert [bad.place for bad in prepared.bad] == [f"{tmp_path}/many/{name}.jsonl:line 51" for name in "abc"]
    assert prepared.end_ids == (TOKENIZER.eos_token_id,)
    assert prepared.templates == ("plain", "qa")
    assert [Path(found.uri).name for found in prepared.objects] == [
        "one.json",
        "a.jsonl",
        "b.jsonl",
        "c.jsonl",
    ]


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    first = prepare(job(tmp_path, {"uri": write(tmp_path, "a.jsonl", pairs(30))}), tokenizer=TOKENIZER)
    again = prepare(job(tmp_path, {"uri": write(tmp_path, "b.jsonl", pairs(30))}), tokenizer=TOKENIZER)
    other = prepare(job(tmp_path, {"uri": write(tmp_path, "c.jsonl", pairs(31))}), tokenizer=TOKENIZER)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_quarantine_file(tmp_path: Path) -> None:
    bad = [{"prompt": "x" * 3000}, ["é"]]
    spec = job(tmp_path, {"uri": write(tmp_path, "a.jsonl", [*pairs(10), *bad])}, max_bad_fraction=0.2)
    quarantine = tmp_path / "out" / "quarantine.jsonl"
    prepared = prepare(spec, quarantine, tokenizer=TOKENIZER)
    lines = [json.loads(line) for line in quarantine.read_text(encoding="utf-8").splitlines()]
    assert [line["position"] for line in lines] == ["line 11", "line 12"]
    assert {line["file"] for line in lines} == {str(tmp_path / "a.jsonl")}
    assert [line["reason"] for line in lines] == [record.reason for record in prepared.bad]
    assert len(lines[0]["record"]) == 2000
    assert lines[1]["record"] == '["é"]'


def test_too_many_bad_records_are_written_before_they_are_refused(tmp_path: Path) -> None:
    uri = write(tmp_path, "a.jsonl", [*pairs(10), 5])
    quarantine = tmp_path / "quarantine.jsonl"
    with pytest.raises(DataError) as raised:
        prepare(job(tmp_path, {"uri": uri}), quarantine, tokenizer=TOKENIZER)
    assert str(raised.value) == (
        "data: 1 of 11 records are malformed (9.09%), and data.max_bad_fraction is 0.01; the first of them:\n"
        f"  {uri}:line 11: the record is a number, not an object with fields\n"
        f"  all are in {quarantine}"
    )
    assert len(quarantine.read_text().splitlines()) == 1


def test_unreadable_file_reaches_the_driver_as_itself(tmp_path: Path) -> None:
    good = write(tmp_path, "good.jsonl", pairs(10))
    broken = tmp_path / "broken.json"
    broken.write_bytes(b'[{"prompt": "a", ')
    with pytest.raises(DataError) as raised:
        prepare(job(tmp_path, {"uri": good}, {"uri": str(broken)}), tokenizer=TOKENIZER)
    assert str(raised.value).startswith(f"{broken}: not JSON at line 1, column 18: ")
    assert type(raised.value) is DataError


def test_file_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = write(tmp_path, "a.jsonl", pairs(10))
    spec = job(tmp_path, {"uri": uri})
    objects = list_objects(spec.data)
    Path(uri).unlink()
    monkeypatch.setattr("raytune_ft.data.prepare.list_objects", lambda _: objects)
    with pytest.raises(StorageError, match="no such file"):
        prepare(spec, tokenizer=TOKENIZER)


def test_template_is_checked_before_the_pass(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such template"):
        prepare(job(tmp_path, {"uri": str(tmp_path / "missing"), "template": "alpaca"}), tokenizer=TOKENIZER)


def test_tokenizer_of_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pass and the command that shows the data agree on every count."""
    tiny.save_base(tmp_path / "base")
    spec = job(tmp_path, {"uri": write(tmp_path, "a.jsonl", pairs(30))})
    capsys.readouterr()
    prepared = prepare(spec)
    data_command(spec, examples=0, as_json=True)
    assert json.loads(capsys.readouterr().out)["counts"] == prepared.counts.to_json()
