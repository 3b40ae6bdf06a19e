"""Jobs whose data is streamed while they train: with windows so small that little data has many."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kill_once_kept, make_job  # type: ignore[import-not-found]  # this folder's
from safetensors.torch import load_file

import raytune_ft.data.index
import raytune_ft.data.stream
import raytune_ft.data.survey
from raytune_ft.catalog import Catalog
from raytune_ft.errors import DataError
from raytune_ft.spec import JobSpec
from raytune_ft.train.launch import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster", "small_windows")]


def stream_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(raytune_ft.data.survey, "SURVEY_BYTES", 0)
    patch.setattr(raytune_ft.data.survey, "SAMPLE_BYTES", 6000)
    patch.setattr(raytune_ft.data.index, "WINDOW_BYTES", 1500)
    patch.setattr(raytune_ft.data.stream, "WINDOW_BYTES", 1500)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    stream_all(monkeypatch)


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name, count in (("large", 300), ("small", 60)):
        lines = [
            json.dumps({"instruction": f"{name} number {n}.", "output": f"{n % 10}{n % 7}"})
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def streamed(base: Path, data: Path, catalog: Path, **changes: Any) -> JobSpec:
    sources = [{"uri": str(data / name)} for name in ("large.jsonl", "small.jsonl")]
    sections: dict[str, Any] = {
        "data": {"sources": sources, "max_tokens": 64},
        "schedule": {"epochs": 1},
        "batch": {"sequences": 24},
        "evaluate": {"metrics": []},
        **changes,
    }
    job: JobSpec = make_job(base, data, catalog, **sections)
    return job


def history(job: JobSpec) -> list[dict[str, Any]]:
    kept = [json.loads(path.read_text()) for path in Path(job.publish.catalog).rglob("position.json")]
    entries: list[dict[str, Any]] = max(kept, key=lambda position: int(position["step"]))["history"]
    return entries


def adapter(job: JobSpec, to: Path) -> dict[str, torch.Tensor]:
    Catalog.at(job.publish.catalog).pull(job.name, to)
    tensors: dict[str, torch.Tensor] = load_file(to / "adapter_model.safetensors")
    return tensors


@pytest.fixture(scope="module")
def undisturbed(
    cluster: str, base: Path, two_sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JobSpec, dict[str, torch.Tensor]]:
    assert cluster
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        stream_all(patch)
        job = streamed(base, two_sources, folder / "catalog")
        train(job, folder / "out")
    return job, adapter(job, folder / "pulled")


def test_an_epoch_is_all_of_it_and_the_record_counts_exactly(undisturbed: Any) -> None:
    job, _ = undisturbed
    counts = Catalog.at(job.publish.catalog).resolve(job.name).data["counts"]
    assert counts["estimated"] is False
    assert counts["total"]["records"] == 360
    assert sum(entry["examples"] for entry in history(job)) == counts["total"]["train"]
    due = [entry["source_losses"] for entry in history(job) if "source_losses" in entry]
    assert due
    assert all(len(losses) == 2 for losses in due)


@pytest.mark.slow
def test_a_lost_worker_changes_no_bit(
    undisturbed: Any, base: Path, two_sources: Path, tmp_path: Path
) -> None:
    job = streamed(base, two_sources, tmp_path / "catalog")
    killed: list[int] = []
    train(job, tmp_path / "out", on_event=kill_once_kept(job.publish.catalog, killed))
    assert killed
    expected = undisturbed[1]
    found = adapter(job, tmp_path / "pulled")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_two_workers_see_the_same_batches(
    undisturbed: Any, base: Path, two_sources: Path, tmp_path: Path
) -> None:
    job = streamed(
        base, two_sources, tmp_path / "catalog", cluster={"workers": 2}, method={"rank": 4, "dropout": 0.1}
    )
    train(job, tmp_path / "out")
    alone, together = history(undisturbed[0]), history(job)
    assert [entry["batch"] for entry in together] == [entry["batch"] for entry in alone]


@pytest.mark.slow
def test_the_next_job_finds_what_was_tokenised(
    undisturbed: Any, base: Path, two_sources: Path, tmp_path: Path
) -> None:
    job, expected = undisturbed
    cached = sorted(Path(job.publish.catalog).glob("cache/tokens/*"))
    assert len(cached) > 10
    times = [path.stat().st_mtime_ns for path in cached]
    again = streamed(base, two_sources, Path(job.publish.catalog), name="again")
    train(again, tmp_path / "out")
    assert [path.stat().st_mtime_ns for path in cached] == times
    found = adapter(again, tmp_path / "pulled")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_without_the_cache_nothing_is_left_in_the_bucket(
    undisturbed: Any, base: Path, two_sources: Path, tmp_path: Path
) -> None:
    job = streamed(base, two_sources, tmp_path / "catalog")
    train(job, tmp_path / "out", cache=False)
    assert not (tmp_path / "catalog" / "cache").exists()
    found = adapter(job, tmp_path / "pulled")
    assert all(torch.equal(undisturbed[1][name], found[name]) for name in found)


def test_malformed_records_beyond_the_sample(base: Path, two_sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.jsonl").write_bytes((two_sources / "small.jsonl").read_bytes())
    lines = (two_sources / "large.jsonl").read_text().splitlines()
    (folder / "large.jsonl").write_text("\n".join([*lines, *["{broken"] * 12]) + "\n")
    job = streamed(base, folder, tmp_path / "catalog")
    with pytest.raises(DataError, match=r"records are malformed, of about .* not JSON"):
        train(job, tmp_path / "out")
    quarantine = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert all(json.loads(line)["record"] == "{broken" for line in quarantine)
    assert len(quarantine) >= 4
