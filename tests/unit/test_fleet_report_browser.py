"""A fleet's page in Chromium: narrow, dark, hostile, and with hundreds of jobs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium.browser import Browser, ChromiumUnavailable, run_chromium
from fleet_events import large_fleet, planned, result_of

from raytune_ft.fleet.events import (
    FleetResult,
    JobDone,
    JobFailed,
    JobOutcome,
    JobStarted,
    JobStepped,
    LaneLost,
    LaneStarted,
    Progress,
)
from raytune_ft.fleet.report import write_fleet_report

ATTACK = (
    "</script><script>console.log('ran')</script><img src=http://127.0.0.1:9/x onerror=console.log('ran')>"
)
HEIGHT = 800
SCORES = {"exact_match": 0.9, "rouge1": 0.8, "rougeL": 0.7}


def large_result() -> FleetResult:
    """200 jobs on four lanes, of which three failed, and one whose lane was lost."""
    events = [
        event
        for event in large_fleet(running=0, done=197, failed=3)
        if not isinstance(event, JobStepped | Progress)
    ]
    jobs = [
        JobOutcome(event.job, "failed", reason=event.reason)
        if isinstance(event, JobFailed)
        else JobOutcome(event.job, "done", result_of(event.job, scores_after=SCORES))
        for event in events
        if isinstance(event, JobDone | JobFailed)
    ]
    return FleetResult("tasks", tuple(jobs), 420.0, tuple(events))


def hostile_result() -> FleetResult:
    events = (
        planned("sum"),
        LaneStarted(1.0, "lane-0", ATTACK, ATTACK),
        JobStarted(2.0, "sum", "lane-0", 0, 40),
        LaneLost(9.0, "lane-0", ("sum",), False, ATTACK),
    )
    return FleetResult(ATTACK, (JobOutcome("sum", "failed", reason=ATTACK * 3),), 10.0, events)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        with run_chromium(tmp_path_factory.mktemp("chromium")) as browser:
            yield browser
    except ChromiumUnavailable as error:
        pytest.skip(str(error))


def open_page(browser: Browser, result: FleetResult, folder: Path) -> str:
    """Write the page and open it; at the end of a test nothing else may have been asked for."""
    browser.requests.clear()
    browser.complaints.clear()
    write_fleet_report(result, folder / "report.html")
    uri = (folder / "report.html").as_uri()
    browser.emulate(1200, HEIGHT, scheme="light")
    browser.open(uri)
    return uri


def test_every_job_has_a_row_and_a_bar_inside_its_lane(chromium: Browser, tmp_path: Path) -> None:
    uri = open_page(chromium, large_result(), tmp_path)
    assert chromium.evaluate("document.querySelectorAll('#jobs tbody tr').length") == 200
    assert chromium.evaluate("document.querySelectorAll('.job').length") == 200
    outside = """[...document.querySelectorAll('.job')].filter(bar => {
        const own = bar.getBoundingClientRect();
        const held = bar.parentElement.querySelector('.held').getBoundingClientRect();
        return own.width < 1 || own.left < held.left - 1 || own.right > held.right + 3;
    }).length"""
    assert chromium.evaluate(outside) == 0
    assert chromium.evaluate("document.querySelectorAll('.curves .line').length") == 197
    assert {request.partition("#")[0] for request in chromium.requests} == {uri}
    assert chromium.complaints == []


@pytest.mark.parametrize("width", [400, 700, 1200])
@pytest.mark.parametrize("result", [large_result(), hostile_result()], ids=["large", "hostile"])
def test_nothing_is_wider_than_the_window(
    chromium: Browser, tmp_path: Path, result: FleetResult, width: int
) -> None:
    open_page(chromium, result, tmp_path)
    chromium.emulate(width, HEIGHT, scheme="light")
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_texts_are_texts(chromium: Browser, tmp_path: Path) -> None:
    uri = open_page(chromium, hostile_result(), tmp_path)
    assert chromium.evaluate("document.images.length + document.scripts.length") == 0
    assert chromium.evaluate("document.querySelector('h1').textContent") == ATTACK
    assert ATTACK in chromium.evaluate("document.querySelector('.lane').textContent")
    assert {request.partition("#")[0] for request in chromium.requests} == {uri}
    assert chromium.complaints == []


def test_it_is_as_dark_as_its_reader_likes(chromium: Browser, tmp_path: Path) -> None:
    open_page(chromium, large_result(), tmp_path)
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    light = chromium.evaluate(colours)
    chromium.emulate(1200, HEIGHT, scheme="dark")
    dark = chromium.evaluate(colours)
    assert [sum(map(int, colour[4:-1].split(","))) > 384 for colour in (*light, *dark)] == [
        *(True, False),
        *(False, True),
    ]
