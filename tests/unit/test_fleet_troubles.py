"""What lanes meet with that is no job's fault: full memory, stores and desks that cannot be reached."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lanes import Shop, fleet_of, job_on, write_task

from raytune_ft.catalog import Catalog
from raytune_ft.errors import OutOfMemory, StorageError
from raytune_ft.fleet import attendance, blame, floor, intake, lane
from raytune_ft.fleet.attendance import LaneUnfit, LeaseLost
from raytune_ft.fleet.events import JobDone, JobFailed, JobStarted, LaneLost, LaneStarted
from raytune_ft.fleet.intake import Preparing
from raytune_ft.spec import FleetSpec
from raytune_ft.spec.expand import expand
from raytune_ft.train import uploads
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.lease import Holder, Lease
from raytune_ft.train.recipe import Recipe
from raytune_ft.train.run import Run

BIG = 7
"""Seed of a job that needs too much."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attendance, "BEAT_S", 0.01)
    monkeypatch.setattr(blame, "PAUSE_S", 0.01)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is made while a job is being prepared: all that have a slot are on the base together."""
    prepare, update, nothing_comes = Preparing.prepare, BankEngine.update, threading.Event()
    nothing_comes.set()

    def prepared(preparing: Preparing, order: Any) -> Any:
        nothing_comes.clear()
        try:
            return prepare(preparing, order)
        finally:
            nothing_comes.set()

    def waits(engine: BankEngine, rate: float) -> float:
        assert nothing_comes.wait(60)
        return update(engine, rate)

    monkeypatch.setattr(Preparing, "prepare", prepared)
    monkeypatch.setattr(BankEngine, "update", waits)


def fleet(base: Path, folder: Path, count: int, *, slots: int, steps: int = 6, **of_first: Any) -> FleetSpec:
    jobs = {
        f"job-{at}": job_on(write_task(folder, f"job-{at}"), schedule={"steps": steps}) for at in range(count)
    }
    first = jobs["job-0"]
    jobs["job-0"] = {**first, **of_first, "data": {**first["data"], **of_first.get("data", {})}}
    return fleet_of(base, folder / "catalog", jobs, lanes={"slots": slots})


def shop_of(spec: FleetSpec, folder: Path) -> Shop:
    return Shop(spec, folder / "fleet")


def of(shop: Shop, kind: type) -> list[Any]:
    return [event for event in shop.read() if isinstance(event, kind)]


class Crowd:
    """A device whose memory some jobs fill together, and big ones alone."""

    def __init__(self, bank: type[Bank], monkeypatch: pytest.MonkeyPatch, *, most: int) -> None:
        self.trained_beside: Counter[int] = Counter()
        entered: dict[int, set[int]] = {}
        enter, leave, update = bank.enter, bank.leave, BankEngine.update

        def counted(base: Bank, *given: Any, **named: Any) -> BankEngine:
            engine = enter(base, *given, **named)
            entered.setdefault(id(base), set()).add(engine.slot)
            return engine

        def left(base: Bank, engine: BankEngine) -> None:
            entered[id(base)].discard(engine.slot)
            leave(base, engine)

        def full(engine: BankEngine, rate: float) -> float:
            beside = len(entered[id(engine.base)])
            if beside > most or engine.seed == BIG:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            self.trained_beside[beside] += 1
            return update(engine, rate)

        monkeypatch.setattr(bank, "enter", counted)
        monkeypatch.setattr(bank, "leave", left)
        monkeypatch.setattr(BankEngine, "update", full)


@pytest.mark.usefixtures("_unhurried")
def test_where_several_fill_the_memory_half_as_many_go_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(Bank, monkeypatch, most=2)
    shop = shop_of(fleet(base, tmp_path, 4, slots=4, steps=20), tmp_path)
    shop.run()
    assert len(of(shop, JobDone)) == 4
    assert not of(shop, JobFailed)
    assert {event.announced for event in of(shop, LaneLost)} == {True}
    assert max(crowd.trained_beside) == 2
    assert all(entry.losses == 0 for entry in shop.queue.entries.values())
    shop.close()


@pytest.mark.usefixtures("_unhurried")
def test_a_job_that_does_not_fit_fails_and_leaves_the_others_their_room(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(Bank, monkeypatch, most=4)
    shop = shop_of(fleet(base, tmp_path, 5, slots=4, steps=20, data={"seed": BIG}), tmp_path)
    shop.run()
    (failed,) = of(shop, JobFailed)
    assert failed.job == "job-0"
    assert "the device's memory is full" in failed.reason
    assert len(of(shop, JobDone)) == 4
    assert max(crowd.trained_beside) == 4, "the lane is not left with one slot"
    shop.close()


@pytest.mark.usefixtures("_unhurried")
def test_memory_that_is_full_before_the_first_step_is_no_failure_either(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, entered = Recipe.begin, []

    def full(recipe: Recipe, bench: Any, checkpoint: Any) -> Any:
        entered.append(recipe.job.name)
        if len(entered) == 2:
            raise OutOfMemory("the device's memory is full")
        return begin(recipe, bench, checkpoint)

    monkeypatch.setattr(Recipe, "begin", full)
    shop = shop_of(fleet(base, tmp_path, 2, slots=2, steps=20), tmp_path)
    shop.run()
    assert len(of(shop, JobDone)) == 2
    assert len(of(shop, LaneLost)) == 1
    shop.close()


class Away:
    """A store that fails some times, then works."""

    def __init__(self, times: float) -> None:
        self.left = times

    def check(self) -> None:
        if self.left > 0:
            self.left -= 1
            raise StorageError("s3://adapters: no answer")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_is_away_for_a_while_fails_no_job(
    base: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fail(when, Away(5), monkeypatch)
    shop = shop_of(fleet(base, tmp_path, 2, slots=2), tmp_path)
    shop.run()
    assert len(of(shop, JobDone)) == 2
    assert not of(shop, LaneLost)
    shop.close()


def make_fail(when: str, away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store be away before a job is trained, or after it."""
    kind, name = (Preparing, "prepare") if when == "before" else (Recipe, "publish")
    act = getattr(kind, name)

    def first_fails(*given: Any) -> Any:
        away.check()
        return act(*given)

    monkeypatch.setattr(kind, name, first_fails)
    holds = lane.check_holds

    def ask(*given: Any) -> None:
        away.check()
        holds(*given)

    monkeypatch.setattr(lane, "check_holds", ask)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_stays_away_ends_the_lane_and_no_job(
    base: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(float("inf"))
    make_fail(when, away, monkeypatch)
    monkeypatch.setattr(blame, "OUTAGE_S", 0.05)
    # A checkpoint may be on its way, and the lane waits for it.
    monkeypatch.setattr(uploads, "OUTAGE_S", 0.05)
    shop = shop_of(fleet(base, tmp_path, 2, slots=1), tmp_path)
    with pytest.raises(StorageError, match="no answer"):
        shop.lane().run()
    assert not of(shop, JobFailed)
    shop.desk.lose_attempts("lane-1", announced=False, reason="no answer", cause="store")
    away.left = 0
    shop.lane("lane-2").run()
    assert len(of(shop, JobDone)) == 2
    assert Catalog.at(str(tmp_path / "catalog")).newest_versions() == {"job-0": 1, "job-1": 1}
    shop.close()


def test_a_machine_without_the_key_to_sign_with_fails_no_job(base: Path, tmp_path: Path) -> None:
    signed = {"publish": {"catalog": str(tmp_path / "catalog"), "sign": True}}
    shop = shop_of(fleet(base, tmp_path, 2, slots=2, **signed), tmp_path)
    with pytest.raises(LaneUnfit, match="RAYTUNE_SIGNING_KEY"):
        shop.lane().run()
    assert not of(shop, JobFailed)
    shop.close()


class Unreachable:
    """A desk that cannot be reached for some calls, once it has heard of a checkpoint."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk
        self._away: int | None = None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._desk, name)

        def call(*given: Any, **named: Any) -> Any:
            if self._away:
                self._away -= 1
                raise LeaseLost(name)
            if self._away is None and name == "beat" and given[2]:
                self._away = 3
            return method(*given, **named)

        return call


@pytest.mark.usefixtures("_unhurried")
def test_a_lane_that_could_not_reach_the_desk_keeps_its_base_and_blames_no_job(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.fleet.lane._RECONNECT_S", 0.01)
    shop = shop_of(fleet(base, tmp_path, 2, slots=2, steps=20), tmp_path)
    shop.lane(desk=Unreachable(shop.desk)).run()
    (lost,) = of(shop, LaneLost)
    assert lost.announced
    assert lost.reason == "it could not reach the desk for a while"
    assert [event.lane for event in of(shop, LaneStarted)] == ["lane-1", "lane-1.2"]
    assert len(of(shop, JobDone)) == 2
    assert all(entry.losses == 0 for entry in shop.queue.entries.values())
    shop.close()


class Panic(BaseException):
    """What libraries written in Rust raise."""


def first_fails(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str
) -> None:
    """Of two jobs the first meets an error while it is prepared: it alone fails, with the reason."""
    prepare = Preparing.prepare

    def fails(preparing: Preparing, order: Any) -> Any:
        if order.job.name == "job-0":
            raise error
        return prepare(preparing, order)

    monkeypatch.setattr(Preparing, "prepare", fails)
    shop = shop_of(fleet(base, tmp_path, 2, slots=2), tmp_path)
    shop.run()
    (failed,) = of(shop, JobFailed)
    assert (failed.job, failed.reason) == ("job-0", reason)
    assert [event.job for event in of(shop, JobDone)] == ["job-1"]
    shop.close()


def test_a_panic_while_a_job_is_prepared_fails_that_job(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "the job failed: Panic: index out of bounds"
    first_fails(base, tmp_path, monkeypatch, Panic("index out of bounds"), reason)


def test_a_panic_while_data_is_read_fails_that_job(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    steps = Recipe.steps

    @contextmanager
    def panics(recipe: Recipe, layout: Any, start: int) -> Iterator[Any]:
        def broken(coming: Iterator[Any]) -> Iterator[Any]:
            yield next(coming)
            raise Panic("index out of bounds")

        with steps(recipe, layout, start) as coming:
            yield broken(coming) if recipe.job.name == "job-0" else coming

    monkeypatch.setattr(Recipe, "steps", panics)
    shop = shop_of(fleet(base, tmp_path, 2, slots=2), tmp_path)
    shop.run()
    (failed,) = of(shop, JobFailed)
    assert failed.job == "job-0"
    assert failed.reason == "reading its data failed: Panic: index out of bounds"
    assert [event.job for event in of(shop, JobDone)] == ["job-1"]
    shop.close()


class Stopped(Exception):
    """What stands for the end of a process."""


def test_a_checkpoint_that_nobody_can_read_is_left_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = fleet(base, tmp_path, 1, slots=1, steps=60, checkpoint={"every_steps": 10, "keep": 3})
    shop = shop_of(spec, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "finish", lambda *_: (_ for _ in ()).throw(LeaseLost("lane-1")))
        patch.setattr("raytune_ft.fleet.lane.Lane._say_lost", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            shop.lane().run()
    shop.desk.lose("lane-1", announced=False, reason="killed")
    run = Run(expand(spec)[0])
    kept = sorted(found.key for found in run.storage.list("kept/") if found.key.endswith("/position.json"))
    assert len(kept) == 3
    # One of another program, and one that is damaged though it has its size.
    position = run.storage.read(kept[-1])
    run.storage.write(kept[-1], position.replace(b'"schema_version": 2', b'"schema_version": 1'))
    weights = kept[-2].replace("position.json", "trainable.safetensors")
    run.storage.write(weights, b"x" * len(run.storage.read(weights)))
    shop.lane("lane-2").run()
    started = [event.step for event in of(shop, JobStarted) if event.lane == "lane-2"]
    assert started == [int(kept[0].removeprefix("kept/")[:10])]
    assert len(of(shop, JobDone)) == 1
    assert Catalog.at(str(tmp_path / "catalog")).newest_versions() == {"job-0": 1}
    shop.close()


def test_a_job_that_somebody_trains_by_itself_is_left_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_LOOK_AGAIN_S", 0.2)
    spec = fleet(base, tmp_path, 2, slots=2)
    run = Run(next(job for job in expand(spec) if job.name == "job-0"))
    theirs = Lease(run.storage, Holder.here("another launch"), renew_s=0.02, expires_s=60)
    theirs.take(lambda _: None)
    run.storage.write("checkpoint_000001/weights", b"theirs, on its way")
    shop = shop_of(spec, tmp_path)
    shop.run()
    (failed,) = of(shop, JobFailed)
    assert failed.job == "job-0"
    assert "trains this job by itself; wait until it has ended" in failed.reason
    assert run.storage.read("checkpoint_000001/weights") == b"theirs, on its way"
    theirs.give_back()
    shop.queue.retry_failed()
    shop.run()
    assert len(of(shop, JobDone)) == 2
    shop.close()


def test_a_lane_that_has_to_go_seats_nobody_and_says_so_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "_ASK_NODE_EVERY_S", 0.0)
    shop = shop_of(fleet(base, tmp_path, 3, slots=3, steps=200), tmp_path)
    prepare, noticed, told = Preparing.prepare, threading.Event(), []

    def late(preparing: Preparing, order: Any) -> Any:
        if order.job.name == "job-1":
            noticed.wait(20)
        if order.job.name == "job-2":
            give_up_at = time.monotonic() + 20
            while not of(shop, LaneLost) and time.monotonic() < give_up_at:
                time.sleep(0.01)
            told.append(bool(of(shop, LaneLost)))
        return prepare(preparing, order)

    def node_goes() -> bool:
        if not of(shop, JobStarted):
            return False
        noticed.set()
        # Long enough for the second job to be ready.
        time.sleep(0.5)
        return True

    monkeypatch.setattr(Preparing, "prepare", late)
    shop.lane(node_goes=node_goes).run()
    assert [event.job for event in of(shop, JobStarted)] == ["job-0"]
    (lost,) = of(shop, LaneLost)
    assert lost.announced
    assert set(lost.jobs) == {"job-0", "job-1", "job-2"}
    assert told in ([], [True]), "while its threads were still at work"
    assert shop.queue.entries["job-0"].checkpoint_step, "kept before it went"
    shop.close()


def test_what_a_store_that_answers_has_against_one_job_fails_that_job(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "job-0: its list of checkpoints is cut off"
    first_fails(base, tmp_path, monkeypatch, StorageError(reason), reason)
