"""The live view of a fleet: a fold over its events, and lines that fit any terminal."""

import re
from functools import reduce

from fleet_events import Model, histories, large_fleet, planned, result_of
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from raytune_ft.fleet.events import (
    FleetEnded,
    FleetEvent,
    FleetPlanned,
    JobDone,
    JobFailed,
    JobStarted,
    JobStepped,
    LaneEnded,
    LaneLoaded,
    LaneLost,
    LaneStarted,
    Notice,
    Progress,
)
from raytune_ft.fleet.view import FleetView, after, line_of, one_line, render


def fold(events: list[FleetEvent]) -> FleetView:
    return reduce(after, events, FleetView())


def shown(view: FleetView, width: int = 100, height: int = 24, now_s: float = 300.0) -> list[str]:
    return [line.plain.rstrip() for line in render(view, width, height, now_s)]


@given(histories())
def test_counts_are_what_the_events_say_and_add_up(history: tuple[list[FleetEvent], Model]) -> None:
    events, model = history
    view = fold(events)
    states = list(model.states.values())
    assert view.counts == {state: states.count(state) for state in ("running", "queued", "done", "failed")}
    assert sum(view.counts.values()) == len(model.states)
    assert set(view.lanes) == set(model.lanes)
    assert {name: job.lane for name, job in view.jobs.items() if job.lane} == model.lane_of


@given(histories(), st.integers(-1, 40), st.integers(0, 200))
def test_it_fits_any_terminal(history: tuple[list[FleetEvent], Model], height: int, width: int) -> None:
    lines = render(fold(history[0]), width, height, 1e5)
    assert len(lines) <= max(0, height)
    assert all(cell_len(line.plain) <= width for line in lines)
    assert all(line.plain.isprintable() for line in lines)


@given(histories())
def test_the_share_that_is_done_is_one_where_all_has_ended(
    history: tuple[list[FleetEvent], Model],
) -> None:
    events, model = history
    share = fold(events).done_share
    assert 0 <= share <= 1
    if len(model.ended) == len(model.states):
        assert share == 1


@given(histories(), st.integers(8, 40))
def test_what_is_left_out_is_counted(history: tuple[list[FleetEvent], Model], height: int) -> None:
    view = fold(history[0])
    lines = shown(view, width=200, height=height)
    running, failed = view.counts["running"], view.counts["failed"]
    headed = {"running": running, "failed": failed}
    for at, line in enumerate(lines):
        for word in [word for word in headed if line.split()[:1] == [word] and lines[at - 1] == ""]:
            below = lines[at + 1 :]
            rows = below[: below.index("")] if "" in below else below
            more = re.fullmatch(r"… and ([\d,]+) more", rows[-1])
            assert len(rows) + (int(more[1]) - 1 if more else 0) == headed.pop(word)
    # At eight lines both have a place.
    assert all(count == 0 for count in headed.values())


def test_two_hundred_jobs_in_a_terminal_of_24_lines() -> None:
    lines = shown(fold(large_fleet()), width=100)
    assert len(lines) == 24
    assert lines[:6] == [
        "tasks  ━━━━━━━━━━━━━━━━━━━━━━━━  34 %  12 min 3 s left",
        "32 running  117 queued  48 done  3 failed    4 lanes  8,123 tokens/s  5 min 0 s so far",
        "",
        "running                            step    loss  lane",
        "task0051-some-instruction-task  255/600  0.6273  lane-3",
        "task0052-some-instruction-task  260/600  0.6396  lane-0",
    ]
    assert lines[-6:-3] == ["… and 18 more", "", "failed"]
    assert [line.split()[0] for line in lines[-3:]] == [
        f"task00{number}-some-instruction-task" for number in (50, 49, 48)
    ]


def test_a_small_fleet_takes_as_many_lines_as_it_needs() -> None:
    events: list[FleetEvent] = [planned("sum", "diff")]
    title, counts = shown(fold(events))
    assert title == "tasks  ━━━━━━━━━━━━━━━━━━━━━━━━  0 %"
    assert counts == "0 running  2 queued  0 done  0 failed    no lane yet  0 tokens/s  5 min 0 s so far"
    events.append(LaneStarted(1, "lane-0", "node", "cpu"))
    assert "  1 lane (1 loading)  " in shown(fold(events))[1]
    events.append(LaneLoaded(2, "lane-0", "s3://models/tiny", 8, 1.0))
    assert "  1 lane  " in shown(fold(events))[1]


def test_before_the_jobs_are_known() -> None:
    assert shown(fold([Notice(1, "waiting")])) == ["Checking the fleet  5 min 0 s"]


def test_a_job_that_was_adopted_begins_where_it_goes_on() -> None:
    events = [
        planned("sum"),
        JobStarted(1, "sum", "lane-0", 0, 40),
        JobStepped(2, "sum", "lane-0", 30, 40, 0.5, 900),
        LaneLost(3, "lane-0", ("sum",), False, "killed"),
        JobStepped(3, "sum", "lane-0", 31, 40, 0.5, 900),
    ]
    lost = fold(events).jobs["sum"]
    assert (lost.state, lost.lane, lost.loss, lost.step) == ("queued", None, None, 30)
    again = fold([*events, JobStarted(4, "sum", "lane-1", 20, 40)]).jobs["sum"]
    assert (again.state, again.lane, again.step) == ("running", "lane-1", 20)


def test_what_has_ended_stays_as_it_ended() -> None:
    ended = [planned("sum"), JobFailed(1, "sum", None, "no data", before=True)]
    late = JobStepped(2, "sum", "lane-0", 3, 40, 0.5, 9)
    assert fold([*ended, late]).jobs == fold(ended).jobs
    unknown = JobDone(2, "other", "lane-0", result_of("other"))
    assert fold([*ended, unknown]).jobs == fold(ended).jobs


def test_a_log_has_a_line_for_what_matters() -> None:
    refused = {"gate": {"passed": False, "alias": "production"}}
    lines: list[tuple[FleetEvent, str | None]] = [
        (Notice(1, "waits for\n a GPU\x1b[2J"), "waits for a GPU\\x1b[2J"),
        (planned("a", "b"), "tasks: 2 jobs, lanes: 2"),
        (LaneStarted(1, "lane-0", "node", "cpu"), "lane-0: started on node, cpu"),
        (
            LaneLoaded(1, "lane-0", "s3://models/tiny", 8, 7.04),
            "lane-0: holds s3://models/tiny, 8 jobs at a time, loaded in 7.0 s",
        ),
        (
            LaneLost(1, "lane-0", ("a", "b"), True, "preempted"),
            "lane-0: lost with 2 running jobs: preempted",
        ),
        (JobDone(1, "a", "lane-0", result_of("a")), "a: done, exact match 2.0 % → 94.0 % of 50, a@v1"),
        (
            JobDone(1, "a", "lane-0", result_of("a", scores_before=None, scores_after=None, **refused)),
            "a: done, a@v1, but the gate of production refused",
        ),
        (JobFailed(1, "a", "lane-0", "2 problems:\n  x"), "a: failed: 2 problems: x"),
        (
            JobFailed(1, "a", None, "x", before=True),
            "a: failed before, and --retry-failed trains it again: x",
        ),
        (JobDone(1, "a", None, result_of("a"), before=True), None),
        (JobStarted(1, "a", "lane-0", 0, 40), None),
        (JobStepped(1, "a", "lane-0", 1, 40, 0.5, 9), None),
        (LaneEnded(1, "lane-0"), None),
        (FleetEnded(1, 1, 1, 0), None),
    ]
    assert [line_of(FleetView(), event) for event, _ in lines] == [line for _, line in lines]


def test_progress_in_a_line() -> None:
    *events, progress = large_fleet()
    assert line_of(fold([*events, progress]), progress) == (
        "32 running, 117 queued, 48 done, 3 failed  8,123 tokens/s  12 min 3 s left"
    )
    unknown = Progress(1, 0, 200, 0, 0, 0.0, None)
    assert line_of(fold([large_fleet()[0], unknown]), unknown) == (
        "0 running, 200 queued, 0 done, 0 failed  0 tokens/s"
    )


@given(st.text())
def test_one_line_is_one_line(text: str) -> None:
    assert one_line(text).isprintable()


def test_a_fleet_that_is_planned_has_all_jobs_queued() -> None:
    event = large_fleet()[0]
    assert isinstance(event, FleetPlanned)
    assert fold([event]).counts == {"running": 0, "queued": 200, "done": 0, "failed": 0}
