"""Events of fleets as `run_fleet` tells them: random whole histories, and one of many jobs."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from raytune_ft.fleet.events import (
    FleetEnded,
    FleetEvent,
    FleetPlanned,
    JobDone,
    JobFailed,
    JobOutcome,
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

STEPS = 40


def result_of(name: str, **changes: Any) -> dict[str, Any]:
    """The result of a job that is done."""
    return {
        "adapter": name,
        "version": 1,
        "uri": f"s3://adapters/adapters/{name}/versions/9999999998.json",
        "steps": STEPS,
        "loss": 0.125,
        "scores_before": {"exact_match": 0.02, "token_loss": 6.0},
        "scores_after": {"exact_match": 0.94, "token_loss": 0.08},
        "scored_examples": {"exact_match": 50, "token_loss": 50},
        "tokens_per_second": 812.3,
        "peak_memory_bytes": 2**30,
        "seconds": 12.5,
    } | changes


def planned(*names: str, seconds: float = 60.0, lanes: int = 2) -> FleetPlanned:
    """A fleet of jobs on one base."""
    jobs = tuple(PlannedJob(name, "s3://models/tiny", STEPS, 10_000, seconds) for name in names)
    return FleetPlanned(0.5, "tasks", jobs, lanes)


@dataclass
class Model:
    """What is true of a fleet after its events, as a test knows it."""

    states: dict[str, str] = field(default_factory=dict)
    lane_of: dict[str, str] = field(default_factory=dict)
    lanes: list[str] = field(default_factory=list)
    ended: dict[str, JobOutcome] = field(default_factory=dict)


texts = st.text(max_size=60)
losses = st.floats(0, 1e6) | st.sampled_from([float("nan"), float("inf")])
names = st.builds(lambda number, more: f"{number}{'-x' * more}", st.integers(0, 99), st.integers(0, 30))


@st.composite
def histories(draw: st.DrawFn, most_jobs: int = 12, most_events: int = 30) -> tuple[list[FleetEvent], Model]:
    """A history that `run_fleet` could tell, cut off anywhere, and what is true after it."""
    jobs = draw(st.lists(names, min_size=1, max_size=most_jobs, unique=True))
    model = Model(dict.fromkeys(jobs, "queued"))
    seconds = draw(st.floats(0, 1e5))
    events: list[FleetEvent] = [Notice(0.1, draw(texts)), planned(*jobs, seconds=seconds)]
    at_s = 1.0
    for number in range(draw(st.integers(0, most_events))):
        at_s += draw(st.floats(0, 30))
        events += _next(draw, model, number, at_s)
    if draw(st.booleans()):
        states = list(model.states.values())
        counts = [states.count(state) for state in ("done", "failed", "queued")]
        events.append(FleetEnded(at_s, *counts))
    return events, model


def _next(draw: st.DrawFn, model: Model, number: int, at_s: float) -> list[FleetEvent]:
    """Something that can happen now."""
    running = sorted(job for job, state in model.states.items() if state == "running")
    queued = sorted(job for job, state in model.states.items() if state == "queued")
    can = ["lane", "notice", "progress", "before"]
    can += ["start"] * 3 if queued and model.lanes else []
    can += ["step", "step", "done", "fail", "late"] if running else []
    can += ["lost", "load"] if model.lanes else []
    idle = [lane for lane in model.lanes if lane not in model.lane_of.values()]
    can += ["end"] if idle else []
    match draw(st.sampled_from(can)):
        case "lane":
            model.lanes.append(f"lane-{number}")
            return [LaneStarted(at_s, f"lane-{number}", "host", "cpu")]
        case "load":
            return [LaneLoaded(at_s, draw(st.sampled_from(model.lanes)), draw(texts), 8, 1.5)]
        case "notice":
            return [Notice(at_s, draw(texts))]
        case "progress":
            states = list(model.states.values())
            counts = [states.count(state) for state in ("running", "queued", "done", "failed")]
            left_s = draw(st.none() | st.floats(0, 1e6))
            return [Progress(at_s, *counts, draw(st.floats(0, 1e7)), left_s)]
        case "start":
            job, lane = draw(st.sampled_from(queued)), draw(st.sampled_from(model.lanes))
            model.states[job], model.lane_of[job] = "running", lane
            return [JobStarted(at_s, job, lane, draw(st.integers(0, STEPS)), STEPS)]
        case "step":
            job = draw(st.sampled_from(running))
            step = draw(st.integers(0, STEPS))
            return [JobStepped(at_s, job, model.lane_of[job], step, STEPS, draw(losses), 100)]
        case "late":
            # Told by a lane before it was lost, and heard afterwards.
            return [JobStepped(at_s, draw(st.sampled_from(running)), "lane-before", 7, STEPS, 1.0, 100)]
        case "before" if queued:
            return _end(draw, model, draw(st.sampled_from(queued)), at_s, before=True)
        case "done" | "fail":
            return _end(draw, model, draw(st.sampled_from(running)), at_s, before=False)
        case "lost":
            return _queue_again(draw, model, at_s)
        case "end":
            lane = draw(st.sampled_from(idle))
            model.lanes.remove(lane)
            return [LaneEnded(at_s, lane)]
    return []


def _queue_again(draw: st.DrawFn, model: Model, at_s: float) -> list[FleetEvent]:
    """A lane gives one job back, or is lost with all of its jobs."""
    lane = draw(st.sampled_from(model.lanes))
    had = tuple(job for job, holder in model.lane_of.items() if holder == lane)
    returned = had[:1] if draw(st.booleans()) else ()
    for job in returned or had:
        del model.lane_of[job]
        model.states[job] = "queued"
    if returned:
        return [JobReturned(at_s, *returned, lane, draw(texts))]
    model.lanes.remove(lane)
    return [LaneLost(at_s, lane, had, draw(st.booleans()), draw(texts))]


def _end(draw: st.DrawFn, model: Model, job: str, at_s: float, *, before: bool) -> list[FleetEvent]:
    lane = model.lane_of.pop(job, None)
    if draw(st.booleans()):
        curve = draw(st.lists(losses, max_size=5))
        told = () if before else tuple(enumerate(curve, start=1))
        model.states[job] = "done"
        model.ended[job] = JobOutcome(job, "done", result_of(job), before=before)
        return [JobDone(at_s, job, lane, result_of(job), told, before)]
    reason = draw(texts)
    model.states[job] = "failed"
    model.ended[job] = JobOutcome(job, "failed", reason=reason, before=before)
    return [JobFailed(at_s, job, lane, reason, before)]


def large_fleet(jobs: int = 200, running: int = 32, done: int = 48, failed: int = 3) -> list[FleetEvent]:
    """A fleet in the middle of its way."""
    names_of = [f"task{number:04}-some-instruction-task" for number in range(jobs)]
    events: list[FleetEvent] = [planned(*names_of, lanes=4)]
    for number in range(4):
        events.append(LaneStarted(2.0, f"lane-{number}", "node", "NVIDIA L4"))
        events.append(LaneLoaded(9.0, f"lane-{number}", "s3://models/tiny", 8, 7.0))
    begun = names_of[: running + done + failed]
    events += [JobStarted(10.0 + at, name, f"lane-{at % 4}", 0, 600) for at, name in enumerate(begun)]
    for at, name in enumerate(begun):
        if at < done:
            curve = tuple((step, 5.0 / step) for step in range(1, 601, 3))
            events.append(JobDone(200.0 + at, name, f"lane-{at % 4}", result_of(name), curve))
        elif at < done + failed:
            reason = f"step {at}: the loss is nan at learning rate 0.003; lower optimizer.learning_rate"
            events.append(JobFailed(200.0 + at, name, f"lane-{at % 4}", reason))
        else:
            events.append(JobStepped(290.0, name, f"lane-{at % 4}", 5 * at, 600, 0.0123 * at, 9000))
    events.append(Progress(300.0, running, jobs - len(begun), done, failed, 8123.4, 723.0))
    return events
