"""Losses of 20 steps of each method, written to the files beside this one: `make golden` rewrites them.

A change of these numbers is a change of every adapter that is trained from now on; its diff is reviewed.

ZeRO stages have no files of their own, which could drift apart. tests/unit/test_sharded.py trains stages 1
to 3 on two workers and holds each of them to `full-fp32.txt`, which is stage 0 on one.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from raytune_ft.data.pack import share
from raytune_ft.methods import METHODS
from raytune_ft.models import load_base
from raytune_ft.spec import FullSpec, LoraSpec, ModelSpec, OptimizerSpec, ScheduleSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Layout, Step, Tokens
from raytune_ft.train.engine import Engine
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.schedule import learning_rate

STEPS = 20
CASES = {
    "lora-fp32": (32, LoraSpec(rank=8, alpha=16), OptimizerSpec(learning_rate=5e-3)),
    "lora-dropout-fp32": (32, LoraSpec(rank=8, alpha=16, dropout=0.1), OptimizerSpec(learning_rate=5e-3)),
    "lora-nf4": (4, LoraSpec(rank=8, alpha=16), OptimizerSpec(learning_rate=5e-3)),
    "lora-nf4-adamw8bit": (4, LoraSpec(rank=64), OptimizerSpec(kind="adamw_8bit", learning_rate=5e-3)),
    "full-fp32": (32, FullSpec(), OptimizerSpec(learning_rate=1e-3)),
    "full-bf16": (16, FullSpec(), OptimizerSpec(learning_rate=1e-3)),
}


def losses(name: str, base: Path) -> list[float]:
    """Losses of the steps of one case."""
    bits, method, optimizer = CASES[name]
    torch.set_num_threads(1)
    model = load_base(
        ModelSpec.model_validate({"path": str(base), "weight_bits": bits}), device=torch.device("cpu")
    )
    engine = BankEngine(Bank(model), METHODS[type(method)].add(model, method, 0), optimizer)
    return train(engine, optimizer.learning_rate)


def train(engine: Engine, rate: float, peers: Peers = Peers()) -> list[float]:
    """Losses of the steps of an engine, of which these `peers` have a share each."""
    layout = Layout(
        packing=True, max_tokens=64, pad_token_id=2, sequences_per_forward=None, tokens_per_forward=128
    )
    random = np.random.default_rng(0)
    examples = [
        Tokens(random.integers(3, 320, n), np.arange(n) >= n // 2, number=at)
        for at, n in enumerate(random.integers(5, 40, 8))
    ]
    mine = share([len(example.input_ids) for example in examples], peers.count)[peers.rank]
    own = [examples[at] for at in mine]
    reports: list[StepReport] = []
    fit(
        engine,
        (Step(layout.batches(own), len(examples), "", 1) for _ in range(STEPS)),
        start=0,
        learning_rate=lambda step: learning_rate(step, STEPS, ScheduleSpec(warmup=0.1), rate),
        report=reports.append,
        peers=peers,
    )
    return [report.loss for report in reports]


def read(name: str) -> list[float]:
    """The kept losses of one case."""
    return [float(line) for line in (Path(__file__).parent / f"{name}.txt").read_text().split()]


def main() -> None:
    """Print all losses, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        base = tiny.save_base(Path(folder) / "base")
        for name in CASES:
            text = "".join(f"{loss:.6f}\n" for loss in losses(name, base))
            if write:
                (Path(__file__).parent / f"{name}.txt").write_text(text)
            print(name, text.split()[0], text.split()[-1])


if __name__ == "__main__":
    main()
