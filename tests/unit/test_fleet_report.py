"""A fleet's page: whole, self-contained, safe to open, and true to its figures."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fleet_events import Model, histories, large_fleet, planned, result_of
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.chart import overlay
from raytune_ft.fleet.events import (
    FleetEvent,
    FleetResult,
    JobDone,
    JobFailed,
    JobOutcome,
    JobStarted,
    JobStepped,
    LaneEnded,
    LaneLost,
    LaneStarted,
)
from raytune_ft.fleet.lane_times import Span, in_rows, lane_times
from raytune_ft.fleet.report import job_rows, lane_rows, time_ticks, write_fleet_report

HOSTILE = "</title><script>alert('1')</script><img src=x onerror=\"alert(2)\">{{ 7*7 }} & 'quotes'"


def _done(name: str, lane: str, at_s: float, **changes: Any) -> JobDone:
    return JobDone(at_s, name, lane, result_of(name, **changes), ((1, 5.0), (20, 1.0), (40, 0.125)))


EVENTS: tuple[FleetEvent, ...] = (
    planned("sum", "diff", "negation"),
    LaneStarted(2.0, "lane-0", "node-a", "cpu"),
    JobStarted(10.0, "sum", "lane-0", 0, 40),
    JobStarted(10.0, "diff", "lane-0", 0, 40),
    LaneLost(40.0, "lane-0", ("sum", "diff"), False, "its node is gone"),
    LaneStarted(50.0, "lane-1", "node-b", "NVIDIA L4"),
    JobStarted(60.0, "sum", "lane-1", 20, 40),
    JobStarted(60.0, "diff", "lane-1", 0, 40),
    JobFailed(70.0, "diff", "lane-1", "step 3: the loss is nan at learning rate 0.1"),
    _done("sum", "lane-1", 90.0),
    LaneEnded(95.0, "lane-1"),
)
RESULT = FleetResult(
    "tasks",
    (
        JobOutcome("sum", "done", result_of("sum")),
        JobOutcome("diff", "failed", reason="step 3: the loss is nan at learning rate 0.1"),
        JobOutcome("negation", "done", result_of("negation", adapter="words", version=7), before=True),
    ),
    100.0,
    EVENTS,
)


def _page(tmp_path: Path, result: FleetResult) -> Page:
    write_fleet_report(result, tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def _count(page: Page, name: str) -> int:
    return len(page.of_class(name))


def test_the_page_says_on_what_the_scores_were_measured(tmp_path: Path) -> None:
    notice = "8 of 50 references of the test split are longer than evaluate.max_new_tokens = 32"
    job = JobOutcome("sum", "done", result_of("sum", notices=[notice]))
    page = _page(tmp_path, replace(RESULT, jobs=(job,)))
    assert "of 50" in page.text
    assert notice in page.text


def test_the_page_shows_the_fleet(tmp_path: Path) -> None:
    page = _page(tmp_path, RESULT)
    for text in (
        *("2 of 3", "1 of them in an earlier run", "94.0 %", "before: 2.0 %", "+92.0", "mean of 2 jobs"),
        *("step 3: the loss is nan at learning rate 0.1", "v1", "words@v7", "s3://models/tiny"),
        *("lane-0", "node-b, NVIDIA L4", "lost: its node is gone", "1 min 40 s", "0.1250"),
    ):
        assert text in page.text, text
    assert _count(page, "job") == 4
    assert (_count(page, "lost"), _count(page, "failed"), _count(page, "done")) == (2, 1, 1)
    assert _count(page, "spark") == 1


def test_it_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    hostile = FleetResult(
        HOSTILE,
        (JobOutcome("sum", "done", result_of("sum", uri=HOSTILE)), JobOutcome("a", "failed", reason=HOSTILE)),
        100.0,
        (
            replace(planned("sum"), jobs=(replace(planned("sum").jobs[0], base=HOSTILE),)),
            LaneStarted(2.0, "lane-0", HOSTILE, HOSTILE),
            JobStarted(3.0, "sum", "lane-0", 0, 40),
            LaneLost(4.0, "lane-0", ("sum",), False, HOSTILE),
        ),
    )
    page = _page(tmp_path, hostile)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "a", "form", "iframe"})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 6
    addresses = [
        attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes
    ]
    assert addresses == ["data:,"]
    style = (tmp_path / "report.html").read_text(encoding="utf-8").partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


@settings(max_examples=25)
@given(histories())
def test_every_history_is_a_page(
    tmp_path_factory: pytest.TempPathFactory, history: tuple[list[FleetEvent], Model]
) -> None:
    events, model = history
    jobs = tuple(model.ended.get(name, JobOutcome(name, "queued")) for name in model.states)
    result = FleetResult("tasks", jobs, events[-1].at_s, tuple(events))
    rows = job_rows(result)
    assert [(row.name, row.state) for row in rows] == [(job.name, job.state) for job in jobs]
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_fleet_report(result, path)
    page = Page(path.read_text(encoding="utf-8"))
    assert _count(page, "job") == sum(isinstance(event, JobStarted) for event in events)


def test_two_hundred_jobs_are_a_page_of_moderate_size(tmp_path: Path) -> None:
    events = [
        event for event in large_fleet(done=197, failed=3, running=0) if not isinstance(event, JobStepped)
    ]
    jobs = tuple(
        JobOutcome(event.job, "done", event.result)
        if isinstance(event, JobDone)
        else JobOutcome(event.job, "failed", reason=event.reason)
        for event in events
        if isinstance(event, JobDone | JobFailed)
    )
    write_fleet_report(FleetResult("tasks", jobs, 400.0, tuple(events)), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


@given(histories())
def test_a_jobs_time_lies_within_its_lanes(history: tuple[list[FleetEvent], Model]) -> None:
    events, _ = history
    end_s = events[-1].at_s
    lanes = lane_times(events, end_s)
    for lane in lanes:
        assert 0 <= lane.begin_s <= lane.end_s <= end_s
        assert all(lane.begin_s <= span.begin_s <= span.end_s <= lane.end_s for span in lane.spans)
    times: dict[str, list[Span]] = {}
    for span in sorted((span for lane in lanes for span in lane.spans), key=lambda span: span.begin_s):
        times.setdefault(span.job, []).append(span)
    # A job is on one lane at a time, and nothing follows its end.
    for spans in times.values():
        assert all(one.end_s <= other.begin_s for one, other in pairwise(spans))
        assert all(span.ending == "lost" for span in spans[:-1])
    for row in lane_rows(lanes, end_s):
        assert -1e-9 <= row.left <= row.left + row.width <= 100 + 1e-9


spans = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 20)).map(
        lambda at: Span("job", at[0], at[0] + at[1], "done")
    ),
    max_size=30,
).map(lambda found: sorted(found, key=lambda span: (span.begin_s, span.end_s)))


@given(spans)
def test_as_few_rows_as_jobs_at_a_time(found: list[Span]) -> None:
    rows = in_rows(found)
    assert sorted((s.begin_s, s.end_s) for row in rows for s in row) == [(s.begin_s, s.end_s) for s in found]
    assert all(one.end_s <= other.begin_s for row in rows for one, other in pairwise(row))
    at_once = [sum(s.begin_s <= at < s.end_s for s in found) for at in range(71)]
    assert len(rows) == max(at_once)


@given(st.floats(0, 1e6))
def test_ticks_of_time_are_few_and_inside(whole_s: float) -> None:
    ticks = time_ticks(whole_s)
    assert 1 <= len(ticks) <= 12
    assert all(0 <= tick.percent <= 100 for tick in ticks)
    assert len({tick.text for tick in ticks}) == len(ticks)


curves = st.dictionaries(
    st.text(min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 500), st.floats(width=32)), min_size=1, max_size=30).map(sorted),
    max_size=6,
)


@given(curves)
def test_curves_that_share_a_box_stay_inside(found: dict[str, list[tuple[int, float]]]) -> None:
    drawn = overlay("Losses", found, 10)
    assert [curve.name for curve in drawn.curves] == list(found)
    numbers = [
        float(text)
        for curve in drawn.curves
        for line in curve.lines
        for pair in line[1:].split("L")
        for text in pair.split()
    ]
    assert all(-0.01 <= number <= 100.01 for number in numbers)
    assert all(len(line.split("L")) <= 10 for curve in drawn.curves for line in curve.lines)


def test_curves_that_share_a_box_share_its_axes() -> None:
    drawn = overlay("Losses", {"a": [(0, 0.0), (10, 3.0)], "b": [(0, 3.5), (5, 2.0)]}, 100)
    assert [curve.lines for curve in drawn.curves] == [
        ("M0.00 100.00L100.00 25.00",),
        ("M0.00 12.50L50.00 50.00",),
    ]
    assert [tick.text for tick in drawn.values] == ["0", "1", "2", "3", "4"]
