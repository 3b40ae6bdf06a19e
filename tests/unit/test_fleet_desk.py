"""The desk of a fleet: who gets what, what is told of it, and when a lane counts as lost."""

from typing import Any

import pytest
import tiny

from raytune_ft.fleet.desk import Desk, Order, Stepped
from raytune_ft.fleet.events import (
    JobDone,
    JobFailed,
    JobStarted,
    JobStepped,
    LaneEnded,
    LaneLoaded,
    LaneLost,
    LaneStarted,
)
from raytune_ft.fleet.placement import Group, Placed
from raytune_ft.fleet.queue import Queue, QueuedJob
from raytune_ft.fleet.work import LaneSpeed, Work
from raytune_ft.planner import Lane, MemoryPlan, ModelFacts
from raytune_ft.spec import parse_job

FACTS = ModelFacts.from_config(tiny.llama().config.to_dict(), "base")


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def job(name: str) -> Placed:
    spec = parse_job(
        {
            "name": name,
            "model": {"path": "org/base"},
            "data": {"sources": [{"uri": f"{name}.jsonl"}]},
            "publish": {"catalog": "c"},
        }
    )
    return Placed(spec, Work(10, 100), QueuedJob(name, spec.digest(), "base-1", 10.0))


def desk_of(*names: str, **settings: Any) -> tuple[Desk, Clock]:
    clock = Clock()
    jobs = tuple(job(name) for name in names)
    group = Group("base-1", jobs, FACTS, LaneSpeed(1, 1, 1), Lane("packed", 2, MemoryPlan(1, 1, 1, 1, 1)))
    queue = Queue([each.queued for each in jobs], lanes=1, lease_s=30.0, **settings)
    orders = {each.spec.name: Order(each.spec, "inputs") for each in jobs}
    return Desk(queue, orders, [group], lease_s=30.0, began_at=100.0, clock=clock), clock


def kinds(desk: Desk) -> list[str]:
    return [type(event).__name__ for event in desk.news().events]


def test_a_lane_from_the_first_word_to_the_last() -> None:
    desk, clock = desk_of("a", "b")
    desk.join("lane-1", "node", "cpu")
    first = desk.take("lane-1", None, 0)
    assert first.switch_to is not None
    assert [placed.spec.name for placed in first.switch_to.jobs] == ["a", "b"]
    clock.now += 5
    desk.loaded("lane-1", "base-1", 2, 4.5)
    taken = desk.take("lane-1", "base-1", 2)
    assert [order.job.name for order in taken.orders] == ["a", "b"]
    desk.started("lane-1", "a", 0, 10)
    assert desk.beat("lane-1", {"a": Stepped(3, 10, 2.5, 30)}, {"a": 2})
    assert desk.done("lane-1", "a", {"version": 1}, ((3, 2.5),))
    assert desk.failed("lane-1", "b", "no good")
    assert desk.take("lane-1", "base-1", 2).ended
    desk.end("lane-1")
    news = desk.news()
    assert news.events == (
        LaneStarted(0.0, "lane-1", "node", "cpu"),
        LaneLoaded(5.0, "lane-1", "org/base", 2, 4.5),
        JobStarted(5.0, "a", "lane-1", 0, 10),
        JobStepped(5.0, "a", "lane-1", 3, 10, 2.5, 30),
        JobDone(5.0, "a", "lane-1", {"version": 1}, ((3, 2.5),)),
        JobFailed(5.0, "b", "lane-1", "no good"),
        LaneEnded(5.0, "lane-1"),
    )
    assert news.ended
    assert (news.counts["done"], news.counts["failed"]) == (1, 1)
    assert desk.news().events == ()


def test_a_silent_lane_is_lost_and_told_so_when_it_speaks() -> None:
    desk, clock = desk_of("a")
    desk.join("lane-1", "node", "cpu")
    desk.take("lane-1", "base-1", 1)
    desk.news()
    clock.now += 30
    (lost,) = desk.news().events
    assert lost == LaneLost(30.0, "lane-1", ("a",), False, "it was silent for 30 s")
    assert not desk.beat("lane-1", {}, {})
    assert desk.take("lane-1", "base-1", 1).lost
    assert not desk.done("lane-1", "a", {}, ())
    assert not desk.failed("lane-1", "a", "late")
    desk.end("lane-1")
    desk.lose("lane-1", announced=False, reason="known")
    assert kinds(desk) == []
    desk.join("lane-2", "node", "cpu")
    assert [order.job.name for order in desk.take("lane-2", "base-1", 1).orders] == ["a"]


def test_a_lane_that_speaks_keeps_its_jobs() -> None:
    desk, clock = desk_of("a")
    desk.join("lane-1", "node", "cpu")
    desk.take("lane-1", "base-1", 1)
    for _ in range(5):
        clock.now += 29
        assert desk.beat("lane-1", {}, {})
    assert desk.done("lane-1", "a", {}, ())


def test_the_end_of_a_process_is_the_end_of_the_name_that_it_had_last() -> None:
    desk, _ = desk_of("a")
    desk.join("lane-1.2", "node", "cpu")
    desk.join("lane-10", "node", "cpu")
    desk.take("lane-1.2", "base-1", 1)
    desk.news()
    desk.lose_attempts("lane-1", announced=False, reason="killed")
    (lost,) = desk.news().events
    assert isinstance(lost, LaneLost)
    assert (lost.lane, lost.jobs, lost.reason) == ("lane-1.2", ("a",), "killed")


def test_lanes_that_are_lost_before_a_step_are_counted() -> None:
    desk, _ = desk_of("a", "b")
    desk.lose_attempts("lane-1", announced=False, reason="no torch")
    desk.join("lane-2", "node", "cpu")
    desk.lose("lane-2", announced=True, reason="taken away")
    desk.join("lane-3", "node", "cpu")
    desk.lose("lane-3", announced=False, reason="killed")
    news = desk.news()
    assert (news.barren_losses, news.reason) == (2, "killed")
    desk.join("lane-4", "node", "cpu")
    desk.take("lane-4", "base-1", 1)
    desk.beat("lane-4", {"a": Stepped(1, 10, 1.0, 1)}, {})
    desk.lose("lane-4", announced=False, reason="killed later")
    assert desk.news().barren_losses == 0


def test_a_job_that_loses_too_many_lanes_fails_with_the_last() -> None:
    desk, clock = desk_of("a")
    for at in range(1, 5):
        lane = f"lane-{at}"
        desk.join(lane, "node", "cpu")
        desk.take(lane, "base-1", 1)
        desk.lose(lane, announced=False, reason="killed")
    news = desk.news()
    assert isinstance(news.events[-1], JobFailed)
    assert "max_restarts = 3" in news.events[-1].reason
    assert news.ended
    assert clock.now == 100.0


@pytest.mark.parametrize("stop", [True, False])
def test_stopping_is_told(stop: bool) -> None:
    desk, _ = desk_of("a", "b", on_failure="stop" if stop else "continue")
    desk.join("lane-1", "node", "cpu")
    desk.take("lane-1", "base-1", 1)
    desk.failed("lane-1", "a", "no good")
    assert desk.news().stopped is stop
    assert desk.take("lane-1", "base-1", 1).ended is stop


def test_the_state_is_kept_when_it_changed() -> None:
    desk, _ = desk_of("a")
    first = desk.news(snapshot=True).snapshot
    assert first is not None
    assert desk.news(snapshot=True).snapshot is None
    desk.join("lane-1", "node", "cpu")
    desk.take("lane-1", "base-1", 1)
    desk.failed("lane-1", "a", "no good")
    assert desk.news().snapshot is None
    second = desk.news(snapshot=True).snapshot
    assert second is not None
    entries = Queue.restored(second, "there").entries
    assert (entries["a"].state, entries["a"].reason) == ("failed", "no good")
    assert entries["a"].job == job("a").queued
