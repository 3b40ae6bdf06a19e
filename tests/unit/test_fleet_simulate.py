"""The simulator: no work is lost or made up, more GPUs never take longer, and bounds on schedules hold."""

import time
from collections import Counter, defaultdict
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.errors import SpecError
from raytune_ft.fleet.entry import QueuedJob
from raytune_ft.fleet.simulate import Forecast, Preemptions, Resident, Task, forecasts, simulate
from raytune_ft.fleet.work import LaneSpeed, Work

START_S = 5.0
STEADY = LaneSpeed(round_s=1.0, job_s=0.0, token_s=0.0)
"""A step takes a second, whoever else is on the lane: slots are equal machines."""
SHARED = LaneSpeed(round_s=0.03, job_s=0.02, token_s=0.001)


def task(
    name: str, steps: int, base: str = "x", tokens_per_step: int = 100, every: int = 10, **changes: Any
) -> Task:
    work = Work(steps, steps * tokens_per_step)
    job = QueuedJob(name, name, base, SHARED.alone(work), **changes)
    return Task(job, work, every)


def resident(slots: int, speed: LaneSpeed = SHARED, load_s: float = 3.0) -> Resident:
    return Resident(slots, speed, load_s)


@st.composite
def fleets(draw: st.DrawFn, bases: str = "xyz") -> tuple[list[Task], dict[str, Resident]]:
    shapes = draw(
        st.lists(
            st.tuples(
                st.integers(1, 60),
                st.sampled_from(bases),
                st.integers(1, 2000),
                st.sampled_from([True] * 4 + [False]),
            ),
            min_size=1,
            max_size=14,
        )
    )
    tasks = [
        task(f"{n}", steps, base, tokens, shares_batch=shares)
        for n, (steps, base, tokens, shares) in enumerate(shapes)
    ]
    residents = {
        base: resident(draw(st.integers(1, 4)), load_s=draw(st.sampled_from([0.0, 4.0]))) for base in bases
    }
    return tasks, residents


def check_stays(forecast: Forecast, tasks: list[Task], residents: dict[str, Resident]) -> None:
    """Every job ends once; lanes hold one base at a time, and no more jobs than they have slots."""
    ends = Counter(stay.job for stay in forecast.stays if stay.finished)
    assert ends == Counter(task.job.name for task in tasks)
    by_lane = defaultdict(list)
    shares = {task.job.name: task.job.shares_batch for task in tasks}
    for stay in forecast.stays:
        by_lane[stay.lane].append(stay)
    for stays in by_lane.values():
        for stay in stays:
            # Those there when it came, itself included.
            there = [other for other in stays if other.start_s <= stay.start_s < other.end_s]
            assert {other.base for other in there} <= {stay.base}
            assert len(there) <= residents[stay.base].slots
            if not all(shares[other.job] for other in there):
                assert len(there) <= 1


class TestWork:
    @given(fleets(), st.integers(1, 5))
    def test_all_jobs_are_trained_and_nothing_else_is(
        self, fleet: tuple[list[Task], dict[str, Resident]], lanes: int
    ) -> None:
        tasks, residents = fleet
        forecast = simulate(tasks, residents, lanes, start_s=START_S)
        check_stays(forecast, tasks, residents)
        assert forecast.steps == sum(task.work.steps for task in tasks)
        assert (forecast.preemptions, forecast.lanes <= lanes) == (0, True)
        assert len({task.job.base for task in tasks}) <= forecast.base_loads
        assert forecast.training_s <= forecast.gpu_s + 1e-6
        assert forecast.gpu_s <= forecast.lanes * forecast.makespan_s + 1e-6

    @given(fleets(), st.integers(1, 5))
    def test_no_faster_than_the_longest_job_and_than_full_lanes(
        self, fleet: tuple[list[Task], dict[str, Resident]], lanes: int
    ) -> None:
        tasks, residents = fleet
        forecast = simulate(tasks, residents, lanes, start_s=START_S)
        longest = max(residents[one.job.base].load_s + one.job.seconds for one in tasks)
        assert forecast.makespan_s >= START_S + longest - 1e-6
        # On a lane that never idles, a step costs at least this, whatever share of a round it takes.
        least = sum(one.work.steps * SHARED.job_s + one.work.tokens * SHARED.token_s for one in tasks)
        assert forecast.makespan_s >= START_S + least / lanes - 1e-6

    @given(fleets(), st.randoms())
    def test_the_order_of_the_jobs_means_nothing(
        self, fleet: tuple[list[Task], dict[str, Resident]], shuffle: Any
    ) -> None:
        tasks, residents = fleet
        preemptions = Preemptions(per_hour=60, seed=3)
        forecast = simulate(tasks, residents, 3, start_s=START_S, preemptions=preemptions)
        mixed = list(tasks)
        shuffle.shuffle(mixed)
        assert simulate(mixed, residents, 3, start_s=START_S, preemptions=preemptions) == forecast


class TestGpus:
    @given(fleets())
    def test_more_never_take_longer(self, fleet: tuple[list[Task], dict[str, Resident]]) -> None:
        found = forecasts(*fleet, [1, 2, 3, 4, 8], start_s=START_S)
        times = [forecast.makespan_s for forecast in found]
        assert times == sorted(times, reverse=True)
        assert all(forecast.lanes <= forecast.gpus for forecast in found)

    @given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 2), st.integers(1, 2))
    @settings(max_examples=60)
    def test_the_longest_first_is_near_the_best(self, lengths: list[int], lanes: int, slots: int) -> None:
        machines = lanes * slots
        tasks = [task(f"{n}", steps) for n, steps in enumerate(lengths)]
        forecast = simulate(tasks, {"x": resident(slots, STEADY, 0.0)}, lanes, start_s=0.0)
        best = min(
            max(
                sum(steps for steps, at in zip(lengths, where, strict=True) if at == n)
                for n in range(machines)
            )
            for where in product(range(machines), repeat=len(lengths))
        )
        # Graham 1969, theorem 2.
        assert best <= round(forecast.makespan_s, 6) <= (4 / 3 - 1 / (3 * machines)) * best + 1e-6

    def test_lanes_share_evenly(self) -> None:
        tasks = [task(f"{n}", 10) for n in range(8)]
        forecast = simulate(tasks, {"x": resident(8)}, 2, start_s=START_S)
        assert Counter(stay.lane for stay in forecast.stays) == {0: 4, 1: 4}

    def test_by_hand(self) -> None:
        tasks = [task("long", 30), task("short", 10), task("next", 10, "y")]
        forecast = simulate(tasks, {base: resident(2) for base in "xy"}, 1, start_s=START_S)
        together, alone = SHARED.seconds(2, 200), SHARED.seconds(1, 100)
        training_s = 10 * together + 20 * alone + 10 * alone
        assert forecast.training_s == pytest.approx(training_s)
        assert forecast.makespan_s == forecast.gpu_s == pytest.approx(START_S + 3 + 3 + training_s)
        assert forecast.base_loads == 2
        assert forecast.idle_share == pytest.approx(11 / (11 + training_s))
        assert forecast.gpu_hours == forecast.gpu_s / 3600

    def test_a_thousand_jobs_on_many_gpus_take_no_time(self) -> None:
        tasks = [task(f"{n}", 20 + n % 97, "xy"[n % 2], 50 + n % 301) for n in range(1000)]
        began_s = time.process_time()
        found = forecasts(tasks, {base: resident(16) for base in "xy"}, [1, 2, 4, 8, 16, 32, 64], start_s=20)
        assert time.process_time() - began_s < 4
        assert found[0].makespan_s > 40 * found[-1].makespan_s


class TestPreemptions:
    @given(fleets(), st.integers(1, 3), st.integers(0, 99))
    @settings(max_examples=60)
    def test_what_is_repeated_is_less_than_a_checkpoint_of_each(
        self, fleet: tuple[list[Task], dict[str, Resident]], lanes: int, seed: int
    ) -> None:
        tasks, residents = fleet
        losses = Preemptions(per_hour=90, seed=seed)
        forecast = simulate(tasks, residents, lanes, start_s=START_S, preemptions=losses)
        check_stays(forecast, tasks, residents)
        repeated = forecast.steps - sum(task.work.steps for task in tasks)
        cut_off = sum(not stay.finished for stay in forecast.stays)
        assert 0 <= repeated <= cut_off * 9
        assert forecast == simulate(tasks, residents, lanes, start_s=START_S, preemptions=losses)

    def test_they_cost_time(self) -> None:
        tasks = [task(f"{n}", 400) for n in range(16)]
        calm, stormy = (
            simulate(tasks, {"x": resident(4)}, 2, start_s=START_S, preemptions=losses)
            for losses in (None, Preemptions(per_hour=30))
        )
        assert stormy.preemptions > 0
        assert stormy.makespan_s > calm.makespan_s
        assert stormy.base_loads > calm.base_loads
        assert stormy.idle_share > calm.idle_share

    def test_lanes_that_never_come_to_a_checkpoint(self) -> None:
        with pytest.raises(SpecError, match=r"^--preemptions 36000: lanes would be lost faster"):
            simulate(
                [task("a", 400, every=400)],
                {"x": resident(1)},
                1,
                start_s=START_S,
                preemptions=Preemptions(per_hour=36000),
            )
