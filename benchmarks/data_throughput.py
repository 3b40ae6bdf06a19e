"""Records to packed batches: this project, Hugging Face datasets, mosaicml-streaming and a plain loop.

The same file, the same tokenizer, the same text and the same rows of at most 1024 tokens; each variant alone,
in turn, `--repeats` times; the table shows medians. Every variant has to end with the same number of tokens.
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

from data_inputs import check_shared, save_rows, save_tokenizer
from measure import Measurement, measure
from page import machine, markdown, write

HERE = Path(__file__).parent
MAX_TOKENS = 1024
LIMIT, ONE_CORE = "plain loop", "raytune_ft, no cluster"
COLD, WARM = "raytune_ft, first job of a Ray cluster", "raytune_ft, a later job"
PEERS = ("datasets + TRL's packing", "mosaicml-streaming")


@dataclass(frozen=True)
class Variant:
    """One way to do the work."""

    name: str
    cores: int
    command: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Medians of a variant."""

    name: str
    cores: int
    examples_per_second: float
    fill: float
    """Tokens by all places of its rows of 1024."""
    peak_bytes: int


def variants(folder: Path, peer_python: str, streaming_python: str) -> list[Variant]:
    """The limit, both peers, both of ours."""
    data = ["--data", str(folder / "rows.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    data += ["--max-tokens", str(MAX_TOKENS)]
    peers, ours = str(HERE / "data_peers.py"), str(HERE / "data_ours.py")
    catalog = ("--catalog", str(folder / "catalog"))
    return [
        Variant(LIMIT, 1, (peer_python, peers, "plain", *data)),
        Variant(PEERS[0], 2, (peer_python, peers, "datasets", *data)),
        Variant(PEERS[1], 2, (streaming_python, peers, "streaming", *data)),
        Variant(ONE_CORE, 1, (sys.executable, ours, "core", *data, *catalog)),
        Variant(COLD, 2, (sys.executable, ours, "cluster", *data, *catalog)),
        Variant(WARM, 2, (sys.executable, ours, "cluster", "--warm", *data, *catalog)),
    ]


def run(variant: Variant, folder: Path) -> tuple[Measurement, dict[str, Any]]:
    """One run, and what it printed."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **offline, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    measured = measure(variant.command, cwd=folder, environment=environment)
    printed = json.loads(measured.stdout.strip().splitlines()[-1])
    print(f"{variant.name}: {json.dumps(printed)}", file=sys.stderr)
    return measured, printed


def medians(variant: Variant, examples: int, runs: Sequence[tuple[Measurement, dict[str, Any]]]) -> Row:
    """The row of a variant."""
    printed = runs[0][1]
    return Row(
        variant.name,
        variant.cores,
        examples / statistics.median(found["seconds"] for _, found in runs),
        printed["tokens"] / (printed["packed_rows"] * MAX_TOKENS),
        int(statistics.median(measured.peak_bytes for measured, _ in runs)),
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, with ratios against the limit and against the better peer."""
    of = {row.name: row.examples_per_second for row in rows}
    best = max(of[name] for name in PEERS)
    head = ("", "cores", "examples/s", "× plain loop", "× better peer", "places filled", "memory, GiB")
    cells = [
        (
            row.name,
            str(row.cores),
            f"{row.examples_per_second:,.0f}",
            f"{row.examples_per_second / of[LIMIT]:.2f}",
            f"{row.examples_per_second / best:.2f}",
            f"{row.fill:.1%}",
            f"{row.peak_bytes / 2**30:.2f}",
        )
        for row in rows
    ]
    scale = f"{of[COLD] / of[ONE_CORE]:.2f} × and {of[WARM] / of[ONE_CORE]:.2f} ×"
    return f"{markdown(head, cells)}\n\nRay on two cores is {scale} one core."


def main() -> None:
    """Measure all variants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--peer-python", required=True, help="python of the environment with datasets and TRL"
    )
    parser.add_argument("--streaming-python", required=True, help="python of that with mosaicml-streaming")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", type=Path, help="the page whose table to replace")
    parser.add_argument("--results", type=Path, help="folder for data_throughput.json")
    arguments = parser.parse_args()
    check_shared()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(folder / "tokenizer")
        save_rows(folder / "rows.jsonl", arguments.rows)
        chosen = variants(folder, arguments.peer_python, arguments.streaming_python)
        # Rounds, not blocks: what slows the machine down for a while then slows all variants down.
        rounds = [[run(variant, folder) for variant in chosen] for _ in range(arguments.repeats)]
    tokens = {found["tokens"] for each in rounds for _, found in each}
    if len(tokens) > 1:
        raise SystemExit(f"the variants did not do the same work: they ended with {sorted(tokens)} tokens")
    of_variant = [[each[i] for each in rounds] for i in range(len(chosen))]
    rows = [medians(variant, arguments.rows, runs) for variant, runs in zip(chosen, of_variant, strict=True)]
    what = f"{arguments.rows:,} records, {tokens.pop():,} tokens; medians of {arguments.repeats}"
    raw = [
        {"name": variant.name, "runs": [{**found, **measured.figures()} for measured, found in runs]}
        for variant, runs in zip(chosen, of_variant, strict=True)
    ]
    text = f"{table(rows)}\n\n{machine(('ray', 'pyarrow', 'tokenizers'), what)}"
    write("data_throughput", text, arguments.write, arguments.results, raw)


if __name__ == "__main__":
    main()
