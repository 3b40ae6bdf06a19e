"""Eight short QLoRA jobs: as one fleet, and with TRL's SFTTrainer one process after another.

All variants run alone, in rounds, `--repeats` times; the tables show medians. In a round a fleet comes after
each half of TRL's tasks. Seconds are those that a person waits: imports, Ray's start, quantisation, training,
publishing. The second table is this project alone, by the size of a step: the jobs one after another on a
lane that holds the base, and all at once.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet_inputs import DATA, EXAMPLES, TASKS, check_data
from fleet_lanes import LaneRun, fleet_of
from measure import measure
from page import machine, markdown, write

HERE = Path(__file__).parent
BATCH = 8
ONE, ALL = 1, len(TASKS)
"""Slots of the lane in the second table."""
_SAMPLE_INTERVAL_S = 2.0


@dataclass(frozen=True)
class Whole:
    """All eight tasks, from the first command to the end of the last."""

    seconds: float
    peak_bytes: int
    largest_bytes: int


@dataclass(frozen=True)
class Round:
    """One run of everything."""

    trl: Whole
    fleets: list[Whole]
    lanes: list[LaneRun]
    raw: dict[str, Any]


def slots_of(text: str) -> int | str:
    """`lanes.slots` as the command line has it."""
    return text if text == "auto" else int(text)


def environment_of(folder: Path) -> dict[str, str]:
    """Variables of all commands."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}


def run_trl(folder: Path, peer_python: str, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """A process for each task, one after another."""
    raw = []
    for task in tasks:
        command = (peer_python, str(HERE / "trl_job.py"), str(folder / task), "--to", str(folder / "trl"))
        run = measure(command, cwd=folder, environment=environment_of(folder))
        printed = json.loads(run.stdout.strip().splitlines()[-1])
        raw.append({"task": task, **printed, **run.figures()})
        print(f"TRL, {task}: {run.seconds:.1f} s, {printed['tokens']} tokens", file=sys.stderr)
    return raw


def whole_of(raw: Sequence[dict[str, Any]]) -> Whole:
    """Commands that ran one after another."""
    return Whole(
        sum(run["process_seconds"] for run in raw),
        max(run["peak_bytes"] for run in raw),
        max(run["largest_bytes"] for run in raw),
    )


def run_fleet(folder: Path, slots: int | str) -> dict[str, Any]:
    """One command for all tasks, with a catalog of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        values = fleet_of(folder, Path(name) / "catalog", batch=BATCH, slots=slots)
        file = Path(name) / "fleet.yaml"
        file.write_text(values.model_dump_json(exclude_defaults=True))
        program = str(Path(sys.executable).parent / "raytune-ft")
        command = (program, "fleet", str(file), "--no-cache", "--json", "--output", str(Path(name) / "out"))
        environment = environment_of(folder)
        run = measure(command, cwd=folder, environment=environment, interval_s=_SAMPLE_INTERVAL_S)
    print(f"fleet: {run.seconds:.1f} s, {run.peak_bytes / 2**30:.2f} GiB", file=sys.stderr)
    printed = json.loads(run.stdout.strip().splitlines()[-1])
    return {"result": printed, **run.figures()}


def run_lanes(folder: Path, batches: Sequence[int]) -> list[LaneRun]:
    """The jobs one after another and all at once, for each size of a step."""
    sizes = ("--batches", *map(str, batches), "--slots", str(ONE), str(ALL))
    command = (sys.executable, str(HERE / "fleet_lanes.py"), str(folder), *sizes)
    run = measure(command, cwd=folder, environment=environment_of(folder), interval_s=_SAMPLE_INTERVAL_S)
    return [LaneRun(**found) for found in json.loads(run.stdout.strip().splitlines()[-1])]


def run_round(folder: Path, peer_python: str, slots: int | str, batches: Sequence[int]) -> Round:
    """Everything once."""
    half = len(TASKS) // 2
    of_tasks, of_fleets = [], []
    for tasks in (TASKS[:half], TASKS[half:]):
        of_tasks += run_trl(folder, peer_python, tasks)
        of_fleets.append(run_fleet(folder, slots))
    lanes = run_lanes(folder, batches)
    raw = {"trl": of_tasks, "fleets": of_fleets, "lanes": [vars(lane) for lane in lanes]}
    return Round(whole_of(of_tasks), [whole_of([run]) for run in of_fleets], lanes, raw)


def table(rounds: Sequence[Round]) -> str:
    """Markdown: whole commands, with ratios against TRL."""
    trl = _median([each.trl for each in rounds])
    fleet = _median([fleet for each in rounds for fleet in each.fleets])
    head = (
        "8 tasks",
        "whole wall time, s",
        "× TRL",
        "largest process, GiB",
        "× TRL's largest",
        "memory of all processes, GiB",
        "× TRL's largest",
    )
    names = ("TRL, a process for each task", "raytune_ft, a fleet on one lane")
    cells = [
        (
            name,
            f"{row.seconds:.1f}",
            f"{row.seconds / trl.seconds:.2f}",
            f"{row.largest_bytes / 2**30:.2f}",
            f"{row.largest_bytes / trl.largest_bytes:.2f}",
            f"{row.peak_bytes / 2**30:.2f}",
            f"{row.peak_bytes / trl.largest_bytes:.2f}",
        )
        for name, row in zip(names, (trl, fleet), strict=True)
    ]
    return markdown(head, cells)


def lane_table(rounds: Sequence[Round], batches: Sequence[int]) -> str:
    """Markdown: one after another against all at once, and where the one begins to be faster."""
    head = (
        "examples a step",
        "one after another: training, s",
        "whole lane, s",
        f"{ALL} at once: whole lane, s",
        "training tokens/s",
        "× faster than training one after another",
        "× faster than the whole lane",
    )
    cells, ahead = [], {}
    for batch in batches:
        alone, alone_lane = _medians(rounds, batch, ONE)
        _, together = _medians(rounds, batch, ALL)
        tokens = next(lane.tokens for lane in rounds[0].lanes if lane.batch == batch)
        ahead[batch] = alone / together
        ratios = (f"{alone / together:.2f}", f"{alone_lane / together:.2f}")
        times = (f"{alone:.1f}", f"{alone_lane:.1f}", f"{together:.1f}", f"{tokens / together:.0f}")
        cells.append((str(batch), *times, *ratios))
    return f"{markdown(head, cells)}\n\n{crossover(ahead)}"


def crossover(ahead: dict[int, float]) -> str:
    """Where jobs at once stop to be faster.

    >>> crossover({4: 0.9, 2: 1.3, 8: 0.95})
    'At once is faster up to 2 examples a step, and slower from 4 on.'
    >>> crossover({1: 2.0, 8: 1.1})
    'At once is faster at every size that was tried, 1 to 8 examples a step: the crossover is above 8.'
    """
    sizes = sorted(ahead)
    slower = [size for size in sizes if ahead[size] < 1]
    if not slower:
        tried = f"{sizes[0]} to {sizes[-1]} examples a step"
        return f"At once is faster at every size that was tried, {tried}: the crossover is above {sizes[-1]}."
    faster = [size for size in sizes if size < slower[0]]
    if not faster:
        return f"At once is slower from {slower[0]} examples a step on, the least that was tried."
    return f"At once is faster up to {faster[-1]} examples a step, and slower from {slower[0]} on."


def _median(wholes: Sequence[Whole]) -> Whole:
    return Whole(
        statistics.median(whole.seconds for whole in wholes),
        int(statistics.median(whole.peak_bytes for whole in wholes)),
        int(statistics.median(whole.largest_bytes for whole in wholes)),
    )


def _medians(rounds: Sequence[Round], batch: int, slots: int) -> tuple[float, float]:
    """Seconds inside steps, and of the whole lane."""
    found = [lane for each in rounds for lane in each.lanes if (lane.batch, lane.slots) == (batch, slots)]
    inside = statistics.median(lane.step_seconds for lane in found)
    return inside, statistics.median(lane.lane_seconds for lane in found)


def main() -> None:
    """Measure everything and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", required=True, help="python of the environment with TRL")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with the tasks and GPT-2's vocabulary"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 4, 2, 1], help="of the second table")
    parser.add_argument("--slots", type=slots_of, default="auto", help="of the fleet in the first table")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of each task")
    parser.add_argument("--base", choices=("61M", "tiny"), default="61M")
    parser.add_argument("--write", type=Path, help="the page whose tables to replace")
    parser.add_argument("--results", type=Path, help="folder for fleet.json")
    options = parser.parse_args()
    check_data(options.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = ("--data", str(options.data.resolve()), "--examples", str(options.examples))
        command = (sys.executable, str(HERE / "fleet_inputs.py"), "--to", name, "--base", options.base)
        measure((*command, *given), cwd=HERE, environment=environment_of(folder))
        rounds = [
            run_round(folder, options.peer_python, options.slots, options.batches)
            for _ in range(options.repeats)
        ]
    tokens = sum(task["tokens"] for task in rounds[0].raw["trl"])
    rounds_of = f"medians of {options.repeats} rounds, two fleets in each"
    what = f"{options.examples} examples of each task, {tokens:,} tokens; {rounds_of}"
    note = machine(("ray", "torch", "transformers", "bitsandbytes"), what)
    text = f"{table(rounds)}\n\n{lane_table(rounds, options.batches)}\n\n{note}"
    write("fleet", text, options.write, options.results, [each.raw for each in rounds])


if __name__ == "__main__":
    main()
