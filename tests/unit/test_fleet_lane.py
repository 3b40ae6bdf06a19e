"""A lane in the test's own process: what becomes of its jobs, and who it disturbs."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lanes import CHANNEL, PLACEMENT, Shop, adapter, fleet_of, job_on, same, write_task
from safetensors.torch import load_file

from raytune_ft.data.prepare import prepare
from raytune_ft.errors import ModelError
from raytune_ft.fleet import attendance, floor
from raytune_ft.fleet.events import (
    JobDone,
    JobFailed,
    JobStarted,
    LaneEnded,
    LaneLoaded,
    LaneLost,
    LaneStarted,
)
from raytune_ft.model_files import base_identity
from raytune_ft.models import load_tokenizer
from raytune_ft.spec import FleetSpec, JobSpec
from raytune_ft.spec.expand import expand
from raytune_ft.train.assignment import Assignment, TrainingData
from raytune_ft.train.loop import fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.recipe import Recipe
from raytune_ft.train.run import RunState
from raytune_ft.train.workbench import set_up


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def three(folder: Path) -> dict[str, dict[str, Any]]:
    """Jobs that have little in common."""
    return {
        "counts": job_on(write_task(folder, "counts"), method={"rank": 8, "dropout": 0.1}),
        "squares": job_on(
            write_task(folder, "squares", answer=lambda n: str(n * n)),
            schedule={"steps": 9},
            optimizer={"learning_rate": 1.0e-2},
        ),
        "letters": job_on(
            write_task(folder, "letters", answer=lambda n: "abcdefg"[n]),
            method={"targets": "attention"},
            batch={"sequences": 3},
            data={"split": {"validation": 0.2}},
        ),
    }


def run(fleet: FleetSpec, folder: Path) -> Shop:
    shop = Shop(fleet, folder / "fleet")
    shop.run()
    shop.close()
    return shop


def of(shop: Shop, kind: type) -> list[Any]:
    return [event for event in shop.read() if isinstance(event, kind)]


def by_itself(job: JobSpec, folder: Path) -> dict[str, torch.Tensor]:
    """The adapter of a job that is trained as `raytune-ft train` does it."""
    data = prepare(job, tokenizer=load_tokenizer(job.model), cache=False, here=True)
    state = RunState(1, "attempt", data.fingerprint, base_identity(job.model.path))
    assignment = Assignment(job, state, TrainingData.of(job, data, None), CHANNEL, PLACEMENT)
    recipe = Recipe(assignment, Peers(), lambda _: None)
    bench = set_up(assignment, None, Peers())
    recipe.begin(bench, None)
    with recipe.steps(bench.layout, 0) as steps:
        fit(bench.engine, steps, start=0, learning_rate=recipe.learning_rate, report=lambda _: None)
    folder.mkdir(parents=True)
    bench.write_result(job, folder, 0)
    tensors: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return tensors


@pytest.mark.parametrize("slots", [1, 3])
def test_each_job_equals_its_own_run(base: Path, tmp_path: Path, slots: int) -> None:
    jobs = three(tmp_path)
    fleet = fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": slots})
    run(fleet, tmp_path)
    for job in expand(fleet):
        pulled = adapter(tmp_path / "catalog", job.name, tmp_path / "pulled" / job.name)
        assert same(pulled, by_itself(job, tmp_path / "alone" / job.name)), job.name


def test_jobs_of_a_lane_equal_those_that_had_it_to_themselves(base: Path, tmp_path: Path) -> None:
    jobs = three(tmp_path)
    shop = run(fleet_of(base, tmp_path / "together", jobs, lanes={"slots": 3}), tmp_path)
    assert [type(event) for event in shop.events[:2]] == [LaneStarted, LaneLoaded]
    assert of(shop, LaneLoaded)[0].slots == 3
    assert isinstance(shop.events[-1], LaneEnded)
    done = {event.job: event for event in of(shop, JobDone)}
    assert done.keys() == jobs.keys()
    assert done["squares"].result["steps"] == 9
    assert [step for step, _ in done["squares"].losses] == list(range(1, 10))
    for name, job in jobs.items():
        run(fleet_of(base, tmp_path / name, {name: job}), tmp_path / f"of-{name}")
        together = adapter(tmp_path / "together", name, tmp_path / "pulled" / name)
        assert same(together, adapter(tmp_path / name, name, tmp_path / "pulled-alone" / name))


def test_a_job_that_cannot_be_trained_fails_alone(base: Path, tmp_path: Path) -> None:
    jobs = three(tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": 5}\n' * 30)
    long = write_task(tmp_path, "long", answer=lambda _: "word " * 100)
    jobs["broken"] = job_on(bad)
    jobs["wild"] = job_on(
        write_task(tmp_path, "wild"),
        optimizer={"learning_rate": 1.0e30, "max_grad_norm": None},
        schedule={"warmup": 0.0},
    )
    jobs["too-long"] = job_on(long, data={"max_tokens": 16})
    shop = run(fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": 6}), tmp_path)
    failed = {event.job: event.reason for event in of(shop, JobFailed)}
    assert failed.keys() == {"broken", "wild", "too-long"}
    assert "bad.jsonl" in failed["broken"]
    assert "the loss is nan at learning rate" in failed["wild"]
    assert "data.max_tokens" in failed["too-long"]
    assert {event.job for event in of(shop, JobDone)} == {"counts", "squares", "letters"}
    clean = run(fleet_of(base, tmp_path / "clean", three(tmp_path), lanes={"slots": 3}), tmp_path / "c")
    assert len(of(clean, JobDone)) == 3
    for name in ("counts", "squares", "letters"):
        pulled = adapter(tmp_path / "catalog", name, tmp_path / "one" / name)
        assert same(pulled, adapter(tmp_path / "clean", name, tmp_path / "other" / name))


class Meddler:
    """A desk that does something once, at the first beat that tells of a checkpoint."""

    def __init__(self, desk: Any, then: Callable[[str], Any]) -> None:
        self._desk = desk
        self._then = then
        self._acted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._desk, name)

    def beat(self, lane: str, steps: Any, checkpoints: Any) -> bool:
        answer: bool = self._desk.beat(lane, steps, checkpoints)
        if checkpoints and not self._acted:
            self._acted = True
            self._then(lane)
        return answer


class Killed(Exception):
    """What stands for the end of a process."""


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three longer jobs: where they were published, and what they are."""
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs = {
        name: {**job, "schedule": {"steps": 40}, "optimizer": {"kind": "adamw", "learning_rate": 5.0e-3}}
        for name, job in three(folder).items()
    }
    run(fleet_of(base, folder / "catalog", jobs, lanes={"slots": 3}), folder)
    return folder / "catalog", jobs


def assert_equal(jobs: Iterable[str], one: Path, other: Path, to: Path) -> None:
    for name in jobs:
        pulled = adapter(one, name, to / "one" / name)
        assert same(pulled, adapter(other, name, to / "other" / name)), name


def test_another_lane_goes_on_from_the_checkpoints_with_the_same_bits(
    base: Path, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "BEAT_S", 0.01)
    catalog, jobs = undisturbed
    shop = Shop(fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": 3}), tmp_path / "fleet")

    def kill(lane: str) -> None:
        raise Killed(lane)

    with pytest.raises(Killed):
        shop.lane(desk=Meddler(shop.desk, kill)).run()
    shop.desk.lose("lane-1", announced=False, reason="killed")
    shop.lane("lane-2").run()
    started = [event for event in of(shop, JobStarted) if event.lane == "lane-2"]
    assert len(of(shop, JobDone)) == 3
    assert any(event.step > 0 for event in started)
    assert_equal(jobs, catalog, tmp_path / "catalog", tmp_path)
    shop.close()


def test_a_lane_that_was_taken_for_lost_drops_its_jobs_and_joins_again(
    base: Path, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "BEAT_S", 0.01)
    catalog, jobs = undisturbed
    shop = Shop(fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": 3}), tmp_path / "fleet")
    lose = Meddler(shop.desk, lambda lane: shop.desk.lose(lane, announced=False, reason="silent"))
    shop.lane(desk=lose).run()
    assert [event.lane for event in of(shop, LaneStarted)] == ["lane-1", "lane-1.2"]
    (lost,) = of(shop, LaneLost)
    assert lost.jobs
    assert not of(shop, JobFailed)
    assert {event.job for event in of(shop, JobDone)} == jobs.keys()
    assert_equal(jobs, catalog, tmp_path / "catalog", tmp_path)
    shop.close()


def test_before_its_node_goes_every_job_is_kept(
    base: Path, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "_ASK_NODE_EVERY_S", 0.0)
    catalog, jobs = undisturbed
    jobs = {name: {**job, "checkpoint": {"every_steps": 1000}} for name, job in jobs.items()}
    shop = Shop(fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": 3}), tmp_path / "fleet")
    asked = itertools.count()
    shop.lane(node_goes=lambda: next(asked) > 20).run()
    (lost,) = of(shop, LaneLost)
    assert lost.announced
    assert lost.jobs
    before = len(of(shop, JobDone))
    shop.lane("lane-2").run()
    started = {event.job: event.step for event in of(shop, JobStarted) if event.lane == "lane-2"}
    assert started.keys() == set(lost.jobs)
    assert all(step > 0 for step in started.values())
    assert len(of(shop, JobDone)) == before + len(lost.jobs) == 3
    assert_equal(jobs, catalog, tmp_path / "catalog", tmp_path)
    shop.close()


def test_one_base_after_another(base: Path, tmp_path: Path) -> None:
    other = tiny.save_base(tmp_path / "other", tiny.llama(layers=1))
    broken = tiny.save_base(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    paths = {"first": base, "second": other, "third": broken, "fourth": base}
    jobs = {
        name: job_on(write_task(tmp_path, name), model={"path": str(path)}) for name, path in paths.items()
    }
    shop = Shop(fleet_of(base, tmp_path / "catalog", jobs), tmp_path / "fleet")
    # It may be the first lane's fault.
    with pytest.raises(ModelError, match="broken"):
        shop.lane().run()
    assert not of(shop, JobFailed)
    shop.desk.lose_attempts("lane-1", announced=False, reason="broken")
    shop.lane("lane-2").run()
    shop.close()
    assert {event.base for event in of(shop, LaneLoaded)} == {str(base), str(other)}
    assert {event.job for event in of(shop, JobDone)} == {"first", "second", "fourth"}
    (failed,) = of(shop, JobFailed)
    assert failed.job == "third"
    assert "broken" in failed.reason


def test_jobs_that_share_no_batch_take_turns_on_the_base(tmp_path: Path) -> None:
    classes = ("one", "two", "three")
    base = tiny.save_base(tmp_path / "base", tiny.bert(classes=3), words=tiny.wordpiece())
    jobs = {
        name: job_on(
            write_task(tmp_path, name, answer=lambda n: classes[n % 3]),
            model={"path": str(base), "labels": list(classes)},
        )
        for name in ("first", "second")
    }
    shop = run(fleet_of(base, tmp_path / "catalog", jobs, lanes={"slots": 2}), tmp_path)
    assert len(of(shop, LaneLoaded)) == 1
    assert not of(shop, JobFailed)
    order = [(type(event), event.job) for event in shop.events if isinstance(event, JobStarted | JobDone)]
    first, second = order[0][1], order[2][1]
    assert order == [(JobStarted, first), (JobDone, first), (JobStarted, second), (JobDone, second)]
