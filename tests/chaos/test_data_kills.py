"""A streamed run over S3, killed at random and resumed on other numbers of workers: the same batches."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import tiny
import yaml
from botocore.config import Config

from raytune_ft.storage import open_storage

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray, pytest.mark.s3]

RECORDS = {"numbers": 1500, "letters": 300, "words": 90}
EPOCHS = 2
PROGRAM = Path(__file__).parent / "small_windows.py"


@pytest.fixture
def workspace(bucket: str, tmp_path: Path) -> Path:
    """A base, and three sources of unequal size in a bucket."""
    tiny.save_base(tmp_path / "base")
    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    for name, records in RECORDS.items():
        lines = (
            json.dumps({"prompt": f"{name} {n}: {'x' * (n % 90)}", "completion": f" {n % 9}{n % 7}"})
            for n in range(records)
        )
        client.put_object(Bucket=bucket, Key=f"data/{name}.jsonl", Body="\n".join(lines).encode())
    client.close()
    return tmp_path


def job_file(folder: Path, bucket: str, catalog: str) -> Path:
    job = {
        "name": "streamed",
        "model": {"path": str(folder / "base"), "weight_bits": 32},
        "data": {
            "sources": [{"uri": f"s3://{bucket}/data/{name}.jsonl"} for name in RECORDS],
            "max_tokens": 160,
        },
        "method": {"rank": 4},
        "schedule": {"epochs": EPOCHS},
        "batch": {"sequences": 24},
        "checkpoint": {"every_steps": 5},
        "cluster": {"max_restarts": 0},
        "evaluate": {"metrics": []},
        "publish": {"catalog": f"s3://{bucket}/{catalog}"},
    }
    path = folder / f"{catalog}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def start(job: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(PROGRAM), "train", str(job), "--set", f"cluster.workers={workers}"]
    with (job.parent / f"{job.stem}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--output", str(job.parent / "out")], stdout=log, stderr=log, env=os.environ
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver and to all that it started."""
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def checkpoints(bucket: str, catalog: str) -> list[str]:
    store = open_storage(f"s3://{bucket}/{catalog}/runs")
    return sorted(found.key for found in store.list() if found.key.endswith("position.json"))


def history(bucket: str, catalog: str) -> list[dict[str, Any]]:
    """Every step of a finished run, from its last checkpoint."""
    store = open_storage(f"s3://{bucket}/{catalog}/runs")
    kept = [json.loads(store.read(key)) for key in checkpoints(bucket, catalog)]
    entries: list[dict[str, Any]] = max(kept, key=lambda position: int(position["step"]))["history"]
    return entries


def kill_at_random(process: subprocess.Popen[bytes], bucket: str, catalog: str, draw: random.Random) -> bool:
    """Kill once the run has gone past its last checkpoint; whether it was still running."""
    before = checkpoints(bucket, catalog)
    while checkpoints(bucket, catalog) == before and process.poll() is None:
        time.sleep(0.1)
    time.sleep(draw.uniform(0.0, 1.0))
    if process.poll() is not None:
        return False
    end(process)
    return True


@pytest.mark.parametrize("workers", [[2, 1], [2, 3, 1, 2, 3]], ids=["two then one", "one to three"])
def test_killed_and_resumed_by_others(workspace: Path, bucket: str, workers: list[int]) -> None:
    quiet, killed = (job_file(workspace, bucket, name) for name in ("quiet", "killed"))
    undisturbed = start(quiet, 1)
    assert undisturbed.wait(timeout=300) == 0, (workspace / "quiet.log").read_text()[-3000:]
    draw = random.Random(0)
    kills = sum(kill_at_random(start(killed, count), bucket, "killed", draw) for count in workers[:-1])
    assert kills == len(workers) - 1, "a run ended before it could be killed"
    last = start(killed, workers[-1])
    assert last.wait(timeout=300) == 0, (workspace / "killed.log").read_text()[-3000:]

    expected, seen = history(bucket, "quiet"), history(bucket, "killed")
    assert [entry["batch"] for entry in seen] == [entry["batch"] for entry in expected]
    assert sum(entry["examples"] for entry in seen) == sum(entry["examples"] for entry in expected)
    for one, other in zip(expected, seen, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
