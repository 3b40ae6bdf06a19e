"""Runs that others want too, that find no room or no disk, and that keep the best."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from conftest import make_job  # type: ignore[import-not-found]  # this folder's
from ray.util import placement_group, remove_placement_group

from raytune_ft.catalog import Catalog
from raytune_ft.catalog.layout import numbered
from raytune_ft.errors import RunHeld, StorageFull
from raytune_ft.spec import JobSpec
from raytune_ft.train import room
from raytune_ft.train.launch import train
from raytune_ft.train.lease import LEASE, Holder, newest_entry
from raytune_ft.train.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def small(base: Path, capitals: Path, catalog: Path, **changes: Any) -> JobSpec:
    return make_job(base, capitals, catalog, **{"evaluate": {"metrics": []}, **changes})


def snapshot(run: Run) -> dict[str, Any]:
    """Ray Train's list of the checkpoints that count."""
    kept: dict[str, Any] = json.loads(run.storage.read("checkpoint_manager_snapshot.json"))
    return kept


@pytest.fixture
def other() -> Iterator[Holder]:
    """A process of this machine that is at work."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = psutil.Process(process.pid).create_time()
        yield replace(Holder.here("other"), pid=process.pid, process_started_at=started)
        process.kill()
        process.communicate()


def test_the_second_driver_is_refused_and_touches_nothing(
    base: Path, capitals: Path, tmp_path: Path, other: Holder
) -> None:
    job = small(base, capitals, tmp_path / "catalog")
    run = Run(job)
    run.storage.write_once(numbered(LEASE, 1), json.dumps(asdict(other)).encode())
    for restart in (False, True):
        with pytest.raises(RunHeld, match=f"process {other.pid}, .* is at work on this run"):
            train(job, tmp_path / "out", restart=restart)
    assert [found.key for found in run.storage.list()] == [numbered(LEASE, 1)]
    assert not (tmp_path / "out").exists()


def test_workers_of_a_driver_that_lost_the_run_write_nothing(
    base: Path, capitals: Path, tmp_path: Path, other: Holder
) -> None:
    job = small(base, capitals, tmp_path / "catalog")
    run = Run(job)

    def take_over(event: dict[str, Any]) -> None:
        entry = newest_entry(run.storage)
        if event["phase"] == "load" and entry:
            run.storage.write_once(numbered(LEASE, entry.number + 5), json.dumps(asdict(other)).encode())

    with pytest.raises(RunHeld, match="took over its run, which goes on there"):
        train(job, tmp_path / "out", on_event=take_over)
    assert not list(run.storage.list("checkpoint_"))
    assert not Catalog.at(job.publish.catalog).versions(job.adapter_name)


@pytest.mark.slow
def test_a_run_that_waits_for_room_says_so(
    base: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "TOLD_AFTER_S", 0.5)
    taken = placement_group([{"CPU": 1.0}])
    ray.get(taken.ready())
    told: list[str] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["phase"].startswith("Waiting for room"):
            told.append(event["phase"])
            remove_placement_group(taken)

    job = small(base, capitals, tmp_path / "catalog", schedule={"steps": 2})
    assert train(job, tmp_path / "out", on_event=on_event)["steps"] == 2
    assert told == ["Waiting for room in the cluster: the run needs 1.5 CPU, and 1 are free"]


@pytest.mark.slow
def test_the_best_and_the_last_stay(base: Path, capitals: Path, tmp_path: Path) -> None:
    job = small(
        base,
        capitals,
        tmp_path / "catalog",
        data={"sources": [{"uri": str(capitals)}], "max_tokens": 64, "split": {"validation": 0.2}},
        optimizer={"learning_rate": 0.5, "max_grad_norm": None},
        schedule={"steps": 6, "decay": "constant", "warmup": 0.0},
        checkpoint={"every_steps": 1, "keep": 1, "keep_best": True},
    )

    train(job, tmp_path / "out")
    kept = snapshot(Run(job))
    position = json.loads(
        Run(job).storage.read(f"{kept['latest_checkpoint_result']['checkpoint_dir_name']}/position.json")
    )
    steps = {entry["step"]: entry["validation_loss"] for entry in position["history"]}
    stay = {result["metrics"]["step"] for result in kept["checkpoint_results"]}
    assert stay == {min(steps, key=lambda step: steps[step]), 6}


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["tmpfs"], indirect=True)
def test_a_bucket_that_fills_ends_the_run_and_the_last_checkpoint_stays(
    base: Path, capitals: Path, small_disk: Path
) -> None:
    job = small(
        base,
        capitals,
        small_disk / "catalog",
        method={"rank": 8},
        schedule={"steps": 40},
        checkpoint={"every_steps": 4, "keep": 100},
    )
    with pytest.raises(
        StorageFull, match=r"the disk is full: .* were not written; .* free space and run again"
    ):
        train(job, small_disk.parent / "out")
    run = Run(job)
    named = {result["checkpoint_dir_name"] for result in snapshot(run)["checkpoint_results"]}
    there = {found.key.partition("/")[0] for found in run.storage.list("checkpoint_2")}
    assert there == named, "of the one that did not fit nothing is left"
    subprocess.run(["mount", "-o", "remount,size=64M", str(small_disk)], check=True)
    started: list[int] = []
    result = train(
        job, small_disk.parent / "out", on_event=lambda event: started.append(event.get("step", -1))
    )
    assert result["steps"] == 40
    assert next(step for step in started if step >= 0) == 4 * len(named)
