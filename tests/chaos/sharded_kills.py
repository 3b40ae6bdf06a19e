"""Kills a full fine-tune of two workers at random places, and compares it with one that nobody disturbed.

As a script it prints the log that docs/reliability.md shows:

    python tests/chaos/sharded_kills.py --kills 30 --seed 0
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny  # type: ignore[import-not-found]  # in the folder above

from raytune_ft.catalog import Catalog

STEPS = 150
VICTIMS = ("a worker", "the driver", "the machine")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    victim: str
    after_s: float
    """Since the command began."""


def job_file(folder: Path, name: str, *, zero_stage: int, workers: int) -> Path:
    """A job of its own catalog, `folder/name`."""
    lines = [
        json.dumps({"prompt": f"Count to {n}:", "completion": f" {n % 9}{n % 7}{n % 5}"}) for n in range(200)
    ]
    (folder / "data.jsonl").write_text("\n".join(lines))
    job = {
        "name": "killed",
        "model": {"path": str(folder / "base"), "weight_bits": 32},
        "data": {"sources": [{"uri": str(folder / "data.jsonl")}], "max_tokens": 64},
        "method": {"kind": "full"},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"steps": STEPS},
        "batch": {"sequences": 8},
        "checkpoint": {"every_steps": 5},
        "cluster": {"workers": workers, "zero_stage": zero_stage, "max_restarts": 100},
        "evaluate": {"metrics": []},
        "publish": {"catalog": str(folder / name)},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def start(job: Path) -> subprocess.Popen[bytes]:
    """The command, with a Ray of its own."""
    program = Path(sys.executable).parent / "raytune-ft"
    with (job.parent / "said.txt").open("a") as said:
        return subprocess.Popen(
            [program, "train", str(job), "--json", "--output", str(job.parent / "out")],
            stdout=said,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for the end; raises with what the command said where it failed."""
    if process.wait(timeout=1200) != 0:
        raise RuntimeError((folder / "said.txt").read_text())


def kill(process: subprocess.Popen[bytes], victim: str, draw: random.Random) -> bool:
    """SIGKILL to a worker, to the driver, or to it and all that it started; False: nobody was there."""
    tree = psutil.Process(process.pid).children(recursive=True)
    if victim == "a worker":
        workers = [each for each in tree if _is_worker(each)]
        chosen = [draw.choice(workers)] if workers else []
    else:
        own = psutil.Process(process.pid)
        chosen = [own] if victim == "the driver" else [own, *tree]
    for each in chosen:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    if victim != "a worker":
        process.wait()
    return bool(chosen)


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "RayTrainWorker" in process.name() or process.name().startswith("ray::RayTrainWor")
    return False


def disturb(job: Path, kills: int, seed: int, usual_s: float) -> Iterator[Kill]:
    """Run a job to its end, and kill it on the way, again and again."""
    draw = random.Random(seed)
    process = start(job)
    began = time.monotonic()
    left = kills
    while left:
        victim = draw.choice(VICTIMS)
        until = time.monotonic() + draw.uniform(0.1, 0.9) * usual_s
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        if kill(process, victim, draw):
            left -= 1
            yield Kill(victim, time.monotonic() - began)
        if process.poll() is not None:
            process, began = start(job), time.monotonic()
    finish(process, job.parent)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The one version that was published."""
    record = Catalog.at(str(folder / name)).pull("killed", folder / f"{name}-pulled")
    if record.version != 1:
        raise RuntimeError(f"published {record.version} times")
    files = sorted((folder / f"{name}-pulled").glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def differing_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """Bits in which equally named tensors differ."""
    if one.keys() != other.keys():
        raise RuntimeError(f"not the same tensors: {sorted(one.keys() ^ other.keys())}")
    pairs = ((one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
    return sum(int(bin(byte).count("1")) for a, b in pairs for byte in (a ^ b)[a != b].tolist())


def compare(folder: Path, *, zero_stage: int, workers: int, kills: int, seed: int) -> tuple[list[Kill], int]:
    """The kills that struck, and the bits in which the weights differ from those of the undisturbed run."""
    tiny.save_base(folder / "base")
    began = time.monotonic()
    finish(start(job_file(folder, "quiet", zero_stage=zero_stage, workers=workers)), folder)
    usual_s = time.monotonic() - began
    job = job_file(folder, "disturbed", zero_stage=zero_stage, workers=workers)
    struck = list(disturb(job, kills, seed, usual_s))
    return struck, differing_bits(weights(folder, "quiet"), weights(folder, "disturbed"))


def main() -> None:
    """Print the log as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        struck, bits = compare(
            Path(name), zero_stage=given.zero_stage, workers=given.workers, kills=given.kills, seed=given.seed
        )
    print("| kill | of | seconds after the command began |\n|---|---|---|")
    for number, each in enumerate(struck, 1):
        print(f"| {number} | {each.victim} | {each.after_s:.1f} |")
    print(f"\n{len(struck)} kills, {bits} differing bits, published once")


if __name__ == "__main__":
    main()
