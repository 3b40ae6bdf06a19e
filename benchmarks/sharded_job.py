"""The job of the sharded benchmarks, and the commands that run it: here, and as a bare DeepSpeed script."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import measure
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

HERE = Path(__file__).parent
WORKERS = 2
_LOSS_TOLERANCE = 1e-4


def lay_out_job(folder: Path, steps: int, sequences: int) -> None:
    """Write base, data and job file of a full fine-tune in float32: one epoch, no evaluation on any side."""
    folder.mkdir(exist_ok=True)
    examples = ("--examples", str(steps * sequences))
    command = [sys.executable, str(HERE / "inputs.py"), "--to", str(folder), *examples]
    measure(command, cwd=HERE, environment=environment_of(folder))
    job = {
        "name": "sharded",
        "model": {"path": str(folder / "base"), "weight_bits": 32},
        "data": {
            "sources": [{"uri": str(folder / "data.jsonl"), "template": "plain"}],
            "split": {"validation": 0.0, "test": 0.0},
        },
        "method": {"kind": "full"},
        "batch": {"sequences": sequences},
        "cluster": {"workers": WORKERS, "device": "cpu"},
        "evaluate": {"metrics": []},
        "publish": {"catalog": str(folder / "catalog")},
    }
    (folder / "job.yaml").write_text(json.dumps(job))


def lay_out_passes(folder: Path) -> None:
    """Write the passes of the run that was last, for the bare script."""
    job, position = str(folder / "job.yaml"), str(last_position(folder))
    command = [sys.executable, str(HERE / "sharded_inputs.py"), "--job", job, "--position", position]
    measure([*command, "--to", str(folder / "batches")], cwd=HERE, environment=environment_of(folder))


def ours(folder: Path, stage: int, *options: str) -> tuple[str, ...]:
    """The command of a run here."""
    program = str(Path(sys.executable).parent / "raytune-ft")
    output = ("--json", "--output", str(folder / "out"))
    stages = ("--set", f"cluster.zero_stage={stage}")
    return (program, "train", str(folder / "job.yaml"), "--restart", "--no-cache", *output, *stages, *options)


def several(python: str, script: str, folder: Path, *options: str) -> tuple[str, ...]:
    """The command of a script that torchrun starts once for each worker."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}")
    return (python, *launcher, str(HERE / script), str(folder), *options)


def bare(folder: Path, stage: int) -> tuple[str, ...]:
    """The command of a run of the bare script."""
    return several(sys.executable, "deepspeed_job.py", folder, "--stage", str(stage))


def environment_of(folder: Path) -> dict[str, str]:
    """Variables of all runs: no GPU, one thread, no network."""
    plain = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    alike = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **plain, **alike}


def loss_difference(sides: Sequence[Sequence[float]]) -> float:
    """The largest between any two sides that computed the same passes, at any step.

    Raises:
        SystemExit: they computed other losses.
    """
    difference = max(max(each) - min(each) for each in zip(*sides, strict=True))
    if difference > _LOSS_TOLERANCE:
        raise SystemExit(f"the losses of ours and of the bare script differ by {difference:.2g}")
    return difference


def last_position(folder: Path) -> Path:
    """The position at the end of the run here that was last."""
    return max((folder / "catalog").rglob("position.json"), key=lambda path: path.stat().st_mtime)


def step_times(folder: Path) -> dict[int, float]:
    """When the driver heard of each step of a run here, up to 0.2 s after its end; Unix times."""
    files = list((folder / "out" / "tensorboard").glob("*"))
    events = EventFileLoader(str(files[0])).Load() if files else ()
    times: dict[int, float] = {}
    for event in events:
        times.setdefault(event.step, event.wall_time)
    times.pop(0, None)
    return times
