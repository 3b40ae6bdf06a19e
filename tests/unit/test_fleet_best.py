"""Jobs of a fleet that publish their best step, and that stop early: each by itself, beside the others."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lanes import Shop, adapter, fleet_of, job_on, same, write_task
from overfitting import write_keys
from safetensors.torch import load_file

from raytune_ft.catalog import Catalog
from raytune_ft.fleet import attendance
from raytune_ft.fleet.events import JobDone, JobFailed, JobStarted
from raytune_ft.spec import FleetSpec, JobSpec
from raytune_ft.spec.expand import expand
from raytune_ft.train.kept import JobCheckpoints
from raytune_ft.train.run import Run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def over_fitting(folder: Path) -> dict[str, dict[str, Any]]:
    """One that keeps its best, one that stops early, and one that does neither."""
    keys = write_keys(folder / "keys.jsonl")
    split = {"split": {"validation": 0.4, "test": 0.0}}
    by_heart = {
        "method": {"rank": 8, "dropout": 0.1},
        "batch": {"sequences": 8},
        "optimizer": {"learning_rate": 5.0e-3},
    }
    return {
        "keeps": job_on(
            keys,
            data=split,
            schedule={"steps": 16, "decay": "constant"},
            checkpoint={"every_steps": 3, "keep": 1, "keep_best": True},
            **by_heart,
        ),
        "stops": job_on(
            keys,
            data=split,
            schedule={"steps": 200, "decay": "constant", "early_stopping": {"patience": 3}},
            checkpoint={"every_steps": 3, "keep": 1},
            **by_heart,
        ),
        "plain": job_on(write_task(folder, "plain"), schedule={"steps": 9}),
    }


def jobs_of(fleet: FleetSpec) -> dict[str, JobSpec]:
    return {job.name: job for job in expand(fleet)}


def of(shop: Shop, kind: type) -> list[Any]:
    return [event for event in shop.read() if isinstance(event, kind)]


def run(fleet: FleetSpec, folder: Path) -> dict[str, dict[str, Any]]:
    shop = Shop(fleet, folder)
    shop.run()
    shop.close()
    assert not of(shop, JobFailed)
    return {event.job: event.result for event in of(shop, JobDone)}


def assert_kept_is_published(job: JobSpec, step: int, catalog: Path, to: Path) -> None:
    """The weights of the checkpoint are those of the version, bit for bit."""
    to.mkdir(parents=True)
    JobCheckpoints(Run(job).storage, keep=1).fetch(step, to)
    kept = load_file(to / "trainable.safetensors")
    published = adapter(catalog, job.name, to / "pulled")
    assert len(kept) == len(published)
    for tensor in kept.values():
        assert any(torch.equal(tensor.flatten(), other.flatten()) for other in published.values())


def test_each_job_chooses_by_itself_and_equals_the_one_that_had_the_lane_to_itself(
    base: Path, tmp_path: Path
) -> None:
    jobs = over_fitting(tmp_path)
    together = fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": 2})
    results = run(together, tmp_path / "fleet")
    specs = jobs_of(together)
    best = results["keeps"]["best"]
    assert results["keeps"]["steps"] == 16
    assert results["keeps"]["published_step"] == best["step"] < 16
    stopped = results["stops"]["stopped_early"]
    assert results["stops"]["steps"] == stopped["step"] == stopped["best_step"] + 9 < 200
    assert results["stops"]["published_step"] == stopped["best_step"]
    assert not {"best", "published_step", "stopped_early"} & results["plain"].keys()
    for name in ("keeps", "stops"):
        step = results[name]["published_step"]
        assert_kept_is_published(specs[name], step, tmp_path / "catalog", tmp_path / "kept" / name)
        record = Catalog.at(str(tmp_path / "catalog")).resolve(f"{name}@v1")
        assert record.published_step == step
        assert record.selection == {
            key: value for key, value in results[name].items() if key in record.selection
        }
    for name, job in jobs.items():
        alone = run(fleet_of(base, tmp_path / name, {name: job}), tmp_path / f"of-{name}")
        assert alone[name]["steps"] == results[name]["steps"]
        assert alone[name].get("published_step") == results[name].get("published_step")
        pulled = adapter(tmp_path / "catalog", name, tmp_path / "pulled" / name)
        assert same(pulled, adapter(tmp_path / name, name, tmp_path / "alone" / name)), name


class Killed(Exception):
    """What stands for the end of a process."""


class KillingDesk:
    """Ends the lane at a beat that tells of a checkpoint of so many steps."""

    def __init__(self, desk: Any, after: int) -> None:
        self._desk = desk
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._desk, name)

    def beat(self, lane: str, steps: Any, checkpoints: Any) -> bool:
        answer: bool = self._desk.beat(lane, steps, checkpoints)
        if any(step >= self._after for step in checkpoints.values()):
            raise Killed(lane)
        return answer


@pytest.mark.slow
def test_another_lane_goes_on_and_publishes_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "BEAT_S", 0.01)
    jobs = over_fitting(tmp_path)
    undisturbed = run(fleet_of(base, tmp_path / "whole", jobs, lanes={"slots": 3}), tmp_path / "one")
    shop = Shop(fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": 3}), tmp_path / "fleet")
    with pytest.raises(Killed):
        shop.lane(desk=KillingDesk(shop.desk, 12)).run()
    shop.desk.lose("lane-1", announced=False, reason="killed")
    shop.lane("lane-2").run()
    assert any(event.step > 0 for event in of(shop, JobStarted) if event.lane == "lane-2")
    results = {event.job: event.result for event in of(shop, JobDone)}
    for name in ("keeps", "stops"):
        for field in ("steps", "published_step", "best", "stopped_early"):
            assert results[name].get(field) == undisturbed[name].get(field), (name, field)
        pulled = adapter(tmp_path / "catalog", name, tmp_path / "pulled" / name)
        assert same(pulled, adapter(tmp_path / "whole", name, tmp_path / "expected" / name)), name
    shop.close()
