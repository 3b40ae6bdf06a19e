"""The desk of a fleet: who gets what, what is told of it, and when a lane counts as lost."""

import pytest
from desks import Clock, desk_of, job

from raytune_ft.errors import StorageError, TrainingError
from raytune_ft.fleet.desk import Cause, Desk, Stepped
from raytune_ft.fleet.events import (
    FleetEvent,
    JobDone,
    JobFailed,
    JobStarted,
    JobStepped,
    LaneEnded,
    LaneLoaded,
    LaneLost,
    LaneStarted,
)
from raytune_ft.fleet.queue import Queue
from raytune_ft.fleet.run import check_barren


def pass_s(desk: Desk, clock: Clock, seconds: int) -> list[FleetEvent]:
    """Let time pass while the driver asks, as it does; what it hears."""
    events: list[FleetEvent] = []
    for _ in range(seconds):
        clock.now += 1
        events += desk.news().events
    return events


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
    (lost,) = pass_s(desk, clock, 30)
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
        pass_s(desk, clock, 29)
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
    assert (news.barren.losses, news.barren.reason) == (2, "killed")
    desk.join("lane-4", "node", "cpu")
    desk.take("lane-4", "base-1", 1)
    desk.beat("lane-4", {"a": Stepped(1, 10, 1.0, 1)}, {})
    desk.lose("lane-4", announced=False, reason="killed later")
    assert desk.news().barren.losses == 0


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


def test_a_desk_that_was_away_takes_nobody_for_silent() -> None:
    desk, clock = desk_of("a")
    desk.join("lane-1", "node", "cpu")
    desk.take("lane-1", "base-1", 1)
    pass_s(desk, clock, 20)
    # Its process was stopped, and what the lane said meanwhile waits to be heard.
    clock.now += 3600
    assert kinds(desk) == []
    assert desk.beat("lane-1", {}, {})
    pass_s(desk, clock, 29)
    assert [type(event) for event in pass_s(desk, clock, 1)] == [LaneLost]


def test_one_process_is_lost_once_though_it_was_silent_before() -> None:
    desk, clock = desk_of("a")
    desk.join("lane-1", "node", "cpu")
    pass_s(desk, clock, 30)
    desk.lose_attempts("lane-1", announced=False, reason="killed")
    assert desk.news().barren.losses == 1
    desk.join("lane-2", "node", "cpu")
    desk.take("lane-2", "base-1", 1)
    desk.beat("lane-2", {"a": Stepped(1, 10, 1.0, 1)}, {})
    desk.lose("lane-2", announced=True, reason="away")
    desk.join("lane-2.2", "node", "cpu")
    desk.lose_attempts("lane-2", announced=False, reason="killed")
    assert desk.news().barren.losses == 0, "its process had done a step"


@pytest.mark.parametrize(("cause", "kind"), [("unknown", TrainingError), ("store", StorageError)])
def test_so_many_lanes_may_be_lost_while_they_load_as_there_are(cause: Cause, kind: type) -> None:
    desk, _ = desk_of("a")
    desk.expect([f"lane-{at}" for at in range(6)])
    for at in range(6):
        desk.lose_attempts(f"lane-{at}", announced=False, reason="its node is gone", cause=cause)
    check_barren(desk.news())
    desk.lose_attempts("lane-6", announced=False, reason="no torch", cause=cause)
    with pytest.raises(kind, match=r"7 lanes were lost .* before any of them came to anything; the last"):
        check_barren(desk.news())


def test_three_may_be_lost_where_there_are_fewer() -> None:
    desk, _ = desk_of("a")
    desk.expect(["lane-1"])
    for at in range(1, 4):
        desk.lose_attempts(f"lane-{at}", announced=False, reason="killed")
    check_barren(desk.news())
    desk.lose_attempts("lane-4", announced=False, reason="killed")
    with pytest.raises(TrainingError, match="4 lanes were lost"):
        check_barren(desk.news())


def test_what_a_lost_lane_says_is_not_told() -> None:
    desk, clock = desk_of("a", "b")
    desk.join("lane-1", "node", "cpu")
    desk.take("lane-1", "base-1", 1)
    pass_s(desk, clock, 30)
    desk.loaded("lane-1", "base-1", 2, 40.0)
    desk.started("lane-1", "a", 0, 10)
    assert not desk.cannot_load("lane-1", "base-1", "no")
    assert not desk.give_back("lane-1", "a", "no", alone=True)
    assert kinds(desk) == []
    desk.join("lane-2", "node", "cpu")
    desk.take("lane-2", "base-1", 1)
    desk.started("lane-2", "b", 0, 10)
    assert kinds(desk) == ["LaneStarted"], "it has a, not b"


def test_lanes_are_those_that_are_there_and_those_that_are_likely_to_come() -> None:
    desk, _ = desk_of("a")
    desk.join("lane-1", "node", "cpu")
    desk.join("lane-2.3", "node", "cpu")
    desk.expect(["lane-1", "lane-3"])
    assert desk.news().lanes == 3
    desk.end("lane-1")
    desk.expect([])
    assert desk.news().lanes == 1


def test_lanes_that_do_not_come_take_no_share() -> None:
    names = [f"job-{at}" for at in range(8)]
    desk, _ = desk_of(*names)
    desk.join("lane-1", "node", "cpu")
    # Four wait for room that there is not.
    desk.expect([f"lane-{at}" for at in range(1, 5)])
    assert len(desk.take("lane-1", "base-1", 8).orders) == 2
    desk.expect(["lane-1"])
    assert len(desk.take("lane-1", "base-1", 6).orders) == 6


def test_a_base_fails_its_jobs_when_a_second_lane_cannot_load_it_and_none_has() -> None:
    desk, _ = desk_of("a", "b")
    desk.join("lane-1", "node", "cpu")
    desk.take("lane-1", None, 0)
    assert not desk.cannot_load("lane-1", "base-1", "the folder is not there")
    # The same lane again is no other witness.
    desk.lose("lane-1", announced=True, reason="away")
    desk.join("lane-1.2", "node", "cpu")
    assert not desk.cannot_load("lane-1.2", "base-1", "the folder is not there")
    desk.join("lane-2", "node", "cpu")
    desk.take("lane-2", "base-1", 1)
    desk.join("lane-3", "node", "cpu")
    assert not desk.cannot_load("lane-3", "base-1", "the folder is not there"), "lane-2 has it"
    desk.end("lane-2")
    desk.news()
    assert desk.cannot_load("lane-3", "base-1", "the folder is not there")
    news = desk.news()
    failed = [(event.job, event.reason) for event in news.events if isinstance(event, JobFailed)]
    assert failed == [("a", "the folder is not there"), ("b", "the folder is not there")]
    assert news.ended
    assert news.barren.losses == 0


def test_a_job_that_is_refused_twice_has_failed() -> None:
    desk, _ = desk_of("a")
    desk.join("lane-1", "node", "cpu")
    for kind in (["JobReturned"], ["JobFailed"]):
        assert [order.job.name for order in desk.take("lane-1", "base-1", 1).orders] == ["a"]
        desk.news()
        assert desk.give_back("lane-1", "a", "needs 40 GiB", alone=False)
        assert kinds(desk) == kind


def test_what_the_store_or_the_machine_is_to_blame_for_costs_the_jobs_nothing() -> None:
    desk, _ = desk_of("a")
    for at, cause in enumerate(["store", "lane", "store", "lane", "store"], 1):
        desk.join(f"lane-{at}", "node", "cpu")
        assert desk.take(f"lane-{at}", "base-1", 1).orders
        desk.lose_attempts(f"lane-{at}", announced=False, reason="no answer", cause=cause)
    assert not any(isinstance(event, JobFailed) for event in desk.news().events)
    with pytest.raises(StorageError, match="5 lanes were lost"):
        check_barren(desk.news())


@pytest.mark.parametrize("kept", [False, True])
def test_steps_that_are_lost_for_the_store_again_and_again_come_to_nothing(kept: bool) -> None:
    desk, _ = desk_of("a")
    for at in range(1, 5):
        desk.join(f"lane-{at}", "node", "cpu")
        assert desk.take(f"lane-{at}", "base-1", 1).orders
        assert desk.beat(f"lane-{at}", {"a": Stepped(9, 10, 1.0, 1)}, {"a": 9} if kept else {})
        desk.lose_attempts(f"lane-{at}", announced=False, reason="the disk is full", cause="store")
    if kept:
        check_barren(desk.news())
        return
    with pytest.raises(StorageError, match=r"4 lanes were lost .*: the disk is full"):
        check_barren(desk.news())
