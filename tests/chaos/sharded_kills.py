"""Kills full fine-tunes of two workers at random moments, and compares each with one that nobody disturbed.

As a script it does so for every ZeRO stage, and writes the log into docs/reliability.md:

    .venv/bin/python tests/chaos/sharded_kills.py --kills 30 --write docs/reliability.md
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import tiny  # noqa: E402  found on the path that is set above
from page import machine, markdown, write  # noqa: E402

from raytune_ft.catalog import Catalog  # noqa: E402

STEPS = 150
EVERY_STEPS = 5
WORKERS = 2
STAGES = (0, 1, 2, 3)
VICTIMS = ("a worker", "the driver", "the machine")
_TIMEOUT_S = 1200


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    zero_stage: int
    victim: str
    during: str
    """What the command last said that it was doing."""
    after_s: float
    """Since the command was started for the last time."""


@dataclass(frozen=True)
class Comparison:
    """What became of the runs of one stage that were killed."""

    kills: list[Kill]
    runs: int
    """Runs that were disturbed, each of which came to its end and published once."""
    differing_bits: int
    """In all of their weights together, from those of the run that nobody disturbed."""


def job_file(folder: Path, name: str, zero_stage: int) -> Path:
    """A job with a catalog of its own, `folder/name`."""
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
        "checkpoint": {"every_steps": EVERY_STEPS},
        "cluster": {"workers": WORKERS, "zero_stage": zero_stage, "max_restarts": 100},
        "evaluate": {"metrics": []},
        "publish": {"catalog": str(folder / name)},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def said_by(job: Path) -> Path:
    """Where the command's lines stand, those of earlier starts above."""
    return job.with_suffix(".said")


def start(job: Path) -> subprocess.Popen[bytes]:
    """The command, with a Ray of its own."""
    program = Path(sys.executable).parent / "raytune-ft"
    with said_by(job).open("a") as said:
        return subprocess.Popen(
            [program, "train", str(job), "--json", "--output", str(job.with_suffix(".out"))],
            stdout=said,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finish(process: subprocess.Popen[bytes], job: Path) -> None:
    """Wait for the end; raises with what the command said where it failed."""
    if process.wait(timeout=_TIMEOUT_S) != 0:
        raise RuntimeError(said_by(job).read_text())


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


def _doing(job: Path) -> str:
    """The phase that the command said last; Ray's messages between its lines are in colour."""
    lines = [line for line in said_by(job).read_text().splitlines() if "\033" not in line]
    return lines[-1].partition("  ")[0] if lines else "nothing yet"


def disturb(job: Path, zero_stage: int, kills: int, draw: random.Random, usual_s: float) -> Iterator[Kill]:
    """Run a job to its end, and kill it on the way, at most so many times."""
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
        struck = Kill(zero_stage, victim, _doing(job), time.monotonic() - began)
        if kill(process, victim, draw):
            left -= 1
            yield struck
        if process.poll() is not None:
            process, began = start(job), time.monotonic()
    finish(process, job)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Of the one version that was published."""
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


def compare(folder: Path, *, zero_stage: int, kills: int, seed: int) -> Comparison:
    """Train once undisturbed, then again and again with kills until so many have struck."""
    tiny.save_base(folder / "base")
    began = time.monotonic()
    quiet = job_file(folder, "quiet", zero_stage)
    finish(start(quiet), quiet)
    usual_s = time.monotonic() - began
    expected = weights(folder, "quiet")
    draw = random.Random(f"{seed} {zero_stage}")
    struck: list[Kill] = []
    runs = bits = 0
    while len(struck) < kills:
        runs += 1
        job = job_file(folder, f"disturbed-{runs}", zero_stage)
        struck += disturb(job, zero_stage, kills - len(struck), draw, usual_s)
        bits += differing_bits(weights(folder, job.stem), expected)
    return Comparison(struck, runs, bits)


def page_text(found: list[Comparison], seed: int) -> str:
    """The log as a table, and what came of it."""
    kills = [each for one in found for each in one.kills]
    rows = [
        [str(number), str(each.zero_stage), each.victim, each.during, f"{each.after_s:.1f}"]
        for number, each in enumerate(kills, 1)
    ]
    head = ["kill", "`zero_stage`", "of", "the command last said", "seconds after its start"]
    victims = ", ".join(f"{count} of {victim}" for victim, count in Counter(k.victim for k in kills).items())
    runs, bits = sum(one.runs for one in found), sum(one.differing_bits for one in found)
    outcome = (
        f"**{len(kills)} kills ({victims}) in {runs} runs, each of which came to its end and published once: "
        f"{bits} bits differ.** A run has {STEPS} steps on {WORKERS} workers, and keeps a checkpoint every "
        f"{EVERY_STEPS} steps."
    )
    on = machine(["ray", "torch", "deepspeed"], f"seed {seed}")
    return f"{outcome}\n\n{markdown(head, rows)}\n\n{on}"


def main() -> None:
    """Print the log, and write it into the page."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--kills", type=int, default=30, help="over all stages together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--write", type=Path, help="the page whose log to replace")
    options.add_argument("--results", type=Path, help="folder for the figures as JSON")
    given = options.parse_args()
    found = []
    for stage in STAGES:
        kills = given.kills // len(STAGES) + (stage < given.kills % len(STAGES))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            one = compare(Path(name), zero_stage=stage, kills=kills, seed=given.seed)
        print(f"stage {stage}: {len(one.kills)} kills, {one.differing_bits} bits differ", file=sys.stderr)
        found.append(one)
    raw = [asdict(one) for one in found]
    write("sharded_kills", page_text(found, given.seed), given.write, given.results, raw)


if __name__ == "__main__":
    main()
