"""The same QLoRA job here and with TRL's SFTTrainer, in one run; writes the table of docs/benchmarks.md.

Each variant runs alone, in turn, `--repeats` times; the table shows medians. Whole-process seconds are those
that a person waits: imports, Ray's start, quantisation, training, publishing. Memory is the sum over all
processes of the command.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from measure import Measurement, measure

HERE = Path(__file__).parent
BEGIN, END = "<!-- job_vs_trl: begin -->", "<!-- job_vs_trl: end -->"


@dataclass(frozen=True)
class Variant:
    """One way to run the job."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Medians of a variant."""

    name: str
    tokens_per_second: float
    seconds: float
    peak_bytes: int
    largest_bytes: int


def variants(folder: Path, peer_python: str, ours: str) -> list[Variant]:
    """Ours and TRL's, packed and not."""
    trl = (peer_python, str(HERE / "trl_job.py"), str(folder), "--to", str(folder / "trl"))
    here = (ours, "train", str(folder / "job.yaml"), "--restart", "--json", "--output", str(folder / "out"))
    return [
        Variant("TRL, unpacked", trl),
        Variant("TRL, packed", (*trl, "--packing")),
        Variant("raytune_ft, unpacked", (*here, "--set", "data.packing=false")),
        Variant("raytune_ft, packed", here),
    ]


def job_file(folder: Path) -> str:
    """The job: batch 8, one epoch, rank 16 on all linear layers, no evaluation on either side."""
    job = {
        "name": "benchmark",
        "model": {"path": str(folder / "base"), "weight_bits": 4},
        "data": {
            "sources": [{"uri": str(folder / "data.jsonl"), "template": "plain"}],
            "split": {"validation": 0.0, "test": 0.0},
        },
        "batch": {"sequences": 8},
        "evaluate": {"metrics": []},
        "publish": {"catalog": str(folder / "catalog")},
    }
    return json.dumps(job)


def run(variant: Variant, folder: Path) -> tuple[Measurement, float]:
    """One run, and the training speed that it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    measured = measure(variant.command, cwd=folder, environment=environment)
    printed = json.loads(measured.stdout.strip().splitlines()[-1])
    print(
        f"{variant.name}: {printed['tokens_per_second']:.0f} tokens/s, {measured.seconds:.1f} s, "
        f"{measured.peak_bytes / 2**30:.2f} GiB",
        file=sys.stderr,
    )
    return measured, printed["tokens_per_second"]


def medians(variant: Variant, runs: Sequence[tuple[Measurement, float]]) -> Row:
    """The row of a variant."""
    return Row(
        variant.name,
        statistics.median(speed for _, speed in runs),
        statistics.median(measured.seconds for measured, _ in runs),
        int(statistics.median(measured.peak_bytes for measured, _ in runs)),
        int(statistics.median(measured.largest_bytes for measured, _ in runs)),
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, with ratios against TRL unpacked and against TRL's best."""
    unpacked = rows[0]
    best = max(rows[:2], key=lambda row: row.tokens_per_second)
    lines = [
        "| | training tokens/s | × TRL unpacked | × TRL's best | whole process, s "
        "| memory of all processes, GiB | largest process, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.tokens_per_second:.0f} "
        f"| {row.tokens_per_second / unpacked.tokens_per_second:.2f} "
        f"| {row.tokens_per_second / best.tokens_per_second:.2f} | {row.seconds:.1f} "
        f"| {row.peak_bytes / 2**30:.2f} | {row.largest_bytes / 2**30:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def machine(repeats: int) -> str:
    """What it ran on."""
    names = ("ray", "torch", "transformers", "bitsandbytes")
    cores, memory = os.cpu_count(), psutil.virtual_memory().total / 2**30
    return (
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {cores} cores ({platform.machine()}, {_processor()}), "
        f"{memory:.0f} GiB, no GPU; medians of {repeats}; "
        + ", ".join(f"{name} {version(name)}" for name in names)
        + "."
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    """Measure all variants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True, help="python of the environment with TRL")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, help="the page whose table to replace")
    arguments = parser.parse_args()
    ours = str(Path(sys.executable).parent / "raytune-ft")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = {**os.environ, "HF_HUB_OFFLINE": "1"}
        measure([sys.executable, str(HERE / "inputs.py"), "--to", name], cwd=HERE, environment=plain)
        (folder / "job.yaml").write_text(job_file(folder))
        chosen = variants(folder, arguments.peer_python, ours)
        # Rounds, not blocks: what slows the machine down for a while then slows all variants down.
        rounds = [[run(variant, folder) for variant in chosen] for _ in range(arguments.repeats)]
    rows = [medians(variant, [each[i] for each in rounds]) for i, variant in enumerate(chosen)]
    text = f"{table(rows)}\n\n{machine(arguments.repeats)}"
    print(text)
    if arguments.write:
        page = arguments.write.read_text()
        before, rest = page.split(BEGIN)
        arguments.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
