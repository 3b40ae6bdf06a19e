"""Fleets on a real cluster: like the jobs by themselves, through kills and restarts, and never twice."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from lanes import adapter, fleet_of, job_on, same, write_task

from raytune_ft.catalog import Catalog
from raytune_ft.errors import RunHeld, SpecError
from raytune_ft.fleet.events import (
    FleetEnded,
    FleetEvent,
    FleetPlanned,
    FleetResult,
    JobDone,
    JobFailed,
    JobStarted,
    LaneLoaded,
    LaneLost,
    LaneStarted,
    Progress,
)
from raytune_ft.fleet.run import SETTINGS_FILE, run_fleet
from raytune_ft.spec import FleetSpec, JobSpec
from raytune_ft.spec.expand import expand
from raytune_ft.train.launch import train
from raytune_ft.train.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@dataclass
class Heard:
    """All events, and something to do at one of them."""

    at: type | None = None
    then: Callable[[Any], None] = lambda _: None
    events: list[FleetEvent] = field(default_factory=list)

    def __call__(self, event: FleetEvent) -> None:
        self.events.append(event)
        if self.at is not None and isinstance(event, self.at):
            self.then(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def three(folder: Path, steps: int = 12) -> dict[str, dict[str, Any]]:
    """Jobs that have little in common."""
    return {
        "counts": job_on(write_task(folder, "counts"), method={"rank": 8, "dropout": 0.1}),
        "squares": job_on(
            write_task(folder, "squares", answer=lambda n: str(n * n)),
            schedule={"steps": steps + 6},
            evaluate={"metrics": ["exact_match"], "max_examples": 4, "max_new_tokens": 2},
        ),
        "letters": job_on(
            write_task(folder, "letters", answer=lambda n: "abcdefg"[n]),
            schedule={"steps": steps},
            batch={"sequences": 3},
        ),
    }


def spec_of(fleet: FleetSpec, name: str) -> JobSpec:
    return next(job for job in expand(fleet) if job.name == name)


def run(fleet: FleetSpec, folder: Path, heard: Heard | None = None, **options: Any) -> FleetResult:
    return run_fleet(fleet, folder / "out", on_event=heard or Heard(), **options)


def assert_equal(names: list[str], one: Path, other: Path, to: Path) -> None:
    for name in names:
        pulled = adapter(one, name, to / "one" / name)
        assert same(pulled, adapter(other, name, to / "other" / name)), name


def kill_lane() -> None:
    """SIGKILL to a training process of this machine."""
    found = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in process.name() or process.name().startswith("ray::RayTrainWor")
    ]
    os.kill(found[0].pid, signal.SIGKILL)


def kill_once_kept(job: JobSpec) -> None:
    """Kill a lane as soon as a job has a checkpoint in its folder."""

    def wait() -> None:
        while not any(key.key.endswith(".json") for key in Run(job).storage.list("kept/")):
            time.sleep(0.01)
        kill_lane()

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(scope="module")
def reference(
    cluster: str, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FleetSpec, FleetResult, Heard, Path]:
    """A fleet that nobody disturbed, on one lane."""
    assert cluster
    folder = tmp_path_factory.mktemp("reference")
    fleet = fleet_of(base, folder / "catalog", three(folder), lanes={"slots": 3})
    heard = Heard()
    return fleet, run(fleet, folder, heard), heard, folder


class TestDone:
    def test_the_story_is_whole(self, reference: Any) -> None:
        _, result, heard, _ = reference
        assert result.ok
        assert [job.name for job in result.jobs] == ["counts", "letters", "squares"]
        assert isinstance(heard.events[0], FleetPlanned)
        assert isinstance(heard.events[-1], FleetEnded)
        assert len(heard.of(LaneStarted)) == len(heard.of(LaneLoaded)) == 1
        assert {event.job for event in heard.of(JobDone)} == {"counts", "letters", "squares"}
        assert {event.job: event.steps for event in heard.of(JobStarted)}["squares"] == 18
        assert heard.of(Progress)

    def test_each_job_equals_its_own_run(self, reference: Any, tmp_path: Path) -> None:
        fleet, result, _, folder = reference
        squares = spec_of(fleet, "squares")
        alone = squares.model_copy(
            update={"publish": squares.publish.model_copy(update={"catalog": str(tmp_path / "catalog")})}
        )
        own = train(alone, tmp_path / "out")
        assert_equal(["squares"], folder / "catalog", tmp_path / "catalog", tmp_path)
        found = next(job.result for job in result.jobs if job.name == "squares")
        assert found.keys() == own.keys()
        for name in ("steps", "loss", "scores_before", "scores_after", "version", "adapter"):
            assert found[name] == own[name]
        one, other = (Catalog.at(str(at / "catalog")).resolve("squares") for at in (folder, tmp_path))
        assert one.data == other.data
        assert one.job == {**other.job, "publish": one.job["publish"]}

    def test_the_same_command_trains_nothing(self, reference: Any, tmp_path: Path) -> None:
        fleet, result, _, _ = reference
        heard = Heard()
        again = run(fleet, tmp_path, heard)
        assert [(job.name, job.result) for job in again.jobs] == [(j.name, j.result) for j in result.jobs]
        assert all(event.before for event in heard.of(JobDone))
        assert not heard.of(LaneStarted)

    def test_a_job_by_itself_knows_what_its_fleet_did(self, reference: Any, tmp_path: Path) -> None:
        fleet, result, _, _ = reference
        phases: list[dict[str, Any]] = []
        own = train(spec_of(fleet, "counts"), tmp_path, on_event=phases.append)
        assert own == next(job.result for job in result.jobs if job.name == "counts")
        assert phases == [{"phase": "done before"}]

    def test_another_driver_of_the_fleet_is_refused(self, reference: Any, tmp_path: Path) -> None:
        fleet = reference[0]
        refused: list[str] = []

        def second(_: Any) -> None:
            if not refused:
                with pytest.raises(RunHeld) as found:
                    run(fleet, tmp_path / "second")
                refused.append(str(found.value))

        assert run(fleet, tmp_path, Heard(FleetPlanned, second)).ok
        assert "is at work on this run" in refused[0] or "Waiting" in refused[0]


class TestChanged:
    @pytest.mark.slow
    def test_only_what_changed_runs_anew_and_failures_wait_to_be_asked_for(
        self, base: Path, tmp_path: Path
    ) -> None:
        jobs = three(tmp_path, steps=4)
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"instruction": 5}\n' * 30)
        jobs["broken"] = job_on(bad)
        fleet = fleet_of(base, tmp_path / "catalog", jobs)
        first = run(fleet, tmp_path)
        assert (first.count("done"), first.count("failed")) == (3, 1)
        assert "bad.jsonl" in str(next(job.reason for job in first.jobs if job.name == "broken"))

        quiet = Heard()
        second = run(fleet, tmp_path, quiet)
        assert [event.before for event in quiet.of(JobFailed)] == [True]
        assert not quiet.of(LaneStarted)
        assert not second.ok

        asked = Heard()
        assert run(fleet, tmp_path, asked, retry_failed=True).count("failed") == 1
        assert [event.before for event in asked.of(JobFailed)] == [False]

        write_task(tmp_path, "bad")
        jobs["counts"] = {**jobs["counts"], "method": {"rank": 2}}
        changed = Heard()
        last = run(fleet_of(base, tmp_path / "catalog", jobs), tmp_path, changed)
        assert last.ok
        assert {event.job for event in changed.of(JobStarted)} == {"broken", "counts"}
        assert {event.job for event in changed.of(JobDone) if event.before} == {"squares", "letters"}
        assert Catalog.at(str(tmp_path / "catalog")).resolve("counts").version == 2

    @pytest.mark.slow
    def test_after_a_failure_nothing_more_begins_where_that_is_wanted(
        self, base: Path, tmp_path: Path
    ) -> None:
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"instruction": 5}\n' * 30)
        jobs = {"broken": job_on(bad, schedule={"steps": 1000}), **three(tmp_path, steps=4)}
        fleet = fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": 1}, on_failure="stop")
        result = run(fleet, tmp_path)
        assert (result.count("failed"), result.count("queued")) == (1, 3)

    def test_jobs_of_one_fleet_want_one_device(self, base: Path, tmp_path: Path) -> None:
        jobs = three(tmp_path)
        jobs["counts"]["cluster"] = {"device": "auto"}
        with pytest.raises(SpecError, match=r"cluster.device differs between jobs: auto \(counts\), cpu"):
            run(fleet_of(base, tmp_path / "catalog", jobs), tmp_path)


class TestKilled:
    @pytest.mark.slow
    def test_jobs_of_a_killed_lane_end_with_the_same_bits(
        self, reference: Any, base: Path, tmp_path: Path
    ) -> None:
        _, _, _, folder = reference
        fleet = fleet_of(base, tmp_path / "catalog", three(folder), lanes={"slots": 3})
        heard = Heard(FleetPlanned, lambda _: kill_once_kept(spec_of(fleet, "squares")))
        assert run(fleet, tmp_path, heard).ok
        (lost,) = heard.of(LaneLost)
        assert not lost.announced
        assert len(heard.of(LaneStarted)) == 2
        assert_equal(["counts", "letters", "squares"], folder / "catalog", tmp_path / "catalog", tmp_path)

    @pytest.mark.slow
    def test_two_lanes_share_the_jobs(self, base: Path, tmp_path: Path) -> None:
        # Long enough for the second lane to find some left.
        jobs = three(tmp_path, steps=250)
        alone = fleet_of(base, tmp_path / "alone", jobs, lanes={"slots": 3})
        # A fleet keeps the threads that it began with: one lane would take two here, and each of two one.
        settings = tmp_path / "alone" / "fleets" / alone.name / SETTINGS_FILE
        settings.parent.mkdir(parents=True)
        settings.write_text('{"threads": 1}')
        assert run(alone, tmp_path / "of-one").ok
        heard = Heard()
        assert run(fleet_of(base, tmp_path / "two", jobs, lanes={"max": 2, "slots": 2}), tmp_path, heard).ok
        assert len({event.lane for event in heard.of(JobDone)}) == 2
        assert_equal(["counts", "letters", "squares"], tmp_path / "alone", tmp_path / "two", tmp_path)
