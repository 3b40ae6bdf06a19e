"""How long a sharded run stands still for its checkpoints, and how long they take to the tests' S3 server."""

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from measure import measure
from page import markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from servers import run_s3

_BUCKET = "benchmark"
_SELDOM_S = 600.0
_FIRST_STEPS = 3
"""Left out of a median: memory is still being claimed."""


@dataclass(frozen=True)
class Checkpoints:
    """Those of one run that training went on beside: not the last one, which it waits for."""

    server: str
    part_bytes: int
    """Of the first worker."""
    standstill_s: list[float]
    """From the end of a step until the next may begin: all parts are on local disks by then."""
    upload_s: list[float]
    """Of the first worker's parts, one for each standstill."""
    step_s: float
    """The median step while nothing was uploaded."""
    uploading_step_s: float
    """The median step that began while the first worker's part was being uploaded."""

    def figures(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {
            "server": self.server,
            "part_bytes": self.part_bytes,
            "standstill_s": self.standstill_s,
            "upload_s": self.upload_s,
            "step_s": self.step_s,
            "uploading_step_s": self.uploading_step_s,
        }


def checkpoints_of(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Checkpoints:
    """Run a job whose catalog is in a bucket.

    Args:
        command: the job's, without its catalog.
        folder: where to run it.
        environment: for it.
    """
    with tempfile.TemporaryDirectory() as name, run_s3(Path(name)) as server:
        client = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )
        client.create_bucket(Bucket=_BUCKET)
        catalog = ("--set", f"publish.catalog=s3://{_BUCKET}/catalog")
        variables = {**environment, **server.environment()}
        # Its memory is of no interest, and each look at it costs time.
        measure([*command, *catalog], cwd=folder, environment=variables, interval_s=_SELDOM_S)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=_BUCKET)
        sizes = {found["Key"]: found["Size"] for page in pages for found in page["Contents"]}
        # Their folders are named by the time.
        newest = max(key for key in sizes if key.endswith("/position.json"))
        history = json.loads(client.get_object(Bucket=_BUCKET, Key=newest)["Body"].read())["history"]
        part_bytes = sizes[newest] + sizes[newest.replace("position.json", "rank-0.safetensors")]
    kept = [entry for entry in history if "checkpoint_seconds" in entry and "upload_seconds" in entry]
    free, uploading = _by_upload(history)
    return Checkpoints(
        server.kind,
        part_bytes,
        [entry["checkpoint_seconds"] for entry in kept],
        [entry["upload_seconds"] for entry in kept],
        statistics.median(free),
        statistics.median(uploading),
    )


def _by_upload(history: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Seconds of the steps beside which nothing was uploaded, and of those that began during an upload."""
    free: list[float] = []
    uploading: list[float] = []
    left_s: float | None = 0.0
    for number, entry in enumerate(history):
        if left_s is not None:
            if left_s > 0:
                uploading.append(entry["seconds"])
            elif number >= _FIRST_STEPS:
                free.append(entry["seconds"])
            left_s -= entry["seconds"]
        if "checkpoint_seconds" in entry:
            # The last position does not know how long the newest upload took.
            left_s = entry.get("upload_seconds")
    return free, uploading


def table(found: Checkpoints) -> str:
    """Markdown, with the medians of the run's checkpoints."""
    standstill_s, upload_s = statistics.median(found.standstill_s), statistics.median(found.upload_s)
    head = (
        f"checkpoints of two workers to {found.server}",
        "each worker's part, MB",
        "training stands still, s",
        "upload, s",
        "stands still / upload",
        "a step during an upload",
    )
    cells = (
        f"medians of {len(found.upload_s)}",
        f"{found.part_bytes / 1e6:.0f}",
        f"{standstill_s:.2f}",
        f"{upload_s:.1f}",
        f"{standstill_s / upload_s:.1%}",
        f"× {found.uploading_step_s / found.step_s:.2f}",
    )
    return markdown(head, [cells])
