"""What a person sees of a fleet while it runs: a state that is a fold over its events, and lines that fit.

Pure: no Ray, no clock and no console. Who shows it says how large the terminal is and what time it is.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.text import Text

from raytune_ft.fleet.events import (
    FleetEvent,
    FleetPlanned,
    JobDone,
    JobFailed,
    JobReturned,
    JobStarted,
    JobStepped,
    LaneEnded,
    LaneLoaded,
    LaneLost,
    LaneStarted,
    Notice,
    PlannedJob,
    Progress,
)
from raytune_ft.report import duration_text, examples_of, scale_for
from raytune_ft.spec.scores import OTHER_TASKS
from raytune_ft.terminal import visible

State = Literal["queued", "running", "done", "failed"]
STATES: tuple[State, ...] = ("running", "queued", "done", "failed")
_STYLES: Mapping[State, str] = {"running": "blue", "queued": "dim", "done": "green", "failed": "red"}
_BAR_COLUMNS = 24
_LEAST_WORK_S = 1e-3
"""A job that is predicted to take no time still counts."""
_LEAST_SECTION = 3
"""Lines of a section: an empty one, its heading, and what stands there."""


@dataclass(frozen=True)
class JobView:
    """A job as far as it is known."""

    planned: PlannedJob
    state: State = "queued"
    lane: str | None = None
    step: int = 0
    """Steps done."""
    steps: int = 0
    loss: float | None = None
    """Of the last step that was told."""
    reason: str = ""
    """Why it failed, in one line."""
    ended_s: float = 0.0
    """When it ended."""


@dataclass(frozen=True)
class LaneView:
    """A lane that is there."""

    base: str | None = None
    """None: it holds none yet."""
    slots: int = 0


@dataclass(frozen=True)
class FleetView:
    """A fleet as far as it is known."""

    fleet: str | None = None
    """None: its jobs are being checked."""
    jobs: Mapping[str, JobView] = field(default_factory=dict)
    """The longest first."""
    lanes: Mapping[str, LaneView] = field(default_factory=dict)
    """Those that are at work."""
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    at_s: float = 0.0
    """When the last event was told, in seconds from the beginning."""

    @property
    def counts(self) -> Mapping[State, int]:
        """How many jobs are in each state; all of them together are all jobs."""
        found = Counter(job.state for job in self.jobs.values())
        return {state: found[state] for state in STATES}

    @property
    def done_share(self) -> float:
        """The part of the predicted work that is done, 0 to 1; a job that failed has none left."""
        total_s = sum(_work_s(job) for job in self.jobs.values())
        done_s = sum(_work_s(job) * _share(job) for job in self.jobs.values())
        return min(1.0, done_s / total_s) if total_s else 0.0


def _work_s(job: JobView) -> float:
    return max(job.planned.seconds, _LEAST_WORK_S)


def _share(job: JobView) -> float:
    if job.state in ("done", "failed"):
        return 1.0
    return min(1.0, job.step / job.steps) if job.steps else 0.0


def after(view: FleetView, event: FleetEvent) -> FleetView:
    """The view once an event is known; what speaks of a job that is unknown or has ended changes nothing."""
    view = replace(view, at_s=max(view.at_s, event.at_s))
    match event:
        case FleetPlanned():
            jobs = {job.name: JobView(job, steps=job.steps) for job in event.jobs}
            return replace(view, fleet=event.fleet, jobs=jobs)
        case LaneStarted():
            return replace(view, lanes={**view.lanes, event.lane: LaneView()})
        case LaneLoaded():
            return replace(view, lanes={**view.lanes, event.lane: LaneView(event.base, event.slots)})
        case LaneLost() | LaneEnded():
            return _without_lane(view, event.lane)
        case Progress():
            return replace(view, tokens_per_second=event.tokens_per_second, seconds_left=event.seconds_left)
        case JobStarted() | JobStepped() | JobReturned() | JobDone() | JobFailed():
            return _with_job(view, event)
        case _:
            return view


def _with_job(
    view: FleetView, event: JobStarted | JobStepped | JobReturned | JobDone | JobFailed
) -> FleetView:
    old = view.jobs.get(event.job)
    if old is None or old.state in ("done", "failed"):
        return view
    match event:
        case JobStarted():
            new = replace(
                old, state="running", lane=event.lane, step=event.step, steps=event.steps, loss=None
            )
        case JobStepped() if old.state == "running" and old.lane == event.lane:
            new = replace(old, step=event.step, steps=event.steps, loss=event.loss)
        case JobStepped():
            # A lane that was lost meanwhile had told it before.
            return view
        case JobReturned():
            new = replace(old, state="queued", lane=None, loss=None)
        case JobDone():
            new = replace(old, state="done", lane=None, step=old.steps, ended_s=event.at_s)
        case JobFailed():
            reason = one_line(event.reason)
            new = replace(old, state="failed", lane=None, reason=reason, ended_s=event.at_s)
    return replace(view, jobs={**view.jobs, event.job: new})


def _without_lane(view: FleetView, lane: str) -> FleetView:
    lanes = {name: found for name, found in view.lanes.items() if name != lane}
    jobs = {
        name: replace(job, state="queued", lane=None, loss=None) if job.lane == lane else job
        for name, job in view.jobs.items()
    }
    return replace(view, lanes=lanes, jobs=jobs)


def one_line(text: str) -> str:
    """Text without line breaks, and without what a terminal would obey: data and stores wrote parts of it.

    >>> one_line("2 problems:\\n  a\\x1b[2J")
    '2 problems: a\\\\x1b[2J'
    """
    unknown = "\N{REPLACEMENT CHARACTER}"
    # Other letters that are not printable have no known width, and a live view must fit its terminal.
    return "".join(letter if letter.isprintable() else unknown for letter in visible(" ".join(text.split())))


def render(view: FleetView, width: int, height: int, now_s: float) -> list[Text]:
    """The view as lines of a terminal.

    Args:
        view: what to show.
        width: columns; no line has more.
        height: lines; there are never more.
        now_s: seconds since the fleet's beginning.
    """
    lines = [_title(view), _counts(view, now_s)] if view.fleet is not None else [_checking(now_s)]
    room = height - len(lines)
    running = [job for job in view.jobs.values() if job.state == "running"]
    failed = [job for job in view.jobs.values() if job.state == "failed"]
    # Of many those that are left out can be read at the end.
    failed.sort(key=lambda job: job.ended_s, reverse=True)
    wanted = len(running) + _LEAST_SECTION - 1 if running else 0
    least = _LEAST_SECTION if room >= 2 * _LEAST_SECTION else 0
    room_below = max(least, room // 3, room - wanted)
    below = _section(_failed_rows(failed, width), room_below)
    lines += _section(_running_rows(running, width), room - len(below)) + below
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines[: max(0, height)] if width > 0 else []


def _checking(now_s: float) -> Text:
    return Text.assemble("Checking the fleet", (f"  {duration_text(now_s)}", "dim"))


def _title(view: FleetView) -> Text:
    share = view.done_share
    full = round(share * _BAR_COLUMNS)
    return Text.assemble(
        (view.fleet or "", "bold"),
        "  ",
        ("━" * full, "blue"),
        ("━" * (_BAR_COLUMNS - full), "bright_black"),
        # Rounded down, so that nothing is done before it is.
        f"  {int(100 * share)} %",
        f"  {left_text(view)}",
    )


def _counts(view: FleetView, now_s: float) -> Text:
    counted = Text("  ").join(
        Text(f"{count:,} {state}", _STYLES[state] if count else "dim") for state, count in view.counts.items()
    )
    rest = f"    {_lanes_text(view)}  {view.tokens_per_second:,.0f} tokens/s"
    return Text.assemble(counted, rest, (f"  {duration_text(now_s)} so far", "dim"))


def _lanes_text(view: FleetView) -> str:
    lanes = len(view.lanes)
    loading = sum(lane.base is None for lane in view.lanes.values())
    text = f"{lanes} lane{'' if lanes == 1 else 's'}" if lanes else "no lane yet"
    return f"{text} ({loading} loading)" if loading else text


def left_text(view: FleetView) -> str:
    """How long it still takes; '' as long as that is not known."""
    return "" if view.seconds_left is None else f"{duration_text(view.seconds_left)} left"


def _section(rows: Sequence[Text], room: int) -> list[Text]:
    """A heading, which is the first of the rows, and as many of the others as there is room for."""
    if len(rows) < 2 or room < _LEAST_SECTION:
        return []
    heading, *items = rows
    if len(items) > room - 2:
        shown = room - _LEAST_SECTION
        items = [*items[:shown], Text(f"… and {len(items) - shown:,} more", "dim")]
    return [Text(), heading, *items]


def _running_rows(jobs: Sequence[JobView], width: int) -> list[Text]:
    cells = [("running", "step", "loss", "lane")]
    cells += [
        (
            job.planned.name,
            f"{job.step:,}/{job.steps:,}",
            "–" if job.loss is None else f"{job.loss:.4f}",
            job.lane or "",
        )
        for job in jobs
    ]
    names, steps, losses, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
    names = _name_columns(names, width)
    return [
        Text(f"{_cut(name, names):{names}}  {step:>{steps}}  {loss:>{losses}}  {lane}", "" if at else "dim")
        for at, (name, step, loss, lane) in enumerate(cells)
    ]


def _failed_rows(jobs: Sequence[JobView], width: int) -> list[Text]:
    names = _name_columns(max((len(job.planned.name) for job in jobs), default=0), width)
    rows = [
        Text.assemble((f"{_cut(job.planned.name, names):{names}}", "red"), "  ", job.reason) for job in jobs
    ]
    return [Text("failed", "dim"), *rows]


def _name_columns(longest: int, width: int) -> int:
    return max(len("running"), min(longest, width // 3))


def _cut(name: str, columns: int) -> str:
    return name if len(name) <= columns else f"{name[: columns - 1]}…"


def line_of(view: FleetView, event: FleetEvent) -> str | None:
    """The line that an event has in a log; None: it has none.

    Args:
        view: with the event.
        event: what was told.
    """
    match event:
        case Notice():
            return one_line(event.text)
        case FleetPlanned():
            return f"{event.fleet}: {len(event.jobs):,} jobs, lanes: {event.lanes}"
        case LaneStarted():
            return f"{event.lane}: started on {event.host}, {event.device}"
        case LaneLoaded():
            return (
                f"{event.lane}: holds {one_line(event.base)}, {event.slots} jobs at a time, "
                f"loaded in {duration_text(event.seconds)}"
            )
        case LaneLost():
            return f"{event.lane}: lost with {len(event.jobs)} running jobs: {one_line(event.reason)}"
        case JobReturned():
            return f"{event.job}: queued again: {one_line(event.reason)}"
        case JobDone() if not event.before:
            return f"{event.job}: {done_text(event.result)}"
        case JobFailed():
            said = "failed before, and --retry-failed trains it again" if event.before else "failed"
            return f"{event.job}: {said}: {one_line(event.reason)}"
        case Progress():
            return progress_line(view)
        case _:
            return None


def progress_line(view: FleetView) -> str:
    """The whole fleet in one line."""
    counted = ", ".join(f"{count:,} {state}" for state, count in view.counts.items())
    parts = [counted, f"{view.tokens_per_second:,.0f} tokens/s", left_text(view)]
    return "  ".join(part for part in parts if part)


def done_text(result: Mapping[str, Any]) -> str:
    """What a finished job has become, in one line.

    >>> done_text({"adapter": "sum", "version": 2, "scores_before": {"exact_match": 0.02},
    ...            "scores_after": {"exact_match": 0.94}, "scored_examples": {"exact_match": 50}})
    'done, exact match 2.0 % → 94.0 % of 50, sum@v2'
    """
    parts = ["done"]
    before, scores = result.get("scores_before") or {}, result.get("scores_after") or {}
    for name in main_scores(scores)[:1]:
        scale = scale_for(name)
        was = f"{scale.text(before[name])} → " if name in before else ""
        examples = examples_of(result).get(name)
        of = "" if examples is None else f" of {examples:,}"
        parts.append(f"{scale.label.lower()} {was}{scale.text(scores[name])}{of}")
    if (stopped := result.get("stopped_early")) is not None:
        parts.append(f"stopped early after step {stopped['step']:,}")
    if (step := result.get("published_step")) is not None:
        parts.append(f"step {step:,} of {result['steps']:,} published")
    gate = result.get("gate")
    refused = "" if gate is None or gate["passed"] else f", but the gate of {gate['alias']} refused"
    return ", ".join([*parts, f"{result['adapter']}@v{result['version']}{refused}"])


def main_scores(scores: Mapping[str, float]) -> list[str]:
    """The scores of a job on its own task, in their order."""
    return [name for name in scores if not name.startswith(OTHER_TASKS)]
