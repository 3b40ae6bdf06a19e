"""What a plan asks the cluster."""

import json
from pathlib import Path

import pytest
import ray
import yaml

from raytune_ft.cli.plan import plan_command
from raytune_ft.errors import SpecError
from raytune_ft.spec import read_job
from raytune_ft.train.devices import own_smallest_gpu_bytes

pytestmark = pytest.mark.ray


@pytest.fixture
def job_file(base: Path, tmp_path: Path) -> Path:
    values = {
        "name": "plan",
        "model": {"path": str(base)},
        "data": {"sources": [{"uri": "s3://nowhere/data.jsonl"}], "max_tokens": 64},
        "publish": {"catalog": "s3://nowhere"},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_cluster_that_does_not_say_what_its_gpus_have(
    cluster: str, job_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    with pytest.raises(SpecError, match=f"RAY_ADDRESS = {cluster}: the cluster has no GPU that says .*--gpu"):
        plan_command(read_job(job_file, ["cluster.device=gpu"]), None, as_json=True)
    for device in ("cpu", "auto"):
        plan_command(read_job(job_file, [f"cluster.device={device}"]), None, as_json=True)
    plan_command(read_job(job_file), "24GiB", as_json=True)
    found = [json.loads(line)["device_bytes"] for line in capsys.readouterr().out.splitlines()]
    assert found == [None, None, 24 << 30]


@pytest.mark.parametrize(
    ("said", "size_bytes"),
    [("81559\n24564\n", 24564 << 20), ("[N/A]\n", None), ("", None)],
    ids=["two", "one that does not say", "none"],
)
def test_what_the_driver_says(
    said: str, size_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_smallest_gpu_bytes() == size_bytes


def test_a_machine_without_that_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_smallest_gpu_bytes() is None
