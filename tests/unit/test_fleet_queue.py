"""The queue of a fleet: no job is lost, none is two lanes' at a time, each ends once."""

import json
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raytune_ft.errors import StorageError
from raytune_ft.fleet.entry import ALONE_AFTER, QueuedJob
from raytune_ft.fleet.queue import Offer, Queue

LEASE_S = 10.0


def job(name: str, base: str = "x", seconds: float = 1.0, **changes: Any) -> QueuedJob:
    return QueuedJob(name, f"digest of {name}", base, seconds, **changes)


def queue(*jobs: QueuedJob, lanes: int = 1, **changes: Any) -> Queue:
    return Queue(jobs, lanes=lanes, lease_s=LEASE_S, **changes)


def taken(offer: Offer) -> list[str]:
    assert (offer.switch_to, offer.ended, offer.lost) == (None, False, False)
    return list(offer.jobs)


class TestTaking:
    def test_the_longest_first_and_the_base_at_hand_before_others(self) -> None:
        jobs = queue(job("a", seconds=1), job("b", seconds=3), job("c", seconds=2), job("d", "y", seconds=5))
        jobs.join("l", 0)
        assert jobs.take("l", None, 0, 0) == Offer(switch_to="x")
        assert taken(jobs.take("l", "x", 2, 0)) == ["b", "c"]
        assert taken(jobs.take("l", "x", 0, 0)) == []
        assert jobs.finish("l", "b")
        assert taken(jobs.take("l", "x", 1, 0)) == ["a"]
        assert jobs.finish("l", "c")
        # Nothing of the base is left, but one of its jobs still trains.
        assert taken(jobs.take("l", "x", 1, 0)) == []
        assert jobs.finish("l", "a")
        assert jobs.take("l", "x", 2, 0) == Offer(switch_to="y")
        assert taken(jobs.take("l", "y", 2, 0)) == ["d"]
        assert jobs.finish("l", "d")
        assert jobs.take("l", "y", 2, 0) == Offer(ended=True)
        assert jobs.ended

    def test_lanes_share_what_is_open(self) -> None:
        jobs = queue(*(job(f"{n}") for n in range(9)), lanes=2)
        for lane in "ab":
            jobs.join(lane, 0)
        assert len(taken(jobs.take("a", "x", 8, 0))) == 5
        assert len(taken(jobs.take("b", "x", 8, 0))) == 4

    def test_lanes_go_where_the_work_is(self) -> None:
        many = [job(f"many-{n}", "x", seconds=2) for n in range(6)]
        jobs = queue(*many, job("few-0", "y", seconds=5), job("few-1", "z", seconds=1), lanes=3)
        for lane in "abc":
            jobs.join(lane, 0)
        assert [jobs.take(lane, None, 0, 0).switch_to for lane in "abc"] == ["x", "x", "y"]

    def test_no_lane_loads_what_others_will_have_trained(self) -> None:
        jobs = queue(job("a"), job("b", "y"), lanes=3)
        for lane in "abc":
            jobs.join(lane, 0)
        assert [jobs.take(lane, None, 0, 0).switch_to for lane in "abc"] == ["x", "y", None]
        jobs.lose("a")
        assert jobs.take("c", None, 0, 0) == Offer(switch_to="x")

    def test_a_lane_with_nothing_to_do_ends_and_another_comes_for_what_comes_back(self) -> None:
        jobs = queue(job("a"), lanes=2)
        for lane in "ab":
            jobs.join(lane, 0)
        assert taken(jobs.take("a", "x", 1, 0)) == ["a"]
        assert jobs.take("b", "x", 1, 0) == Offer(ended=True)
        assert not jobs.ended
        jobs.lose("b", announced=True)
        jobs.lose("a")
        jobs.join("c", 0)
        assert taken(jobs.take("c", "x", 1, 0)) == ["a"]

    def test_a_job_that_shares_no_batch_has_a_lane_to_itself(self) -> None:
        jobs = queue(job("a"), job("b"), job("s", shares_batch=False, seconds=0.5))
        jobs.join("l", 0)
        assert taken(jobs.take("l", "x", 4, 0)) == ["s"]
        assert taken(jobs.take("l", "x", 3, 0)) == []
        jobs.finish("l", "s")
        assert taken(jobs.take("l", "x", 4, 0)) == ["a", "b"]

    def test_a_lane_that_can_take_no_more_keeps_no_other_from_it(self) -> None:
        jobs = queue(job("s", shares_batch=False, seconds=0.5), *(job(f"{n}") for n in range(8)), lanes=2)
        for lane in "ab":
            jobs.join(lane, 0)
        assert taken(jobs.take("a", "x", 8, 0)) == ["s"]
        assert len(taken(jobs.take("b", "x", 8, 0))) == 8

    def test_nothing_is_handed_out_after_a_failure_that_stops(self) -> None:
        jobs = queue(job("a", seconds=2), job("b"), job("c"), on_failure="stop")
        jobs.join("l", 0)
        assert taken(jobs.take("l", "x", 2, 0)) == ["a", "b"]
        assert jobs.fail("l", "a", "the loss is nan")
        assert jobs.take("l", "x", 1, 0) == Offer(ended=True)
        assert not jobs.ended
        assert jobs.finish("l", "b")
        assert jobs.ended
        assert (jobs.counts["queued"], jobs.entries["a"].reason) == (1, "the loss is nan")
        assert jobs.retry_failed() == ("a",)
        assert taken(jobs.take("l", "x", 2, 0)) == ["a", "c"]


class TestLosing:
    def test_a_lane_that_is_silent_loses_its_jobs(self) -> None:
        jobs = queue(job("a"), job("b"))
        jobs.join("l", 0)
        jobs.take("l", "x", 2, 0)
        assert jobs.renew("l", 9, {"a": 40, "unknown": 3})
        assert jobs.expire(18) == ()
        assert jobs.expire(19) == ("a", "b")
        # What it says afterwards counts for nothing.
        assert not jobs.renew("l", 19)
        assert not jobs.finish("l", "a")
        assert not jobs.fail("l", "a", "too late")
        assert jobs.take("l", "x", 2, 19) == Offer(lost=True)
        jobs.join("m", 19)
        assert jobs.take("m", "x", 2, 19).jobs == {"a": 40, "b": None}

    def test_another_lane_takes_over_when_it_asks(self) -> None:
        jobs = queue(job("a"), lanes=2)
        jobs.join("l", 0)
        jobs.join("m", 0)
        jobs.take("l", "x", 1, 0)
        assert jobs.take("m", "x", 1, 9) == Offer(ended=True)
        assert taken(jobs.take("m", "x", 1, 10)) == ["a"]

    def lose_often(self, jobs: Queue, times: int, *, announced: bool = False) -> list[list[str]]:
        held = []
        for time_s in range(times):
            jobs.join("l", time_s)
            held.append(list(jobs.take("l", "x", 4, time_s).jobs))
            jobs.lose("l", announced=announced)
        return held

    def test_a_job_that_kills_its_lanes_takes_no_other_with_it(self) -> None:
        jobs = queue(job("a", seconds=2, max_restarts=3), job("b"))
        held = self.lose_often(jobs, ALONE_AFTER + 2)
        assert held == [["a", "b"], ["a", "b"], ["a"], ["a"]]
        assert jobs.entries["a"].state == "failed"
        assert jobs.entries["a"].reason == (
            "its lane was lost 4 times, at last with no other job on it, and cluster.max_restarts = 3"
        )
        assert jobs.entries["b"].state == "queued"

    def test_preemptions_are_nobodys_fault(self) -> None:
        jobs = queue(job("a", max_restarts=0))
        assert self.lose_often(jobs, 9, announced=True) == [["a"]] * 9
        assert jobs.entries["a"].state == "queued"
        self.lose_often(jobs, 1)
        assert jobs.entries["a"].state == "failed"

    def test_who_comes_further_between_two_losses_is_not_their_cause(self) -> None:
        jobs = queue(job("a", max_restarts=1), job("b", max_restarts=1))
        for at in range(1, 9):
            jobs.join("l", at)
            assert len(taken(jobs.take("l", "x", 4, at))) == 2, "neither is sent to a lane of its own"
            jobs.renew("l", at, {"a": 10 * at, "b": 10 * at})
            jobs.lose("l")
        assert jobs.entries["a"].losses == 1
        self.lose_often(jobs, 2)
        assert (jobs.entries["a"].state, jobs.entries["a"].losses) == ("failed", 3)

    def test_where_nobody_listened_nobody_was_silent(self) -> None:
        jobs = queue(job("a"))
        jobs.join("l", 0)
        jobs.put_off(100)
        assert jobs.expire(109) == ()
        assert jobs.renew("l", 109)


class TestRefusing:
    def test_what_one_lane_cannot_hold_is_anothers(self) -> None:
        jobs = queue(job("a", seconds=2), job("b"), lanes=2)
        for lane in ("small", "large"):
            jobs.join(lane, 0)
        assert taken(jobs.take("small", "x", 1, 0)) == ["a"]
        assert jobs.give_back("small", "a", "too small", alone=False)
        assert taken(jobs.take("small", "x", 1, 0)) == ["b"]
        assert taken(jobs.take("large", "x", 1, 0)) == ["a"]
        assert not jobs.give_back("small", "a", "not its own", alone=False)
        assert jobs.finish("large", "a")

    def test_what_all_lanes_refuse_fails_when_it_was_tried_again(self) -> None:
        jobs = queue(job("a"), job("b", "y"), lanes=2)
        jobs.join("l", 0)
        jobs.join("m", 0)
        for lane in "lm":
            assert taken(jobs.take(lane, "x", 1, 0)) == ["a"]
            jobs.give_back(lane, "a", f"too small: {lane}", alone=False)
        # Whichever asks next, under whichever of its names.
        jobs.lose("l", announced=True)
        jobs.join("l.2", 0)
        assert taken(jobs.take("l.2", "x", 1, 0)) == ["a"]
        assert jobs.give_back("l.2", "a", "too small: l", alone=False)
        assert (jobs.entries["a"].state, jobs.entries["a"].reason) == ("failed", "too small: l")
        assert jobs.retry_failed() == ("a",)
        assert jobs.entries["a"].refused_by == ()

    def test_who_refused_all_that_is_left_of_its_base_goes_to_another(self) -> None:
        jobs = queue(job("a"), job("b", "y"), lanes=2)
        for lane in "lm":
            jobs.join(lane, 0)
        jobs.take("l", "x", 1, 0)
        jobs.give_back("l", "a", "too small", alone=False)
        assert jobs.take("l", "x", 1, 0) == Offer(switch_to="y")

    def test_what_did_not_fit_beside_others_is_tried_alone(self) -> None:
        jobs = queue(job("a", seconds=2), job("b"), job("c"))
        jobs.join("l", 0)
        assert taken(jobs.take("l", "x", 2, 0)) == ["a", "b"]
        jobs.give_back("l", "a", "the memory is full", alone=True)
        assert taken(jobs.take("l", "x", 1, 0)) == ["c"]
        jobs.finish("l", "b")
        jobs.finish("l", "c")
        assert taken(jobs.take("l", "x", 2, 0)) == ["a"]

    def test_a_base_that_no_lane_can_load_fails_what_waits_for_it(self) -> None:
        jobs = queue(job("a"), job("b"), job("s", shares_batch=False), job("c", "y"))
        jobs.join("l", 0)
        assert not jobs.is_loaded("x")
        assert taken(jobs.take("l", "x", 1, 0)) == ["s"]
        assert jobs.is_loaded("x")
        assert jobs.fail_waiting("x", "no weights") == ("a", "b")
        assert [jobs.counts[state] for state in ("failed", "leased", "queued")] == [2, 1, 1]
        assert jobs.entries["a"].reason == "no weights"


class TestAfterwards:
    def test_what_was_done_is_not_done_again_unless_it_changed(self) -> None:
        names = ("done", "changed", "failed", "open", "gone")
        before = queue(*(job(name) for name in names))
        before.join("l", 0)
        before.take("l", "x", 5, 0)
        before.renew("l", 0, {"open": 7})
        for name in ("done", "changed", "gone"):
            before.finish("l", name)
        before.fail("l", "failed", "why")
        now = [
            QueuedJob("changed", "another digest", "x", 1.0),
            *(job(n) for n in ("done", "failed", "open")),
        ]
        after = Queue([*now, job("new")], lanes=1, lease_s=LEASE_S, previous=before.entries)
        states = {name: entry.state for name, entry in after.entries.items()}
        assert states == {
            "changed": "queued",
            "done": "done",
            "failed": "failed",
            "open": "queued",
            "new": "queued",
        }
        assert after.entries["open"].checkpoint_step == 7

    def test_a_snapshot_is_the_state(self) -> None:
        jobs = queue(job("a"), job("b", "y"), job("c"), lanes=2)
        jobs.join("l", 1.5)
        jobs.take("l", "x", 1, 2.5)
        copy = Queue.restored(jobs.snapshot(), "s3://b/state.json")
        assert copy.snapshot() == jobs.snapshot()
        for state in (jobs, copy):
            assert state.finish("l", "a")
            assert taken(state.take("l", "x", 1, 3)) == ["c"]
        assert copy.snapshot() == jobs.snapshot()

    @pytest.mark.parametrize(
        ("change", "where"),
        [
            (lambda state: state.pop("entries"), "at entries"),
            (lambda state: state.update(lanes="2"), "at lanes"),
            (lambda state: state.update(schema_version=2), "at schema_version"),
            (lambda state: state["entries"][0].update(extra=1), "at entries.0.extra"),
            (lambda state: state["entries"].append(state["entries"][0]), "a has no one place in it"),
            (lambda state: state["leases"].clear(), "a has no one place in it"),
        ],
    )
    def test_a_damaged_snapshot(self, change: Any, where: str) -> None:
        jobs = queue(job("a"))
        jobs.join("l", 0)
        jobs.take("l", "x", 1, 0)
        state = json.loads(jobs.snapshot())
        change(state)
        with pytest.raises(StorageError) as caught:
            Queue.restored(json.dumps(state).encode(), "s3://b/state.json")
        assert str(caught.value).startswith("s3://b/state.json: ")
        assert where in str(caught.value)
        assert str(caught.value).endswith(
            "remove it, and the fleet goes on from what each job left in the bucket"
        )

    def test_no_json(self) -> None:
        with pytest.raises(StorageError, match=r"^x: not the state of a fleet, at its beginning; remove it"):
            Queue.restored(b"{", "x")


def test_bookkeeping_is_cheap() -> None:
    count = 500
    jobs = queue(*(job(f"{n}", f"{n % 3}", seconds=n) for n in range(count)), lanes=4)
    began_s = time.process_time()
    bases: dict[str, str | None] = {f"lane {n}": None for n in range(4)}
    for lane in bases:
        jobs.join(lane, 0)
    held: dict[str, list[str]] = {lane: [] for lane in bases}
    step = 0
    while not jobs.ended:
        for lane in bases:
            step += 1
            if held[lane]:
                jobs.finish(lane, held[lane].pop())
            offer = jobs.take(lane, bases[lane], 8 - len(held[lane]), 0)
            bases[lane] = offer.switch_to or bases[lane]
            held[lane] += offer.jobs
            if step % 10 == 0:
                jobs.snapshot()
    assert jobs.counts["done"] == count
    # A tenth of what 500 jobs may take.
    assert time.process_time() - began_s < count * 0.050 / 10


class Lanes(RuleBasedStateMachine):
    """Lanes that join, train, fall silent and come back, against what they know themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.joined = 0
        self.held: dict[str, set[str]] = {}
        self.bases: dict[str, str | None] = {}
        self.ends: Counter[str] = Counter()

    @initialize(
        shapes=st.lists(
            st.tuples(st.sampled_from("xyz"), st.floats(0, 100), st.booleans(), st.integers(0, 3)),
            min_size=1,
            max_size=12,
        ),
        stop=st.booleans(),
    )
    def begin(self, shapes: list[tuple[str, float, bool, int]], stop: bool) -> None:
        self.queue = Queue(
            [
                job(f"{n}", base, seconds, shares_batch=shares, max_restarts=restarts)
                for n, (base, seconds, shares, restarts) in enumerate(shapes)
            ],
            lanes=2,
            lease_s=LEASE_S,
            on_failure="stop" if stop else "continue",
        )

    @rule()
    def join(self) -> None:
        lane = f"lane {self.joined}"
        self.joined += 1
        self.queue.join(lane, self.now)
        self.held[lane], self.bases[lane] = set(), None

    @precondition(lambda self: self.held)
    @rule(data=st.data(), slots=st.integers(1, 4))
    def take(self, data: st.DataObject, slots: int) -> None:
        lane = data.draw(st.sampled_from(sorted(self.held)))
        held, base = self.held[lane], self.bases[lane]
        offer = self.queue.take(lane, base, max(0, slots - len(held)), self.now)
        if offer.lost:
            del self.held[lane], self.bases[lane]
            return
        if offer.switch_to is not None:
            assert not held
            assert offer.switch_to != base
            self.bases[lane] = offer.switch_to
        for name in offer.jobs:
            entry = self.queue.entries[name]
            assert (entry.state, entry.lane, entry.job.base) == ("leased", lane, base)
            assert not self.queue.stopped
        held.update(offer.jobs)
        assert len(held) <= max(slots, len(held) - len(offer.jobs))
        if any(self.queue.entries[name].alone for name in held):
            assert len(held) == 1
        if offer.ended and not held:
            assert self.queue.stopped or not self.queue.counts["queued"]

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), fails=st.booleans())
    def end_one(self, data: st.DataObject, fails: bool) -> None:
        lane = data.draw(st.sampled_from(sorted(lane for lane, held in self.held.items() if held)))
        name = data.draw(st.sampled_from(sorted(self.held[lane])))
        self.held[lane].discard(name)
        accepted = self.queue.fail(lane, name, "bad") if fails else self.queue.finish(lane, name)
        self.ends[name] += accepted
        if accepted:
            assert self.queue.entries[name].state == ("failed" if fails else "done")

    @precondition(lambda self: self.held)
    @rule(data=st.data(), step=st.integers(1, 99))
    def renew(self, data: st.DataObject, step: int) -> None:
        lane = data.draw(st.sampled_from(sorted(self.held)))
        steps = dict.fromkeys(self.held[lane], step)
        if self.queue.renew(lane, self.now, steps):
            assert all(self.queue.entries[name].checkpoint_step == step for name in steps)
        else:
            del self.held[lane], self.bases[lane]

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for name in self.queue.expire(self.now):
            assert self.queue.entries[name].state in ("queued", "failed")

    @precondition(lambda self: self.held)
    @rule(data=st.data(), announced=st.booleans())
    def lose(self, data: st.DataObject, announced: bool) -> None:
        self.queue.lose(data.draw(st.sampled_from(sorted(self.held))), announced=announced)

    @rule()
    def go_on_elsewhere(self) -> None:
        self.queue = Queue.restored(self.queue.snapshot(), "state")

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), alone=st.booleans())
    def give_back(self, data: st.DataObject, alone: bool) -> None:
        lane = data.draw(st.sampled_from(sorted(lane for lane, held in self.held.items() if held)))
        name = data.draw(st.sampled_from(sorted(self.held[lane])))
        self.held[lane].discard(name)
        before = self.queue.entries[name].refused_by
        if self.queue.give_back(lane, name, "too small", alone=alone):
            twice = lane in before
            assert self.queue.entries[name].state == ("failed" if twice else "queued")
            self.ends[name] += twice

    @invariant()
    def every_job_is_in_one_place(self) -> None:
        entries = getattr(self, "queue", None) and self.queue.entries
        if not entries:
            return
        leased = {name: entry.lane for name, entry in entries.items() if entry.state == "leased"}
        assert Counter(entry.state for entry in entries.values()) == Counter(
            {state: count for state, count in self.queue.counts.items() if count}
        )
        # Whoever holds a lease knows of it: lanes hear of each job that they get.
        assert all(name in self.held[lane or ""] for name, lane in leased.items())
        for name, count in (+self.ends).items():
            assert count == 1
            assert entries[name].state in ("done", "failed")

    def teardown(self) -> None:
        """One more lane, that never dies, finishes all that is left."""
        if not hasattr(self, "queue"):
            return
        self.now += LEASE_S
        self.queue.expire(self.now)
        self.queue.join("last", self.now)
        base: str | None = None
        for _ in range(100):
            offer = self.queue.take("last", base, 4, self.now)
            base = offer.switch_to or base
            for name in offer.jobs:
                assert self.queue.finish("last", name)
            if offer.ended:
                break
        assert self.queue.ended
        assert self.queue.stopped or not self.queue.counts["queued"]


Lanes.TestCase.settings = settings(max_examples=30, stateful_step_count=25)
TestLanes = Lanes.TestCase
