"""`raytune-ft fleet`: train a fleet's jobs, show them while they run, and what became of them."""

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from raytune_ft.errors import GateRefused, TrainingError
from raytune_ft.fleet.events import FleetEvent, FleetResult, JobOutcome, LaneLost, Notice, Progress
from raytune_ft.fleet.report import write_fleet_report
from raytune_ft.fleet.view import FleetView, after, line_of, main_scores, one_line, render
from raytune_ft.report import duration_text, examples_of, outcome_texts, scale_for
from raytune_ft.spec import FleetSpec
from raytune_ft.storage import disk_errors
from raytune_ft.terminal import visible

PROGRESS_LINE_EVERY_S = 10.0
_REFRESHES_PER_S = 4
_MOST_ROWS = 40
_MOST_NAMES = 5
REPORT_FILE = "report.html"
RESULT_FILE = "result.json"


def fleet_command(
    fleet: FleetSpec,
    file: Path,
    output: Path,
    *,
    retry_failed: bool,
    cache: bool,
    wait_s: float,
    as_json: bool,
) -> None:
    """Train the jobs of a fleet, or go on with those that are not done; print what became of each.

    Args:
        fleet: the checked fleet file.
        file: where it stands.
        output: local folder for the report and the result.
        retry_failed: train what failed before once more.
        cache: keep tokenised data in the bucket, and take it from there.
        wait_s: how long to wait for an autoscaler to bring the first GPU.
        as_json: print one line of JSON on standard output, and all else on standard error.

    Raises:
        BadInput: found before anything was trained.
        TrainingError: jobs failed; raised after all has ended and is printed.
        GateRefused: all jobs are published, but gates did not let their aliases move.
        StorageError: the store failed for longer than the retries last.
    """
    # Ray prints of lost nodes where only the result may stand.
    with FleetDisplay(quiet=as_json) as display, redirect_stdout(sys.stderr if as_json else sys.stdout):
        from raytune_ft.fleet.run import run_fleet

        result = run_fleet(
            fleet,
            output,
            place_name=str(file),
            retry_failed=retry_failed,
            cache=cache,
            wait_s=wait_s,
            on_event=display.update,
        )
        report = _keep(result, output)
    if as_json:
        print(json.dumps(fleet_json(result)))  # noqa: T201  the one line that a program reads
    else:
        print_fleet_result(Console(), result, report)
    raise_failures(result)


class FleetDisplay:
    """Shows the events of a fleet: a live view on a terminal, few plain lines elsewhere. A context manager.

    Args:
        console: where to show them; standard output where not given.
        quiet: keep standard output for the JSON line, and show them on standard error.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console or Console(stderr=quiet)
        self._view = FleetView()
        self._began_s = time.monotonic()
        self._last_line_s = self._began_s
        self._last_progress: str | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # It is drawn by a thread, from a view that never changes: another one takes its place.
            self._live = Live(
                self, console=self._console, refresh_per_second=_REFRESHES_PER_S, transient=True
            )
            self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The last line is the cursor's.
        height, now_s = console.height - 1, time.monotonic() - self._began_s
        yield from render(self._view, options.max_width, height, now_s)

    def update(self, event: FleetEvent) -> None:
        """Show one event."""
        self._view = after(self._view, event)
        if self._live is not None and not isinstance(event, Notice | LaneLost):
            return
        line = line_of(self._view, event)
        if line is None or (isinstance(event, Progress) and not self._is_due(line)):
            return
        self._console.print(visible(line), markup=False, highlight=False, soft_wrap=True)

    def _is_due(self, progress: str) -> bool:
        """Whether a line of progress has anything to say that a log has not."""
        now_s = time.monotonic()
        if now_s - self._last_line_s < PROGRESS_LINE_EVERY_S or progress == self._last_progress:
            return False
        self._last_line_s, self._last_progress = now_s, progress
        return True


def fleet_json(result: FleetResult) -> dict[str, Any]:
    """The line that `--json` prints; what a job has not is null."""
    return {
        "name": result.fleet,
        "done": result.count("done"),
        "failed": result.count("failed"),
        "queued": result.count("queued"),
        "seconds": result.seconds,
        "jobs": [_job_json(job) for job in result.jobs],
    }


def _job_json(job: JobOutcome) -> dict[str, Any]:
    nothing = dict.fromkeys(("adapter", "version", "uri", "scores_before", "scores_after"))
    return {
        "name": job.name,
        "state": job.state,
        "before": job.before,
        "reason": job.reason,
        **nothing,
        **(job.result or {}),
    }


def _keep(result: FleetResult, output: Path) -> Path:
    """Write what a person reads afterwards; where nothing was trained, the page of the last run stays."""
    report = output / REPORT_FILE
    with disk_errors(str(output)):
        output.mkdir(parents=True, exist_ok=True)
        (output / RESULT_FILE).write_text(json.dumps(fleet_json(result)) + "\n")
        if not (report.is_file() and all(job.before for job in result.jobs)):
            write_fleet_report(result, report)
    return report


def print_fleet_result(console: Console, result: FleetResult, report: Path) -> None:
    """Print the end of a fleet: each job with its scores, failures with their reasons, where the page is."""
    done = [job for job in result.jobs if job.state == "done"]
    console.print()
    if done:
        console.print(_scores_table(done[:_MOST_ROWS]))
        if len(done) > _MOST_ROWS:
            console.print(f"… and {len(done) - _MOST_ROWS:,} more, see the report", style="dim")
        console.print()
    for job in result.jobs:
        if job.state == "failed":
            console.print(
                f"[red]failed[/] {escape(job.name)}: {escape(one_line(job.reason or ''))}",
                soft_wrap=True,
                highlight=False,
            )
        for notice in (job.result or {}).get("notices", ()):
            console.print(
                f"[yellow]notice[/] {escape(job.name)}: {escape(one_line(notice))}",
                soft_wrap=True,
                highlight=False,
            )
        refused = _refusal(job)
        if refused:
            console.print(
                f"[red]gate[/] {escape(job.name)}: {escape(visible(refused))}",
                soft_wrap=True,
                highlight=False,
            )
    lines = {"Jobs": _counted(result), "Report": str(report)}
    for title, text in lines.items():
        console.print(f"[dim]{title:8}[/] {escape(visible(text))}", soft_wrap=True, highlight=False)


def _counted(result: FleetResult) -> str:
    before = sum(job.before and job.state == "done" for job in result.jobs)
    parts = [f"{result.count('done'):,} of {len(result.jobs):,} done"]
    parts += [f"{before:,} of them before"] if before else []
    parts += [f"{result.count('failed'):,} failed"] if result.count("failed") else []
    parts += [f"{result.count('queued'):,} not begun"] if result.count("queued") else []
    return f"{', '.join(parts)}, in {duration_text(result.seconds)}"


def _scores_table(jobs: list[JobOutcome]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("job", "score", "before", "after", "examples", "version"):
        numbers = ("before", "after", "examples")
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for job in jobs:
        result = job.result or {}
        before, scores = result.get("scores_before") or {}, result.get("scores_after") or {}
        cells = ["", "–", "–", "–"]
        for name in main_scores(scores)[:1]:
            scale = scale_for(name)
            was = scale.text(before[name]) if name in before else "–"
            examples = examples_of(result).get(name)
            of = "–" if examples is None else f"{examples:,}"
            cells = [scale.label, was, f"[bold]{scale.text(scores[name])}[/]", of]
        table.add_row(escape(job.name), *cells, f"{result['adapter']}@v{result['version']}")
    return table


def _refusal(job: JobOutcome) -> str:
    """What the gate of a published job said, where it refused; '' elsewhere."""
    result = job.result or {}
    gate = result.get("gate")
    return "" if gate is None or gate["passed"] else outcome_texts(result)["Gate"]


def raise_failures(result: FleetResult) -> None:
    """End with an error where not all is well.

    Raises:
        TrainingError: jobs failed.
        GateRefused: none did, but gates did not let their aliases move.
    """
    failed = [job.name for job in result.jobs if job.state == "failed"]
    if failed:
        queued = result.count("queued")
        stopped = f"; {queued:,} were not begun, for on_failure = stop" if queued else ""
        raise TrainingError(
            f"{result.fleet}: {len(failed):,} of {len(result.jobs):,} jobs failed: {_names(failed)}"
            f"{stopped}; the same command with --retry-failed trains them again"
        )
    refused = [job.name for job in result.jobs if _refusal(job)]
    if refused:
        raise GateRefused(
            f"{result.fleet}: published, but the gates of {len(refused):,} of {len(result.jobs):,} jobs "
            f"refused: {_names(refused)}"
        )


def _names(names: list[str]) -> str:
    others = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {others:,} others" if others > 0 else "")
