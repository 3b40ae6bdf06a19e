"""How fast a fleet is said to be, and how much longer it is said to take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.fleet.events import JobDone, JobFailed, JobStarted, JobStepped, LaneStarted, PlannedJob
from raytune_ft.fleet.pace import Pace

JOBS = [PlannedJob("long", "base", 100, 1000, 300.0), PlannedJob("short", "base", 100, 1000, 100.0)]


def stepped(at_s: float, job: str, step: int, tokens: int) -> JobStepped:
    return JobStepped(at_s, job, "lane-1", step, 100, 1.0, tokens)


def test_nothing_is_said_before_anything_is_done() -> None:
    pace = Pace(JOBS)
    pace.add(LaneStarted(1.0, "lane-1", "node", "cpu"))
    pace.add(JobStarted(2.0, "long", "lane-1", 0, 100))
    found = pace.progress(3.0, {"queued": 1, "leased": 1})
    assert (found.running, found.queued, found.done, found.failed) == (1, 1, 0, 0)
    assert found.tokens_per_second == 0
    assert found.seconds_left is None


def test_time_left_is_the_open_work_at_the_pace_so_far() -> None:
    pace = Pace(JOBS)
    pace.add(JobStarted(10.0, "long", "lane-1", 0, 100))
    pace.add(stepped(30.0, "long", 50, 400))
    # 150 of 400 predicted seconds took 20.
    found = pace.progress(30.0, {})
    assert found.seconds_left == pytest.approx(250 * 20 / 150)
    assert found.tokens_per_second == pytest.approx(400 / 20)
    pace.add(JobDone(50.0, "long", "lane-1", {}))
    pace.add(JobFailed(50.0, "short", "lane-1", "no good"))
    assert pace.progress(50.0, {}).seconds_left == 0


def test_what_earlier_lanes_did_is_no_work_of_now() -> None:
    pace = Pace(JOBS)
    pace.add(JobDone(0.0, "short", None, {}, before=True))
    pace.add(JobStarted(10.0, "long", "lane-2", 50, 100))
    pace.add(stepped(20.0, "long", 60, 600))
    found = pace.progress(20.0, {})
    assert found.tokens_per_second == pytest.approx(100 / 10)
    assert found.seconds_left == pytest.approx(120 * 10 / 30)


def test_only_the_last_half_minute_counts() -> None:
    pace = Pace(JOBS)
    pace.add(JobStarted(0.0, "long", "lane-1", 0, 100))
    pace.add(stepped(10.0, "long", 10, 1000))
    pace.add(stepped(90.0, "long", 20, 1300))
    assert pace.progress(100.0, {}).tokens_per_second == pytest.approx(650 / 30)


@given(
    st.lists(st.tuples(st.sampled_from(["long", "short"]), st.integers(0, 100), st.booleans()), max_size=30)
)
def test_it_never_goes_below_nothing(told: list[tuple[str, int, bool]]) -> None:
    pace = Pace(JOBS)
    for at, (name, step, anew) in enumerate(told):
        if anew:
            pace.add(JobStarted(float(at), name, "lane-1", step, 100))
        pace.add(stepped(float(at), name, step, 10 * step))
        found = pace.progress(float(at), {})
        assert found.tokens_per_second >= 0
        assert found.seconds_left is None or found.seconds_left >= 0


def test_what_failed_took_no_time_and_its_last_steps_are_told_late() -> None:
    pace = Pace([*JOBS, *(PlannedJob(f"bad-{at}", "base", 100, 1000, 100.0) for at in range(50))])
    for at in range(50):
        pace.add(JobFailed(1.0, f"bad-{at}", "lane-1", "no such file"))
    pace.add(JobStarted(10.0, "long", "lane-1", 0, 100))
    pace.add(stepped(30.0, "long", 50, 400))
    assert pace.progress(30.0, {}).seconds_left == pytest.approx(250 * 20 / 150)
    pace.add(JobStarted(30.0, "short", "lane-1", 0, 100))
    pace.add(JobFailed(30.0, "short", "lane-1", "the loss is nan"))
    pace.add(stepped(30.0, "short", 20, 200))
    pace.add(JobStarted(30.0, "short", "lane-0", 0, 100))
    found = pace.progress(30.0, {})
    assert found.seconds_left == pytest.approx(150 * 20 / 150)
    assert found.tokens_per_second == pytest.approx(600 / 20)
