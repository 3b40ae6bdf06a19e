"""The fleet benchmark for GPUs, small and on CPU: it needs no Ray, and all its rows train the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

from pages import ROOT

ABSENT = ("ray", "pyarrow", "peft", "deepspeed", "boto3", "s3fs", "datasets", "trl")
SOURCE = f"""
import runpy, sys
sys.modules |= dict.fromkeys({ABSENT!r})
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_runs_without_ray_and_its_rows_agree(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "fleet_gpu.py")
    given = (script, "--device", "cpu", "--small", "--results", str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", SOURCE, *given],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads((tmp_path / "fleet_gpu.json").read_text())["runs"]["rows"]
    assert [(row["held"], row["slots"]) for row in rows] == [
        ("dequantised", 1),
        ("dequantised", 2),
        ("packed", 1),
        ("packed", 2),
    ]
    assert len({(row["tokens"], row["loss"]) for row in rows}) == 1
    assert "× one after another" in run.stdout
