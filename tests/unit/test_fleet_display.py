"""What `raytune-ft fleet` shows: a live view on a terminal, plain lines elsewhere, and the end."""

import json
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from fleet_events import large_fleet, planned, result_of
from rich.console import Console

from raytune_ft.cli import fleet as command
from raytune_ft.cli.fleet import (
    PROGRESS_LINE_EVERY_S,
    FleetDisplay,
    fleet_json,
    print_fleet_result,
    raise_failures,
)
from raytune_ft.errors import GateRefused, TrainingError
from raytune_ft.fleet.events import (
    FleetResult,
    JobDone,
    JobFailed,
    JobOutcome,
    JobStarted,
    JobStepped,
    LaneLost,
    Notice,
    Progress,
)

GATE = {
    "alias": "production",
    "passed": False,
    "alias_version": 3,
    "refused": ["exact_match = 0.94, too low"],
}
RESULT = FleetResult(
    "tasks",
    (
        JobOutcome("sum", "done", result_of("sum")),
        JobOutcome("diff", "failed", reason="2 problems:\n  [bold]x[/]"),
        JobOutcome("negation", "done", result_of("negation", scores_after={"rougeL": 0.5}), before=True),
        JobOutcome("larger", "queued"),
    ),
    83.0,
)


class Clock:
    """Stands still until it is set."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(command.time, "monotonic", clock.monotonic)
    return clock


def _console(*, terminal: bool, height: int = 24) -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(
        file=file, force_terminal=terminal, width=100, height=height, color_system=None, legacy_windows=False
    ), file


def test_plain_lines_where_there_is_no_terminal() -> None:
    console, file = _console(terminal=False)
    with FleetDisplay(console) as display:
        display.update(planned("sum", "diff"))
        display.update(JobStarted(1, "sum", "lane-0", 0, 40))
        display.update(JobStepped(1, "sum", "lane-0", 1, 40, 0.5, 90))
        display.update(JobDone(2, "sum", "lane-0", result_of("sum")))
        display.update(JobFailed(3, "diff", "lane-0", "[bold]too long[/] " + "x" * 200))
    assert file.getvalue().splitlines() == [
        "tasks: 2 jobs, lanes: 2",
        "sum: done, exact match 2.0 % → 94.0 % of 50, sum@v1",
        "diff: failed: [bold]too long[/] " + "x" * 200,
    ]


def test_a_line_of_progress_now_and_then(clock: Clock) -> None:
    console, file = _console(terminal=False)
    with FleetDisplay(console) as display:
        display.update(planned("sum"))
        for second in range(31):
            display.update(Progress(second, 0, 1, 0, 0, float(second), None))
            clock.now_s += 1
        clock.now_s += 20
        display.update(Progress(second, 0, 1, 0, 0, 30.0, None))
    assert PROGRESS_LINE_EVERY_S == 10
    assert file.getvalue().splitlines()[1:] == [
        f"0 running, 1 queued, 0 done, 0 failed  {second} tokens/s" for second in (10, 20, 30)
    ]


def test_quiet_keeps_standard_output_for_the_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    with FleetDisplay(quiet=True) as display:
        display.update(planned("sum"))
    assert capsys.readouterr() == ("", "tasks: 1 jobs, lanes: 2\n")


def test_a_terminal_shows_the_view_below_what_is_to_stay() -> None:
    console, file = _console(terminal=True)
    with FleetDisplay(console) as display:
        for event in large_fleet():
            display.update(event)
        display.update(Notice(301, "waits for a node"))
        display.update(LaneLost(302, "lane-0", (), False, "its node is gone"))
        display._live.refresh()  # type: ignore[union-attr]  # drawn now, not a moment later
        shown = file.getvalue()
    assert "waits for a node" in shown
    assert "lane-0: lost with 0 running jobs: its node is gone" in shown
    last = shown[shown.rindex("tasks  ━") :]
    assert len(last.splitlines()) == 23
    assert "24 running  125 queued  48 done  3 failed" in last
    assert "task0000-some-instruction-task: done" not in shown
    # What was drawn is gone, so that the result stands alone.
    assert "\x1b[2K" in file.getvalue()[len(shown) :]


def test_drawing_two_hundred_jobs_costs_next_to_nothing() -> None:
    """One event a second of each running job, and four pictures a second, for 20 s."""
    console, _ = _console(terminal=True)
    events = large_fleet()
    steps = [event for event in events if isinstance(event, JobStepped)]
    display = FleetDisplay(console)
    for event in events:
        display.update(event)
    began_s = time.process_time()
    for _ in range(20):
        for event in steps:
            display.update(event)
        for _ in range(4):
            console.print(display)
    assert (time.process_time() - began_s) / 20 < 0.05


def test_the_json_line_has_every_job() -> None:
    found = json.loads(json.dumps(fleet_json(RESULT)))
    assert {key: found[key] for key in ("name", "done", "failed", "queued", "seconds")} == {
        "name": "tasks",
        "done": 2,
        "failed": 1,
        "queued": 1,
        "seconds": 83.0,
    }
    done, failed, before, queued = found["jobs"]
    assert done == {"name": "sum", "state": "done", "before": False, "reason": None, **result_of("sum")}
    assert (failed["state"], failed["reason"], failed["version"]) == ("failed", RESULT.jobs[1].reason, None)
    assert (before["before"], queued["state"], queued["scores_after"]) == (True, "queued", None)


def test_the_end_has_scores_reasons_and_the_page() -> None:
    console, file = _console(terminal=False)
    print_fleet_result(console, RESULT, Path("runs/tasks/report.html"))
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines() if line.strip()]
    assert [line for line in lines if "─" not in line] == [
        "job score before after examples version",
        "sum Exact match 2.0 % 94.0 % 50 sum@v1",
        "negation ROUGE-L – 50.0 % – negation@v1",
        "failed diff: 2 problems: [bold]x[/]",
        "Jobs 2 of 4 done, 1 of them before, 1 failed, 1 not begun, in 1 min 23 s",
        "Report runs/tasks/report.html",
    ]


def test_of_very_many_jobs_the_first_are_printed() -> None:
    console, file = _console(terminal=False)
    jobs = tuple(JobOutcome(f"task{at}", "done", result_of(f"task{at}")) for at in range(100))
    print_fleet_result(console, replace(RESULT, jobs=jobs), Path("report.html"))
    assert file.getvalue().count("Exact match") == 40
    assert "… and 60 more, see the report" in file.getvalue()


def test_failed_jobs_are_an_error_that_says_how_to_go_on() -> None:
    with pytest.raises(TrainingError) as failed:
        raise_failures(RESULT)
    assert str(failed.value) == (
        "tasks: 1 of 4 jobs failed: diff; 1 were not begun, for on_failure = stop; "
        "the same command with --retry-failed trains them again"
    )
    many = tuple(JobOutcome(f"task{at}", "failed", reason="x") for at in range(9))
    with pytest.raises(TrainingError, match="task0, task1, task2, task3, task4 and 4 others; the same"):
        raise_failures(replace(RESULT, jobs=many))


def test_what_the_scores_do_not_tell_is_told() -> None:
    notice = "8 of 50 references of the test split are longer than evaluate.max_new_tokens = 32"
    console, file = _console(terminal=False)
    job = JobOutcome("sum", "done", result_of("sum", notices=[notice]))
    print_fleet_result(console, replace(RESULT, jobs=(job,)), Path("report.html"))
    assert f"notice sum: {notice}" in file.getvalue()


def test_a_gate_that_refused_is_an_error_of_its_own() -> None:
    refused = JobOutcome("sum", "done", result_of("sum", gate=GATE))
    with pytest.raises(GateRefused, match=r"the gates of 1 of 1 jobs refused: sum$"):
        raise_failures(replace(RESULT, jobs=(refused,)))
    console, file = _console(terminal=False)
    print_fleet_result(console, replace(RESULT, jobs=(refused,)), Path("report.html"))
    assert "gate sum: refused, production was left at v3: exact_match = 0.94, too low" in file.getvalue()
    raise_failures(replace(RESULT, jobs=RESULT.jobs[:1]))
