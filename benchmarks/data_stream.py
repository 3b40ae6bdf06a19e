"""Large data: seconds to the first batch from S3, and memory while an epoch of it passes.

The first batch: `--first-mb` of JSON lines in a bucket of the tests' S3 server, which runs on the same
machine; Ray is up; the clock runs from the listing to the packed batches of the first step. Twice: with
nothing known of the data, and with the token cache that the first time left.

Memory: an epoch of JSON lines in a folder, once of `--small-mb` and once of `--large-mb`; the highest sum
over all processes, shared pages counted once.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from data_inputs import check_shared, save_folder, save_rows, save_tokenizer
from measure import Measurement, measure
from page import machine, markdown, write

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from servers import run_s3  # noqa: E402  the tests' server is a script's neighbour, not a package

_BUCKET = "benchmark"


def stream(
    folder: Path, data: str, catalog: str, environment: Mapping[str, str], *options: str
) -> tuple[Measurement, dict[str, Any]]:
    """One run through Ray in a process of its own, and what it printed."""
    tokenizer = str(folder / "tokenizer")
    command = [sys.executable, str(HERE / "data_ours.py"), "cluster", "--data", data]
    command += ["--tokenizer", tokenizer, "--catalog", catalog, *options]
    plain = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    measured = measure(
        command, cwd=folder, environment={**os.environ, **plain, "HOME": str(folder), **environment}
    )
    printed = json.loads(measured.stdout.strip().splitlines()[-1])
    print(
        f"{data} {' '.join(options)}: {json.dumps(printed)}, {measured.peak_bytes / 2**20:.0f} MiB",
        file=sys.stderr,
    )
    return measured, printed


def first_batches(folder: Path, size_bytes: int) -> list[tuple[str, Measurement, dict[str, Any]]]:
    """The first step of data in a bucket, without and with a cache."""
    save_folder(folder / "first", size_bytes, folder / "rows.jsonl")
    with tempfile.TemporaryDirectory() as name, run_s3(Path(name)) as server:
        environment = server.environment()
        client = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )
        client.create_bucket(Bucket=_BUCKET)
        for path in sorted((folder / "first").iterdir()):
            client.upload_file(str(path), _BUCKET, f"data/{path.name}")
            path.unlink()
        uris = f"s3://{_BUCKET}/data", f"s3://{_BUCKET}/catalog"
        return [
            (what, *stream(folder, *uris, environment, "--cache", "--steps", "1"))
            for what in (f"{server.kind}, nothing known", f"{server.kind}, tokens cached")
        ]


def epoch(folder: Path, size_bytes: int) -> tuple[Measurement, dict[str, Any]]:
    """One epoch of data in a folder."""
    data = folder / f"epoch-{size_bytes >> 20}"
    save_folder(data, size_bytes, folder / "rows.jsonl")
    found = stream(folder, str(data), str(folder / "catalog"), {})
    for path in data.iterdir():
        path.unlink()
    return found


def main() -> None:
    """Measure and write both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first-mb", type=int, default=1000)
    parser.add_argument("--small-mb", type=int, default=100)
    parser.add_argument("--large-mb", type=int, default=600)
    parser.add_argument("--full", action="store_true", help="2000 MB as the large epoch")
    parser.add_argument("--write", type=Path, help="the page whose tables to replace")
    parser.add_argument("--results", type=Path, help="folder for data_stream.json")
    arguments = parser.parse_args()
    check_shared()
    sizes = (arguments.small_mb, 2000 if arguments.full else arguments.large_mb)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(folder / "tokenizer")
        save_rows(folder / "rows.jsonl", 100_000)
        firsts = first_batches(folder, arguments.first_mb * 10**6)
        epochs = [(size_mb, *epoch(folder, size_mb * 10**6)) for size_mb in sizes]
    first_table = markdown(
        (
            f"{arguments.first_mb} MB of JSON lines",
            "seconds to the first batch",
            "of which before reading on",
        ),
        [
            (what, f"{found['first_batch_seconds']:.1f}", f"{found['of_which']['prepare']:.1f}")
            for what, _, found in firsts
        ],
    )
    base = epochs[0][1].peak_bytes
    epoch_table = markdown(
        ("one epoch of", "MB/s", "examples/s", "memory of all processes, GiB", "× the smaller"),
        [
            (
                f"{size_mb} MB",
                f"{size_mb / found['seconds']:.1f}",
                f"{found['examples'] / found['seconds']:,.0f}",
                f"{measured.peak_bytes / 2**30:.2f}",
                f"{measured.peak_bytes / base:.2f}",
            )
            for size_mb, measured, found in epochs
        ],
    )
    raw = [{"what": str(what), **found, **measured.figures()} for what, measured, found in [*firsts, *epochs]]
    text = f"{first_table}\n\n{epoch_table}\n\n{machine(('ray', 'pyarrow', 'tokenizers'), 'one run each')}"
    write("data_stream", text, arguments.write, arguments.results, raw)


if __name__ == "__main__":
    main()
