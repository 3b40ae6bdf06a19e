"""What is known before training, through a small local Ray."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny

import raytune_ft.data.survey as survey_module
from raytune_ft.cli.data import data_command
from raytune_ft.data.checks import check_counts
from raytune_ft.data.counts import Survey
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import decode, tokenise_window
from raytune_ft.data.index import divide
from raytune_ft.data.order import window_order
from raytune_ft.data.prepare import PreparedData, prepare
from raytune_ft.data.sources import fingerprint, list_objects, list_sources
from raytune_ft.data.survey import surveyed
from raytune_ft.data.windows import Window
from raytune_ft.errors import DataError
from raytune_ft.spec import JobSpec, parse_job

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

TOKENIZER = tiny.tokenizer()


@pytest.fixture(autouse=True, params=[16, 0], ids=["read by this process", "read by tasks"])
def _read_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "_READ_HERE", request.param)


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
    """Examples of all windows that were read, in the order of the windows."""
    contents = [prepared.contents[number] for number in sorted(prepared.contents)]
    return [row for content in ray.get(contents) for row in decode(content).table.to_pylist()]


def test_survey_of_small_data_is_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytune_ft.data.index.WINDOW_BYTES", 20_000)
    for name in "cab":
        write(tmp_path, f"many/{name}.jsonl", [*pairs(50, name), "no record"])
    one = write(tmp_path, "one.jsonl", pairs(2000, "one"))
    spec = job(
        tmp_path, {"uri": one}, {"uri": str(tmp_path / "many"), "template": "qa"}, max_bad_fraction=0.1
    )
    prepared = prepare(spec, tokenizer=TOKENIZER)
    expected: list[dict[str, Any]] = []
    reports = {}
    windows: list[Window] = []
    for index, found in enumerate(list_objects(spec.data)):
        for window in divide(found, index, "auto", None):
            tokenised = tokenise_window(found, window, spec.data, Encoder.of(TOKENIZER))
            expected += tokenised.table.to_pylist()
            reports[len(windows)] = tokenised.report
            windows.append(window)
    assert rows(prepared) == expected
    assert prepared.windows == tuple(windows)
    assert len(windows) > 5
    assert prepared.reports == reports
    assert prepared.complete
    assert prepared.counts == check_counts(Survey(windows, reports), spec.data, None)
    assert prepared.examples == tuple(counts.train for counts in prepared.counts.sources)
    assert [bad.place for bad in prepared.bad] == [f"{tmp_path}/many/{name}.jsonl:line 51" for name in "abc"]
    assert prepared.end_ids == (TOKENIZER.eos_token_id,)
    assert prepared.templates == ("plain", "qa")
    assert [Path(found.uri).stem for found in prepared.objects] == ["one", "a", "b", "c"]
    assert prepared.fingerprint == fingerprint(prepared.objects)
    one_shape, many_shape = prepared.shapes
    assert one_shape.sizes == tuple(reports[number].counts.train for number in one_shape.windows)
    assert (sum(one_shape.sizes), sum(many_shape.sizes)) == prepared.examples
    assert one_shape.windows + many_shape.windows == tuple(range(len(windows)))


def test_survey_of_large_data_is_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytune_ft.data.index.WINDOW_BYTES", 2000)
    monkeypatch.setattr(survey_module, "SURVEY_BYTES", 10_000)
    monkeypatch.setattr(survey_module, "SAMPLE_BYTES", 16_000)
    large = write(tmp_path, "large.jsonl", pairs(4000, "large"))
    small = write(tmp_path, "small.jsonl", pairs(100, "small"))
    prepared = prepare(job(tmp_path, {"uri": large}, {"uri": small}), tokenizer=TOKENIZER)
    assert not prepared.complete
    assert prepared.counts.estimated
    assert prepared.contents.keys() == prepared.reports.keys()
    by_source = [sum(prepared.windows[n].source == at for n in prepared.reports) for at in (0, 1)]
    assert by_source == [4, sum(window.source for window in prepared.windows)]
    counts = prepared.counts.sources
    assert [found.records for found in counts] == [pytest.approx(4000, rel=0.1), pytest.approx(100, rel=0.1)]
    assert prepared.examples == tuple(found.train for found in counts)
    assert sum(prepared.shapes[0].sizes) == Path(large).stat().st_size
    # Any window can still be read.
    unread = next(number for number in range(len(prepared.windows)) if number not in prepared.reports)
    assert decode(prepared.reader.read(prepared.windows[unread])).table.num_rows > 10


def test_a_sample_has_some_of_each_source() -> None:
    def windows(source: int, count: int, size_bytes: int) -> list[Window]:
        return [
            Window(source, source, part, "bytes", part, part + 1, size_bytes, "jsonl")
            for part in range(count)
        ]

    whole = [*windows(0, 100, 512 << 10), *windows(1, 1, 5), *windows(2, 70, 512 << 10)]
    chosen = [whole[number].source for number in surveyed(whole, seed=3)]
    assert [chosen.count(source) for source in range(3)] == [3, 1, 3]
    assert surveyed(whole, seed=3) != surveyed(whole, seed=4)
    # They are those that training begins with.
    assert set(window_order(100, 3, 0, 0)[:3]) == {
        number for number in surveyed(whole, seed=3) if number < 100
    }
    empty_first = [*windows(0, 50, 0), *windows(0, 1, 100 << 20)]
    assert surveyed(empty_first, seed=0) == [50]
    many = [window for source in range(40) for window in windows(source, 3, 1 << 20)]
    assert [many[number].source for number in surveyed(many, seed=0)] == list(range(40))
    small_files = [*windows(0, 10_000, 200), *windows(1, 100, 1 << 20)]
    assert sum(small_files[number].source == 0 for number in surveyed(small_files, seed=0)) == 256


def test_many_objects_share_tasks(tmp_path: Path) -> None:
    for number in range(300):
        write(tmp_path, f"many/{number:03}.jsonl", pairs(2, f"file {number}"))
    prepared = prepare(job(tmp_path, {"uri": str(tmp_path / "many")}), tokenizer=TOKENIZER)
    assert [window.object for window in prepared.windows] == list(range(300))
    assert prepared.counts.total.records == 600
    assert prepared.counts.objects == (300,)


def test_an_unreadable_one_of_many_objects(tmp_path: Path) -> None:
    for number in range(100):
        write(tmp_path, f"many/{number:03}.jsonl", pairs(1))
    broken = tmp_path / "many" / "077.jsonl"
    broken.write_bytes(b"\xff\xfea")
    with pytest.raises(DataError) as raised:
        prepare(job(tmp_path, {"uri": str(tmp_path / "many")}), tokenizer=TOKENIZER)
    assert (
        str(raised.value)
        == f"{broken}: the text is UTF-16; save it as UTF-8, as iconv -f UTF-16 -t UTF-8 does"
    )


def test_contents_outlive_the_execution_and_the_files(tmp_path: Path) -> None:
    uri = write(tmp_path, "a.jsonl", pairs(30))
    prepared = prepare(job(tmp_path, {"uri": uri}), tokenizer=TOKENIZER, cache=False)
    Path(uri).unlink()
    assert len(rows(prepared)) == 30
    assert not (tmp_path / "catalog").exists()


def test_the_next_pass_takes_what_this_one_kept(tmp_path: Path) -> None:
    spec = job(tmp_path, {"uri": write(tmp_path, "a.jsonl", pairs(30))})
    first = prepare(spec, tokenizer=TOKENIZER)
    (entry,) = (tmp_path / "catalog" / "cache" / "tokens").iterdir()
    # Another content under the same name tells where the second pass took it from.
    key = entry.relative_to(tmp_path / "catalog" / "cache").as_posix()
    other = job(tmp_path, {"uri": write(tmp_path, "b.jsonl", pairs(5))})
    (content,) = ray.get(list(prepare(other, tokenizer=TOKENIZER, cache=False).contents.values()))
    (tmp_path / "catalog" / "cache" / key).write_bytes(content)
    assert prepare(spec, tokenizer=TOKENIZER).counts.total.records == 5
    assert prepare(spec, tokenizer=TOKENIZER, cache=False).counts == first.counts


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
    listings = list_sources(spec.data)
    Path(uri).unlink()
    monkeypatch.setattr("raytune_ft.data.prepare.list_sources", lambda _: listings)
    with pytest.raises(DataError, match="deleted since"):
        prepare(spec, tokenizer=TOKENIZER)


def test_template_is_checked_before_the_pass(tmp_path: Path) -> None:
    sources = [{"uri": str(tmp_path / "missing"), "template": template} for template in ("plain", "alpaca")]
    with pytest.raises(DataError, match=r"^data\.sources\[1\]\.template: alpaca: no such template"):
        prepare(job(tmp_path, *sources), tokenizer=TOKENIZER)


def test_tokenizer_of_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pass and the command that shows the data agree on every count."""
    tiny.save_base(tmp_path / "base")
    spec = job(tmp_path, {"uri": write(tmp_path, "a.jsonl", pairs(30))})
    capsys.readouterr()
    prepared = prepare(spec)
    data_command(spec, examples=0, as_json=True)
    assert json.loads(capsys.readouterr().out)["counts"] == prepared.counts.to_json()
