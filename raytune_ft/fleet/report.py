"""A fleet as one HTML page that needs nothing else: no request leaves it, no script runs in it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from raytune_ft.catalog.record import selection_texts
from raytune_ft.chart import Overlay, Tick, overlay
from raytune_ft.fleet.events import FleetPlanned, FleetResult, JobDone, JobOutcome
from raytune_ft.fleet.lane_times import LaneTime, Span, in_rows, lane_times
from raytune_ft.fleet.view import main_scores
from raytune_ft.report import (
    ScoreRow,
    duration_text,
    examples_of,
    outcome_texts,
    page_templates,
    scale_for,
    score_rows,
    write_page,
)

_MOST_COLUMNS = 3
"""Metrics in the table."""
_MOST_CURVES = 200
"""In the picture of all losses: more are a blot."""
_CURVE_POINTS = 100
_ROW_POINTS = 60
_MOST_TICKS = 7
_TICKS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000, 86400)

Losses = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class JobRow:
    """A job in the table."""

    name: str
    state: str
    base: str
    version: str
    """`v2`, with the adapter's name where that is not the job's; '' where nothing was published."""
    uri: str
    loss: str
    curve: tuple[str, ...]
    """SVG path data of its losses."""
    scores: Mapping[str, ScoreRow]
    steps: str
    seconds: str
    note: str
    """Why it failed; or what its gate said, what its data lost, and what its scores do not tell."""


@dataclass(frozen=True)
class Bar:
    """A job's time on a lane, in per cent of the whole time."""

    job: str
    left: float
    width: float
    ending: str
    text: str


@dataclass(frozen=True)
class LaneRow:
    """A lane's time; its jobs stand in as many rows as it trained at once."""

    name: str
    about: str
    left: float
    width: float
    rows: tuple[tuple[Bar, ...], ...]
    lost: str


def write_fleet_report(result: FleetResult, path: Path) -> None:
    """Write the page; one that is there is replaced as a whole.

    Args:
        result: what became of the fleet, with its events.
        path: the HTML file; its folder must exist.

    Raises:
        OSError: it cannot be written.
    """
    rows = job_rows(result)
    losses = {name: points for name, points in _losses(result).items() if points}
    lanes = lane_times(result.events, result.seconds)
    text = (
        page_templates()
        .get_template("fleet_report.html.j2")
        .render(
            result=result,
            headline=headline(result, rows, lanes),
            rows=rows,
            metrics=_columns(result.jobs),
            failures=[row for row in rows if row.state == "failed"],
            losses=loss_picture(losses),
            left_out=max(0, len(losses) - _MOST_CURVES),
            lanes=lane_rows(lanes, result.seconds),
            ticks=time_ticks(result.seconds),
            label=lambda metric: scale_for(metric).label,
        )
    )
    write_page(text, path)


def job_rows(result: FleetResult) -> list[JobRow]:
    """A row for each job, in the order of the fleet file."""
    bases = {
        job.name: job.base for event in result.events if isinstance(event, FleetPlanned) for job in event.jobs
    }
    losses, metrics = _losses(result), _columns(result.jobs)
    return [_job_row(job, bases.get(job.name, ""), losses.get(job.name, ()), metrics) for job in result.jobs]


def _job_row(job: JobOutcome, base: str, losses: Losses, metrics: Sequence[str]) -> JobRow:
    result = job.result or {}
    scores = result.get("scores_after") or {}
    after = {name: scores[name] for name in metrics if name in scores}
    drawn = overlay(job.name, {job.name: losses}, _ROW_POINTS).curves if losses else ()
    return JobRow(
        name=job.name,
        state=job.state,
        base=base,
        version=_version_text(job.name, result) if result else "",
        uri=str(result.get("uri", "")),
        loss="–" if result.get("loss") is None else f"{result['loss']:.4f}",
        curve=drawn[0].lines if drawn else (),
        scores=dict(
            zip(
                after,
                score_rows(result.get("scores_before") or {}, after, examples_of(result)),
                strict=True,
            )
        ),
        steps=f"{result['steps']:,}" if result else "–",
        seconds=duration_text(result["seconds"]) if result else "–",
        note=job.reason or _note(result),
    )


def _note(result: Mapping[str, Any]) -> str:
    """What a finished job has to say beside its figures: notices, which step it published, its gate."""
    texts = outcome_texts(result)
    notices = [texts["Notice"]] if "Notice" in texts else []
    chosen = [f"{title.lower()}: {text}" for title, text in selection_texts(result).items()]
    return "; ".join([*notices, *chosen, *([texts["Gate"]] if "Gate" in texts else [])])


def _version_text(job: str, result: Mapping[str, Any]) -> str:
    adapter = "" if result["adapter"] == job else f"{result['adapter']}@"
    return f"{adapter}v{result['version']}"


def headline(
    result: FleetResult, rows: Sequence[JobRow], lanes: Sequence[LaneTime]
) -> list[tuple[str, str, str]]:
    """The large figures: value, label, and a remark on it."""
    done, before = result.count("done"), sum(job.before and job.state == "done" for job in result.jobs)
    figures = [
        (f"{done:,} of {len(rows):,}", "jobs done", f"{before:,} of them in an earlier run" if before else "")
    ]
    if result.count("failed"):
        figures.append((f"{result.count('failed'):,}", "failed", "their reasons are below"))
    if result.count("queued"):
        figures.append((f"{result.count('queued'):,}", "not begun", "the fleet was stopped"))
    for name in _columns(result.jobs)[:1]:
        scored = [(job.result or {}) for job in result.jobs if name in _scores(job)]
        was = [found["scores_before"][name] for found in scored if name in (found.get("scores_before") or {})]
        scale = scale_for(name)
        after = scale.text(fmean(found["scores_after"][name] for found in scored))
        remark = f"before: {scale.text(fmean(was))}" if was else ""
        figures.append((after, f"{scale.label}, mean of {len(scored):,} jobs", remark))
    if lanes:
        trained_s = sum(span.end_s - span.begin_s for lane in lanes for span in lane.spans)
        held_s = sum(lane.end_s - lane.begin_s for lane in lanes)
        together = f"{trained_s / held_s:.1f} jobs at a time on each" if held_s else ""
        figures.append((f"{len(lanes):,}", "lane" if len(lanes) == 1 else "lanes", together))
    figures.append((duration_text(result.seconds), "in all", ""))
    return figures


def loss_picture(losses: Mapping[str, Losses]) -> Overlay | None:
    """The losses of the first jobs in one picture; None where there are none."""
    chosen = dict(list(losses.items())[:_MOST_CURVES])
    return overlay("Loss of each job", chosen, _CURVE_POINTS) if chosen else None


def lane_rows(lanes: Iterable[LaneTime], whole_s: float) -> list[LaneRow]:
    """The lanes as boxes whose edges are per cent of the whole time."""

    def place(begin_s: float, end_s: float) -> tuple[float, float]:
        return 100 * begin_s / (whole_s or 1), 100 * (end_s - begin_s) / (whole_s or 1)

    def bar(span: Span) -> Bar:
        left, width = place(span.begin_s, span.end_s)
        took = duration_text(span.end_s - span.begin_s)
        return Bar(span.job, left, width, span.ending, f"{span.job}: {took}, {span.ending}")

    found = []
    for lane in lanes:
        left, width = place(lane.begin_s, lane.end_s)
        rows = tuple(tuple(bar(span) for span in row) for row in in_rows(lane.spans))
        found.append(LaneRow(lane.name, f"{lane.host}, {lane.device}", left, width, rows, lane.lost))
    return found


def time_ticks(whole_s: float) -> list[Tick]:
    """Round times from the beginning to the end, in per cent of the whole time.

    >>> [tick.text for tick in time_ticks(250)]
    ['0 s', '1 min', '2 min', '3 min', '4 min']
    """
    distance_s = next((each for each in _TICKS_S if whole_s / each < _MOST_TICKS), _TICKS_S[-1])
    times_s = range(0, int(whole_s) + 1, distance_s)
    return [Tick(100 * at_s / (whole_s or 1), _time_text(at_s)) for at_s in times_s]


def _time_text(at_s: int) -> str:
    for size_s, unit in ((3600, "h"), (60, "min")):
        if at_s and at_s % size_s == 0:
            return f"{at_s // size_s:,} {unit}"
    return f"{at_s:,} s"


def _losses(result: FleetResult) -> dict[str, Losses]:
    return {event.job: event.losses for event in result.events if isinstance(event, JobDone)}


def _scores(job: JobOutcome) -> Mapping[str, float]:
    return (job.result or {}).get("scores_after") or {}


def _columns(jobs: Iterable[JobOutcome]) -> list[str]:
    """The metrics that most jobs have of their own tasks."""
    counts = Counter(name for job in jobs for name in main_scores(_scores(job)))
    return [name for name, _ in counts.most_common(_MOST_COLUMNS)]
