"""The lanes of a fleet over time, from its events: which jobs each trained, from when to when."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from raytune_ft.fleet.events import (
    FleetEvent,
    JobDone,
    JobFailed,
    JobReturned,
    JobStarted,
    LaneEnded,
    LaneLost,
    LaneStarted,
)

Ending = Literal["done", "failed", "lost", "open"]
"""How a job's time on a lane ended; `lost`: with the lane, `open`: not at all, as far as was told."""


@dataclass(frozen=True)
class Span:
    """A job's time on a lane."""

    job: str
    begin_s: float
    end_s: float
    ending: Ending


@dataclass
class LaneTime:
    """A lane's time."""

    name: str
    host: str
    device: str
    begin_s: float
    end_s: float
    lost: str = ""
    """Why it was lost; '' for one that was not."""
    spans: list[Span] = field(default_factory=list)
    """In the order in which they began."""


def lane_times(events: Iterable[FleetEvent], end_s: float) -> list[LaneTime]:
    """Every lane that there was, in the order in which they came.

    Args:
        events: in their order; those that say nothing of lanes and jobs count for nothing.
        end_s: what had no end until then ends then.
    """
    lanes: dict[str, LaneTime] = {}
    open_jobs: dict[str, JobStarted] = {}

    def close(job: str, at_s: float, ending: Ending) -> None:
        began = open_jobs.pop(job, None)
        if began is not None and began.lane in lanes:
            lanes[began.lane].spans.append(Span(job, began.at_s, max(at_s, began.at_s), ending))

    for event in events:
        match event:
            case LaneStarted():
                lanes[event.lane] = LaneTime(event.lane, event.host, event.device, event.at_s, end_s)
            case JobStarted():
                close(event.job, event.at_s, "lost")
                open_jobs[event.job] = event
            case JobReturned():
                close(event.job, event.at_s, "lost")
            case JobDone():
                close(event.job, event.at_s, "done")
            case JobFailed():
                close(event.job, event.at_s, "failed")
            case LaneLost() | LaneEnded() if event.lane in lanes:
                for job in [job for job, began in open_jobs.items() if began.lane == event.lane]:
                    close(job, event.at_s, "lost")
                lanes[event.lane].end_s = event.at_s
                lanes[event.lane].lost = event.reason if isinstance(event, LaneLost) else ""
    for job in list(open_jobs):
        close(job, end_s, "open")
    for lane in lanes.values():
        lane.spans.sort(key=lambda span: (span.begin_s, span.end_s, span.job))
    return list(lanes.values())


def in_rows(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans in as few rows as can be, so that no two of a row overlap.

    Args:
        spans: in the order in which they begin.
    """
    rows: list[list[Span]] = []
    for span in spans:
        row = next((row for row in rows if row[-1].end_s <= span.begin_s), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    return rows
