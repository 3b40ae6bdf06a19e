"""A fleet's jobs on one lane, one after another and several at once; prints one line of JSON.

A base is loaded once for each fleet, before the clock starts. It runs from the begin of the lane's first job
to the end of its last.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from fleet_inputs import TASKS, job_name

from raytune_ft.catalog import Catalog
from raytune_ft.fleet.events import FleetEvent, JobDone, JobStarted
from raytune_ft.fleet.run import run_fleet
from raytune_ft.spec import FleetSpec, parse_fleet
from raytune_ft.train.launch import ray_session


@dataclass(frozen=True)
class LaneRun:
    """A fleet that one lane trained."""

    batch: int
    slots: int
    lane_seconds: float
    """From the begin of the first job to the end of the last."""
    step_seconds: float
    """Inside the steps of the jobs, added up: those of several jobs at once overlap."""
    tokens: int


def fleet_of(folder: Path, catalog: Path, *, batch: int, slots: int | str) -> FleetSpec:
    """The eight tasks as jobs: NF4, rank 16 on all linear layers, one epoch, no evaluation."""
    return parse_fleet(
        {
            "name": "benchmark",
            "defaults": {
                "model": {"path": str(folder / "base"), "weight_bits": 4},
                "data": {"max_tokens": 128, "split": {"validation": 0.0, "test": 0.0}},
                "batch": {"sequences": batch},
                "evaluate": {"metrics": []},
                "publish": {"catalog": str(catalog)},
            },
            "jobs": [
                {
                    "name": job_name(task),
                    "data": {"sources": [{"uri": str(folder / task / "data.jsonl"), "template": "plain"}]},
                }
                for task in TASKS
            ],
            "lanes": {"max": 1, "slots": slots},
        }
    )


def run(folder: Path, batch: int, slots: int) -> LaneRun:
    """Train all jobs of the folder, and throw the adapters away. Ray is up."""
    events: list[FleetEvent] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        catalog, output = Path(name) / "catalog", Path(name) / "out"
        fleet = fleet_of(folder, catalog, batch=batch, slots=slots)
        found = run_fleet(fleet, output, cache=False, on_event=events.append)
        if not found.ok:
            raise SystemExit(f"batch {batch}, {slots} slots: {found.jobs}")
        tokens = {job.name: Catalog.at(str(catalog)).resolve(job.name).tokens for job in found.jobs}
    done = [event for event in events if isinstance(event, JobDone)]
    began = min(event.at_s for event in events if isinstance(event, JobStarted))
    return LaneRun(
        batch,
        slots,
        max(event.at_s for event in done) - began,
        sum(tokens[event.job] / event.result["tokens_per_second"] for event in done),
        sum(tokens.values()),
    )


def main() -> None:
    """Measure every batch with every number of slots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--slots", type=int, nargs="+", required=True)
    options = parser.parse_args()
    found = []
    with ray_session():
        for batch in options.batches:
            for slots in options.slots:
                found.append(run(options.folder, batch, slots))
                print(found[-1], file=sys.stderr)
    print(json.dumps([asdict(each) for each in found]))


if __name__ == "__main__":
    main()
