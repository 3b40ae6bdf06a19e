"""One sharded full fine-tune here, as a bare DeepSpeed script, and with TRL, accelerate and DeepSpeed.

Two processes with a thread each, on CPU. Each variant runs alone, `--repeats` times; the table shows medians.
The bare script gets the very passes that the workers here computed, so its losses have to be theirs. Then
both run at the same time and take turns, which says more exactly how their steps compare. A last run keeps
checkpoints in a bucket of the tests' S3 server: how long does training stand still for them?
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Measurement, measure
from page import machine, markdown, write
from sharded_checkpoints import checkpoints_of
from sharded_checkpoints import table as checkpoint_table
from sharded_job import (
    WORKERS,
    bare,
    environment_of,
    last_position,
    lay_out_job,
    lay_out_passes,
    loss_difference,
    ours,
    several,
    step_times,
)
from sharded_turns import Turns, turns_of
from sharded_turns import table as turns_table

_FIRST_STEPS = 3
"""Left out of a median: memory is still being claimed."""
_LONG_EXAMPLE_TOKENS = 32
"""Of the inputs' examples; their mean is 26."""
_SAMPLE_INTERVAL_S = 5.0
"""Seldom: a look at gigabytes costs tens of milliseconds, and more beside Ray than beside the others."""
_TURNS = 8
OURS, BARE, TRL = "raytune_ft", "bare DeepSpeed", "TRL"


@dataclass(frozen=True)
class Variant:
    """One way to run the job."""

    side: str
    name: str
    stage: int
    command: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What one run showed."""

    measured: Measurement
    step_seconds: list[float]
    tokens_per_step: float
    first_step_s: float
    """From the command to the end of its first step."""
    losses: list[float] | None
    """Of each step; None of a side that trains on other batches."""

    @property
    def step_s(self) -> float:
        """The median step."""
        return statistics.median(self.step_seconds[_FIRST_STEPS:])

    def figures(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {
            "step_seconds": self.step_seconds,
            "step_s": self.step_s,
            "tokens_per_step": self.tokens_per_step,
            "first_step_s": self.first_step_s,
            "losses": self.losses,
            **self.measured.figures(),
        }


@dataclass(frozen=True)
class Row:
    """Medians of a variant."""

    variant: Variant
    step_s: float
    tokens_per_second: float
    first_step_s: float
    peak_bytes: float
    largest_bytes: float


def variants(folder: Path, peer_python: str, sequences: int) -> list[Variant]:
    """Ours and the bare script at two stages; TRL at the one that both have."""

    def trl(*options: str) -> tuple[str, ...]:
        return several(peer_python, "trl_sharded_job.py", folder, *options)

    # A row of each process has about as many tokens as the others have in a step.
    row = ("--row-tokens", str(sequences // WORKERS * _LONG_EXAMPLE_TOKENS))
    return [
        Variant(OURS, "raytune_ft, ZeRO-2", 2, ours(folder, 2)),
        Variant(BARE, "bare DeepSpeed, ZeRO-2", 2, bare(folder, 2)),
        Variant(OURS, "raytune_ft, ZeRO-3", 3, ours(folder, 3)),
        Variant(BARE, "bare DeepSpeed, ZeRO-3", 3, bare(folder, 3)),
        Variant(TRL, "TRL, ZeRO-2, unpacked", 2, trl("--rows", str(sequences // WORKERS))),
        Variant(TRL, "TRL, ZeRO-2, packed", 2, trl("--rows", "1", "--packing", *row)),
    ]


def run(variant: Variant, folder: Path) -> Run:
    """One run of a variant."""
    began = time.time()
    measured = measure(
        variant.command, cwd=folder, environment=environment_of(folder), interval_s=_SAMPLE_INTERVAL_S
    )
    if variant.side == OURS:
        history = json.loads(last_position(folder).read_text())["history"]
        first_step_at = step_times(folder)[1]
        seconds = [entry["seconds"] for entry in history]
        losses = [entry["loss"] for entry in history]
        tokens = statistics.mean(entry["tokens"] for entry in history)
    else:
        lines = measured.stdout.splitlines()
        printed = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
        first_step_at, seconds = printed["first_step_at"], printed["step_seconds"]
        losses, tokens = printed.get("losses"), printed["tokens_per_step"]
    if len(seconds) <= _FIRST_STEPS:
        raise SystemExit(
            f"{variant.name}: {len(seconds)} steps; raise --steps, the first {_FIRST_STEPS} do not count"
        )
    found = Run(measured, seconds, tokens, first_step_at - began, losses)
    print(
        f"{variant.name}: {found.step_s:.3f} s a step, first after {found.first_step_s:.1f} s, "
        f"{measured.seconds:.1f} s in all, {measured.peak_bytes / 2**30:.2f} GiB",
        file=sys.stderr,
    )
    return found


def rounds_of(chosen: Sequence[Variant], folder: Path, repeats: int) -> tuple[list[list[Run]], float]:
    """Runs in rounds, not blocks: what slows the machine down for a while then slows all variants down.

    Returns:
        The runs of each round, and how far apart the losses of the same passes were.

    Raises:
        SystemExit: the bare script computed other losses.
    """
    rounds, apart = [], 0.0
    for _ in range(repeats):
        runs: list[Run] = []
        for variant in chosen:
            if variant.side == BARE and not (folder / "batches").exists():
                lay_out_passes(folder)
            runs.append(run(variant, folder))
        rounds.append(runs)
        apart = max(apart, loss_difference([found.losses for found in runs if found.losses is not None]))
    return rounds, apart


def medians(variant: Variant, runs: Sequence[Run]) -> Row:
    """The row of a variant."""
    step_s = statistics.median(found.step_s for found in runs)
    return Row(
        variant,
        step_s,
        runs[0].tokens_per_step / step_s,
        statistics.median(found.first_step_s for found in runs),
        statistics.median(found.measured.peak_bytes for found in runs),
        statistics.median(found.measured.largest_bytes for found in runs),
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, with ratios against TRL's best."""
    best = max(row.tokens_per_second for row in rows if row.variant.side == TRL)
    head = (
        "",
        "median step, s",
        "training tokens/s",
        "× TRL's best",
        "command to the end of the first step, s",
        "memory of all processes, GiB",
        "largest process, GiB",
    )
    cells = [
        (
            row.variant.name,
            f"{row.step_s:.3f}",
            f"{row.tokens_per_second:.0f}",
            f"{row.tokens_per_second / best:.2f}",
            f"{row.first_step_s:.1f}",
            f"{row.peak_bytes / 2**30:.2f}",
            f"{row.largest_bytes / 2**30:.2f}",
        )
        for row in rows
    ]
    return markdown(head, cells)


def turns_in(folder: Path, turn_steps: int, sequences: int) -> list[Turns]:
    """Turns at both stages, in a new folder, after a run whose passes they take."""
    steps = _TURNS * turn_steps
    lay_out_job(folder, steps, sequences)
    measure(ours(folder, 2), cwd=folder, environment=environment_of(folder), interval_s=_SAMPLE_INTERVAL_S)
    lay_out_passes(folder)
    return [turns_of(folder, stage, steps, turn_steps) for stage in (2, 3)]


def main() -> None:
    """Measure all variants and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer-python", required=True, help="python of the environment with TRL and DeepSpeed"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=32, help="examples of a step")
    parser.add_argument("--turn-steps", type=int, default=4, help=f"of each of {_TURNS} turns")
    parser.add_argument("--checkpoint-every", type=int, default=6, help="steps; four checkpoints are kept")
    parser.add_argument("--write", type=Path, help="the page whose tables to replace")
    parser.add_argument("--results", type=Path, help="folder for sharded.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out_job(folder, arguments.steps, arguments.sequences)
        chosen = variants(folder, arguments.peer_python, arguments.sequences)
        rounds, apart = rounds_of(chosen, folder, arguments.repeats)
        turns = turns_in(folder / "turns", arguments.turn_steps, arguments.sequences)
        every = arguments.checkpoint_every
        lengths = (f"schedule.steps={4 * every - 2}", f"checkpoint.every_steps={every}")
        options = [option for length in lengths for option in ("--set", length)]
        checkpoints = checkpoints_of(ours(folder, 2, *options), folder, environment_of(folder))
    of_variant = list(zip(*rounds, strict=True))
    rows = [medians(variant, runs) for variant, runs in zip(chosen, of_variant, strict=True)]
    same = f"on the same batches all losses agree within {apart:.0e}"
    what = f"first table: medians of {arguments.repeats} runs of {arguments.steps} steps; {same}"
    note = machine(("ray", "torch", "transformers", "deepspeed"), what)
    raw: list[dict[str, Any]] = [
        {"name": variant.name, "runs": [found.figures() for found in runs]}
        for variant, runs in zip(chosen, of_variant, strict=True)
    ]
    raw += [each.figures() for each in (*turns, checkpoints)]
    text = "\n\n".join((table(rows), turns_table(turns), checkpoint_table(checkpoints), note))
    write("sharded", text, arguments.write, arguments.results, raw)


if __name__ == "__main__":
    main()
