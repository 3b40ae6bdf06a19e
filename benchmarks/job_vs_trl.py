"""The same QLoRA job here and with TRL's SFTTrainer, in one run; writes the table of docs/benchmarks.md.

Each variant runs alone, in turn, `--repeats` times; the table shows medians. Whole-process seconds are those
that a person waits: imports, Ray's start, quantisation, training, publishing. Memory is the sum over all
processes of the command.
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

from measure import Measurement, measure
from page import machine, markdown, write

HERE = Path(__file__).parent


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
    data_share: float | None
    """Part of the steps in which they waited for data; None where nobody counts it."""


def variants(folder: Path, peer_python: str, ours: str) -> list[Variant]:
    """Ours and TRL's, packed and not."""
    trl = (peer_python, str(HERE / "trl_job.py"), str(folder), "--to", str(folder / "trl"))
    here = (
        ours,
        "train",
        str(folder / "job.yaml"),
        "--restart",
        "--no-cache",
        "--json",
        "--output",
        str(folder / "out"),
    )
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


def run(variant: Variant, folder: Path) -> tuple[Measurement, dict[str, Any]]:
    """One run, and what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    measured = measure(variant.command, cwd=folder, environment=environment)
    printed = json.loads(measured.stdout.strip().splitlines()[-1])
    printed["data_share"] = data_share(folder / "catalog") if "adapter" in printed else None
    print(
        f"{variant.name}: {printed['tokens_per_second']:.0f} tokens/s, {measured.seconds:.1f} s, "
        f"{measured.peak_bytes / 2**30:.2f} GiB",
        file=sys.stderr,
    )
    return measured, printed


def data_share(catalog: Path) -> float:
    """Which part of its steps the last run spent waiting for data, by its last checkpoint."""
    newest = max(catalog.rglob("position.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(newest.read_text())["history"]
    waited = sum(float(entry["data_seconds"]) for entry in history)
    return waited / sum(float(entry["seconds"]) for entry in history)


def medians(variant: Variant, runs: Sequence[tuple[Measurement, dict[str, Any]]]) -> Row:
    """The row of a variant."""
    shares = [printed["data_share"] for _, printed in runs if printed["data_share"] is not None]
    return Row(
        variant.name,
        statistics.median(printed["tokens_per_second"] for _, printed in runs),
        statistics.median(measured.seconds for measured, _ in runs),
        int(statistics.median(measured.peak_bytes for measured, _ in runs)),
        int(statistics.median(measured.largest_bytes for measured, _ in runs)),
        statistics.median(shares) if shares else None,
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, with ratios against TRL unpacked and against TRL's best."""
    unpacked = rows[0]
    best = max(rows[:2], key=lambda row: row.tokens_per_second)
    head = (
        "",
        "training tokens/s",
        "× TRL unpacked",
        "× TRL's best",
        "waiting for data",
        "whole process, s",
        "memory of all processes, GiB",
        "largest process, GiB",
    )
    cells = [
        (
            row.name,
            f"{row.tokens_per_second:.0f}",
            f"{row.tokens_per_second / unpacked.tokens_per_second:.2f}",
            f"{row.tokens_per_second / best.tokens_per_second:.2f}",
            "–" if row.data_share is None else f"{row.data_share:.2%}",
            f"{row.seconds:.1f}",
            f"{row.peak_bytes / 2**30:.2f}",
            f"{row.largest_bytes / 2**30:.2f}",
        )
        for row in rows
    ]
    return markdown(head, cells)


def main() -> None:
    """Measure all variants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True, help="python of the environment with TRL")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, help="the page whose table to replace")
    parser.add_argument("--results", type=Path, help="folder for job_vs_trl.json")
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
    of_variant = [[each[i] for each in rounds] for i in range(len(chosen))]
    rows = [medians(variant, runs) for variant, runs in zip(chosen, of_variant, strict=True)]
    packages = ("ray", "torch", "transformers", "bitsandbytes")
    text = f"{table(rows)}\n\n{machine(packages, f'medians of {arguments.repeats}')}"
    raw = [
        {"name": variant.name, "runs": [{**printed, **measured.figures()} for measured, printed in runs]}
        for variant, runs in zip(chosen, of_variant, strict=True)
    ]
    write("job_vs_trl", text, arguments.write, arguments.results, raw)


if __name__ == "__main__":
    main()
