"""What a fleet of many jobs costs beside their training: its driver with its queue, and nothing that trains.

The driver is the real one: it expands the file, lists the data, looks up what is done, opens the queue's
actor, keeps its snapshots in the catalog and tells the story. In the place of each lane stands a thread that
takes jobs and says at once that they are done, by the calls that a lane makes.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from measure import measure
from page import machine, markdown, write

HERE = Path(__file__).parent
LANES, SLOTS, STEPS, BEATS = 2, 8, 100, 3
LOSSES = 100
"""Points of the curve that a job ends with."""


@dataclass(frozen=True)
class Found:
    """A fleet without training."""

    jobs: int
    plan_seconds: float
    """From the file to the open queue."""
    queue_seconds: float
    """From the first lane to the end of the last job."""
    end_seconds: float
    """From there to the written report."""
    driver_bytes: int
    """Resident memory of the driver at the end."""
    desk_bytes: int
    """Of the queue's actor, at its highest."""

    def job_ms(self, seconds: float) -> float:
        """A part of the time, for each job."""
        return 1000 * seconds / self.jobs


class IdleLanes:
    """Lanes that train nothing; see `raytune_ft.fleet.lanes.Lanes`."""

    def __init__(self, desk: Any, *_: Any) -> None:
        self._desk = desk
        self._threads: list[threading.Thread] = []
        self.desk_bytes = 0

    def start(self, most: int) -> None:
        """Start all lanes, once."""
        while len(self._threads) < min(most, LANES):
            name = f"lane-{len(self._threads) + 1}"
            thread = threading.Thread(target=self._serve, args=(name,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def look(self) -> None:
        """Nobody is lost."""
        self.desk_bytes = max(self.desk_bytes, _desk_bytes())

    def tell_waiting(self, *, joined: bool) -> None:
        """Nobody waits."""

    def wait(self, timeout_s: float) -> None:
        """Until all have ended."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _serve(self, lane: str) -> None:
        from raytune_ft.fleet.lanes import RemoteDesk

        desk = RemoteDesk(self._desk)
        desk.join(lane, "here", "cpu")
        base: str | None = None
        while True:
            taken = desk.take(lane, base, SLOTS if base else 0)
            if taken.ended:
                desk.end(lane)
                return
            if taken.switch_to is not None:
                base = taken.switch_to.base
                desk.loaded(lane, base, SLOTS, 0.0)
            for order in taken.orders:
                _pretend(desk, lane, order.job.name)
            if not taken.orders and taken.switch_to is None:
                time.sleep(0.05)


def _pretend(desk: Any, lane: str, job: str) -> None:
    """All that a lane says of a job."""
    from raytune_ft.fleet.desk import Stepped

    desk.started(lane, job, 0, STEPS)
    for beat in range(1, BEATS + 1):
        step = beat * STEPS // BEATS
        desk.beat(lane, {job: Stepped(step, STEPS, 1.0 / beat, 1000 * step)}, {job: step})
    result = {
        "adapter": job,
        "version": 1,
        "uri": f"s3://adapters/adapters/{job}/versions/9999999998.json",
        "steps": STEPS,
        "loss": 0.25,
        "scores_before": {"exact_match": 0.0},
        "scores_after": {"exact_match": 1.0},
        "tokens_per_second": 1000.0,
        "peak_memory_bytes": 1 << 30,
        "seconds": 1.0,
    }
    desk.done(lane, job, result, tuple((step, 1.0 / step) for step in range(1, LOSSES + 1)))


def _desk_bytes() -> int:
    sizes = [0]
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::Desk"):
                sizes.append(process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return max(sizes)


def run(folder: Path, jobs: int) -> Found:
    """A fleet of so many jobs, from its file to its report."""
    from raytune_ft.cli.fleet import FleetDisplay
    from raytune_ft.fleet import run as driver
    from raytune_ft.fleet.events import FleetEvent, FleetPlanned, JobDone, LaneStarted
    from raytune_ft.fleet.report import write_fleet_report
    from raytune_ft.spec import parse_fleet

    lanes: list[IdleLanes] = []

    def make_lanes(*given: Any) -> IdleLanes:
        lanes.append(IdleLanes(*given))
        return lanes[0]

    driver.Lanes = make_lanes  # type: ignore[assignment,attr-defined]  # what is left out
    events: list[FleetEvent] = []
    values = {
        "name": "many",
        "defaults": {
            "model": {"path": str(folder / "base")},
            "cluster": {"device": "cpu"},
            "publish": {"catalog": str(folder / "catalog")},
        },
        "for_each": {"glob": str(folder / "tasks" / "*.jsonl")},
        "lanes": {"max": LANES, "slots": SLOTS},
    }
    began = time.perf_counter()
    with FleetDisplay(quiet=True) as display:

        def hear(event: FleetEvent) -> None:
            display.update(event)
            events.append(event)

        result = driver.run_fleet(parse_fleet(values), folder / "out", on_event=hear)
    if result.count("done") != jobs:
        raise SystemExit(f"{result.count('done')} of {jobs} jobs are done")
    write_fleet_report(result, folder / "out" / "report.html")
    whole = time.perf_counter() - began
    at = {
        kind: [e.at_s for e in events if isinstance(e, kind)] for kind in (FleetPlanned, LaneStarted, JobDone)
    }
    done = max(at[JobDone])
    return Found(
        jobs,
        at[FleetPlanned][0],
        done - min(at[LaneStarted]),
        whole - done,
        psutil.Process().memory_info().rss,
        lanes[0].desk_bytes,
    )


def table(found: Sequence[Found]) -> str:
    """Markdown: milliseconds for each job, and what the memory grows by."""
    head = (
        "jobs",
        "file to queue, ms a job",
        "queue, ms a job",
        "end, Ray's shutdown, report, ms a job",
        "together, ms a job",
        "driver, MiB",
        "queue's actor, MiB",
    )
    cells = []
    for row in found:
        parts = (row.plan_seconds, row.queue_seconds, row.end_seconds)
        times = [f"{row.job_ms(seconds):.1f}" for seconds in (*parts, sum(parts))]
        cells.append(
            (str(row.jobs), *times, *(f"{b / 2**20:.0f}" for b in (row.driver_bytes, row.desk_bytes)))
        )
    return markdown(head, cells)


def measured(folder: Path, jobs: int) -> Found:
    """Make the tasks, and run their fleet in a process of its own."""
    from fleet_inputs import save_pairs
    from inputs import sentence_pairs

    for number in range(jobs):
        save_pairs(sentence_pairs(10, number), folder / str(jobs) / "tasks" / f"task-{number:04}.jsonl")
    (folder / str(jobs) / "base").symlink_to(folder / "base")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    command = (sys.executable, str(HERE / "fleet_queue.py"), "--run", str(folder / str(jobs)))
    run_ = measure((*command, "--jobs", str(jobs)), cwd=folder, environment=environment, interval_s=5.0)
    print(f"{jobs} jobs: {run_.seconds:.1f} s", file=sys.stderr)
    return Found(**json.loads(run_.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Measure fleets of several sizes and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help="the page whose table to replace")
    parser.add_argument("--results", type=Path, help="folder for fleet_queue.json")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(asdict(run(options.run, options.jobs[0]))))
        return
    # A driver has no use for torch, and its memory is measured here.
    from fleet_inputs import save_base
    from inputs import tokenizer

    with tempfile.TemporaryDirectory() as name:
        save_base("tiny", tokenizer(), Path(name) / "base")
        found = [measured(Path(name), jobs) for jobs in options.jobs]
    what = f"{LANES} lanes of {SLOTS} slots, {BEATS} beats of each job"
    text = f"{table(found)}\n\n{machine(('ray', 'pydantic'), what)}"
    write("fleet_queue", text, options.write, options.results, [asdict(each) for each in found])


if __name__ == "__main__":
    main()
