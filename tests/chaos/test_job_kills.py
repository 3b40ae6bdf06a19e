"""A QLoRA job killed again and again at random places, in the worker and in the driver: the same bits."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from raytune_ft.catalog import Catalog

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

STEPS = 120
ROUNDS = 10


def job_file(folder: Path, catalog: str) -> Path:
    lines = [
        json.dumps({"prompt": f"Count to {n}:", "completion": f" {n % 9}{n % 7}{n % 5}"}) for n in range(200)
    ]
    (folder / "data.jsonl").write_text("\n".join(lines))
    job = {
        "name": "killed",
        "model": {"path": str(folder / "base")},
        "data": {"sources": [{"uri": str(folder / "data.jsonl")}], "max_tokens": 64},
        "method": {"rank": 8, "dropout": 0.1},
        "optimizer": {"kind": "adamw_8bit", "learning_rate": 5e-3},
        "schedule": {"steps": STEPS},
        "batch": {"sequences": 8},
        "checkpoint": {"every_steps": 7},
        "cluster": {"max_restarts": 100},
        "evaluate": {"metrics": ["exact_match"], "max_examples": 4, "max_new_tokens": 2},
        "publish": {"catalog": str(folder / catalog)},
    }
    path = folder / f"{catalog}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def start(job: Path) -> subprocess.Popen[str]:
    program = Path(sys.executable).parent / "raytune-ft"
    command = [program, "train", str(job), "--json", "--output", str(job.parent / "out")]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, env=os.environ
    )


def adapter(folder: Path, catalog: str) -> dict[str, torch.Tensor]:
    pulled = folder / f"{catalog}-pulled"
    record = Catalog.at(str(folder / catalog)).pull("killed", pulled)
    assert record.version == 1, "published once, however often it was killed"
    tensors: dict[str, torch.Tensor] = load_file(pulled / "adapter_model.safetensors")
    return tensors


def end(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the driver and to all that it started."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in tree:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


@pytest.mark.parametrize("seed", range(3))
def test_random_kills_leave_no_trace(tmp_path: Path, seed: int) -> None:
    tiny.save_base(tmp_path / "base")
    undisturbed = start(job_file(tmp_path, "quiet"))
    began = time.monotonic()
    assert undisturbed.wait(timeout=300) == 0
    usual_s = time.monotonic() - began
    draw = random.Random(seed)
    job = job_file(tmp_path, "killed")
    for _ in range(ROUNDS):
        process = start(job)
        deadline = time.monotonic() + draw.uniform(0.2, 1.0) * usual_s
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        if process.poll() is None:
            end(process)
    last = start(job)
    assert last.wait(timeout=300) == 0
    quiet, killed = adapter(tmp_path, "quiet"), adapter(tmp_path, "killed")
    assert quiet.keys() == killed.keys()
    assert all(torch.equal(quiet[name], killed[name]) for name in quiet)
