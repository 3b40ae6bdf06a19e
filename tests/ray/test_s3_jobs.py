"""Natural Instructions tasks by command line through a real S3 server: model, data, runs and catalog."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import peft
import pytest
import tiny
import yaml
from botocore.config import Config
from faultproxy import Fault, FaultProxy, Request

from raytune_ft.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.s3]

TASKS = [
    "task1146_country_capital",
    "task1147_country_currency",
    "task1317_country_calling_code",
    "task1318_country_national_dish",
    "task1426_country_independence_year",
]
OUTAGE_S = 20.0


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`raytune-ft` as a user runs it: a process of its own, with a Ray of its own."""
    program = Path(sys.executable).parent / "raytune-ft"
    return subprocess.run(
        [program, *arguments], cwd=cwd, capture_output=True, text=True, env=os.environ, timeout=300
    )


def upload(bucket: str, files: Sequence[tuple[str, Path]]) -> None:
    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    for key, path in files:
        client.upload_file(str(path), bucket, key)
    client.close()


CLUSTER = """
import logging, sys, warnings
warnings.simplefilter("ignore")
import ray
context = ray.init(
    address="local", num_cpus=2, object_store_memory=150 << 20, include_dashboard=False, log_to_driver=False,
    logging_level=logging.ERROR, _temp_dir=sys.argv[1],
)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture
def running_cluster(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster that was there before the jobs, whose workers know the bucket's credentials."""
    assert bucket
    # A short path: that of a socket below it may have 107 characters.
    folder = tempfile.TemporaryDirectory(prefix="rt-", ignore_cleanup_errors=True)
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, folder.name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ,
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    monkeypatch.setenv("RAY_ADDRESS", address)
    yield address
    process.communicate("")
    folder.cleanup()


@pytest.fixture
def workspace(bucket: str, shared_data: Path, tmp_path: Path) -> Path:
    """A bucket with a base and five tasks, and a folder with one job file for all of them."""
    base = tiny.save_base(tmp_path / "base", tiny.llama(positions=512))
    uploads = [(f"models/tiny/{file.name}", file) for file in base.iterdir()]
    folder = shared_data / "tasks" / "natural_instructions"
    uploads += [(f"tasks/{task}.json", folder / f"{task}.json") for task in TASKS]
    upload(bucket, uploads)
    job = {
        "name": "task",
        "model": {"path": "s3://${BUCKET}/models/tiny"},
        "data": {"sources": [{"uri": "s3://${BUCKET}/tasks/"}], "max_tokens": 400, "too_long": "drop"},
        "method": {"rank": 4},
        "optimizer": {"learning_rate": 5e-3},
        "schedule": {"steps": 6},
        "batch": {"sequences": 8},
        "checkpoint": {"every_steps": 3},
        "evaluate": {
            "max_examples": 8,
            "max_new_tokens": 8,
            "metrics": ["exact_match", "rouge", "bleu", "chrf"],
        },
        "publish": {"catalog": "s3://${BUCKET}/adapters"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path


def train(task: str, workspace: Path, *more: str) -> subprocess.CompletedProcess[str]:
    name = task.replace("_", "-")
    uri = f"data.sources.0.uri=s3://${{BUCKET}}/tasks/{task}.json"
    return command("train", "job.yaml", "--set", f"name={name}", "--set", uri, "--json", *more, cwd=workspace)


@pytest.mark.parametrize(
    "tasks", [TASKS[:1], pytest.param(TASKS, marks=[pytest.mark.slow, pytest.mark.chaos])]
)
def test_tasks_trained_evaluated_and_published(
    tasks: Sequence[str],
    running_cluster: str,
    workspace: Path,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert running_cluster
    monkeypatch.setenv("BUCKET", bucket)
    results: list[dict[str, Any]] = []
    for task in tasks:
        done = train(task, workspace)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1
        results.append(json.loads(done.stdout))
    for task, result in zip(tasks, results, strict=True):
        name = task.replace("_", "-")
        assert result["adapter"] == name
        assert result["uri"].startswith(f"s3://{bucket}/adapters/")
        assert result["scores_after"]["token_loss"] < result["scores_before"]["token_loss"]
        assert {"exact_match", "rougeL", "bleu", "chrf"} <= set(result["scores_after"])
        assert (workspace / "runs" / name / "report.html").is_file()
    catalog = f"s3://{bucket}/adapters"
    listed = command("catalog", "ls", "--catalog", catalog, "--json", cwd=workspace)
    assert sorted(entry["adapter"] for entry in json.loads(listed.stdout)) == sorted(
        r["adapter"] for r in results
    )
    pulled = command(
        "catalog",
        "pull",
        f"{results[0]['adapter']}@candidate",
        "--to",
        "pulled",
        "--catalog",
        catalog,
        cwd=workspace,
    )
    assert pulled.returncode == 0, pulled.stderr
    peft.PeftModel.from_pretrained(tiny.llama(positions=512), workspace / "pulled")
    again = train(TASKS[0], workspace)
    assert json.loads(again.stdout) == results[0], "a finished job is not trained again"


def test_wrong_credentials_are_one_message_and_exit_code_4(
    workspace: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", bucket)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    refused = train(TASKS[0], workspace)
    assert refused.returncode == 4
    assert refused.stdout == ""
    assert refused.stderr.splitlines()[-1] == (
        f"raytune-ft: s3://{bucket}/models/tiny: {os.environ['AWS_ENDPOINT_URL']} refused the credentials "
        "(SignatureDoesNotMatch); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary ones, "
        "AWS_SESSION_TOKEN"
    )
    assert "Traceback" not in refused.stderr
    assert "not-the-secret" not in refused.stderr


def test_a_bucket_that_does_not_exist(workspace: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", bucket)
    refused = train(TASKS[0], workspace, "--set", "publish.catalog=s3://no-such-bucket/adapters")
    assert refused.returncode == 4
    assert "no-such-bucket" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.chaos
def test_training_goes_on_while_the_store_is_away(
    fault_proxy: FaultProxy, workspace: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", bucket)
    began: list[float] = []

    def outage(request: Request) -> Fault | None:
        if not began and request.method == "PUT" and "/checkpoint_" in request.path:
            began.append(time.monotonic())
        return Fault.UNAVAILABLE if began and time.monotonic() - began[0] < OUTAGE_S else None

    fault_proxy.plan = outage
    done = train(TASKS[0], workspace, "--set", "schedule.steps=45", "--set", "checkpoint.every_steps=15")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 45
    runs = open_storage(f"s3://{bucket}/adapters/runs")
    newest = max(found.key for found in runs.list() if found.key.endswith("position.json"))
    history = json.loads(runs.read(newest))["history"]
    assert history[14]["upload_seconds"] > OUTAGE_S / 2
    assert history[14]["checkpoint_seconds"] < OUTAGE_S / 4
