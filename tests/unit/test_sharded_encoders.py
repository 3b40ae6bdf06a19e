"""T5 and BERT divided among two workers train what they train in one. Real processes over gloo."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from sharding import join, run_group
from torch import Tensor

from raytune_ft.data.pack import share
from raytune_ft.methods import METHODS
from raytune_ft.spec import ClusterSpec, FullSpec, LoraSpec, OptimizerSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Classes, Layout, Pairs, Step, Tokens
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.sharded import ShardedEngine, zero_config

CPU = torch.device("cpu")
STEPS = 4
RATE = 1e-3
OPTIMIZER = OptimizerSpec(learning_rate=RATE, epsilon=1e-4)
LORA = LoraSpec(rank=4, alpha=8, dropout=0.2)


class Case(NamedTuple):
    """What is trained, and how it is divided."""

    family: str
    stage: int
    method: LoraSpec | FullSpec = FullSpec()


CASES = {
    f"{family}-{kind}-{stage}": Case(family, stage, method)
    for family in ("t5", "bert")
    for kind, method in (("full", FullSpec()), ("lora", LORA))
    for stage in (1, 2, 3)
}
SAMPLE = "sample"
PARTS = {SAMPLE: ("t5-full-3", "bert-lora-2")}
PARTS["others"] = tuple(name for name in CASES if name not in PARTS[SAMPLE])
MODELS = {"t5": tiny.t5, "bert": tiny.bert}
LAYOUTS = {
    "t5": Layout(True, 64, 2, None, 96, Pairs(eos_id=1, start_id=2)),
    "bert": Layout(True, 64, 0, None, 96, Classes(3, lambda ids: int(ids[0]) % 3)),
}


def step_examples(step: int) -> list[Tokens]:
    """Every third step has one, so that a worker has none."""
    random = np.random.default_rng(step)
    lengths = random.integers(4, 40, 1 if step % 3 == 2 else 7)
    return [
        Tokens(random.integers(6, 60, n), np.arange(n) >= n - 3, number=at) for at, n in enumerate(lengths)
    ]


def run(engine: BankEngine | ShardedEngine, family: str, peers: Peers) -> list[StepReport]:
    reports: list[StepReport] = []

    def step(examples: list[Tokens]) -> Step:
        mine = share([len(example.input_ids) for example in examples], peers.count)[peers.rank]
        return Step(LAYOUTS[family].batches([examples[at] for at in mine]), len(examples), "", 1)

    steps = (step(step_examples(number)) for number in range(STEPS))
    fit(engine, steps, start=0, learning_rate=lambda _: RATE, report=reports.append, peers=peers)
    return reports


def divided(case: Case, peers: Peers) -> ShardedEngine:
    model = MODELS[case.family]().requires_grad_(False)
    parameters = METHODS[type(case.method)].add(model, case.method, 0)
    cluster = ClusterSpec.model_validate({"zero_stage": case.stage})
    config = zero_config(cluster, weight_bits=32, max_grad_norm=1.0, parameters=100_000, hidden=32)
    # All that is small in a tiny model would stay whole, and one bucket hold it.
    config["zero_optimization"] |= {"reduce_bucket_size": 5000}
    if case.stage == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 40, "sub_group_size": 8000}
    return ShardedEngine(model, parameters, OPTIMIZER, config, device=CPU, peers=peers)


def work(rank: int, world: int, folder: str) -> None:
    """One worker: trains the part that the folder is named for, and writes what it found."""
    join(rank, world, folder)
    from deepspeed.utils import safe_get_full_fp32_param

    peers = Peers.current()
    found: dict[str, tuple[list[float], dict[str, Tensor]]] = {}
    for name in PARTS[Path(folder).name]:
        case = CASES[name]
        engine = divided(case, peers)
        losses = [report.loss for report in run(engine, case.family, peers)]
        whole = {key: safe_get_full_fp32_param(p).clone() for key, p in engine.parameters.items()}
        found[name] = losses, whole
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


Found = Callable[[str], list[dict[str, Any]]]
"""What each of two workers found of a part."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Trains a part when the first test asks for it."""
    above = tmp_path_factory.mktemp("encoders")

    @cache
    def results(part: str) -> list[dict[str, Any]]:
        folder = above / part
        folder.mkdir()
        run_group(work, 2, folder)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]

    return results


@pytest.mark.parametrize(
    ("part", "name"),
    [
        pytest.param(part, name, marks=() if part == SAMPLE else pytest.mark.slow)
        for part, names in PARTS.items()
        for name in names
    ],
)
def test_it_trains_what_one_worker_trains(part: str, name: str, found: Found) -> None:
    case = CASES[name]
    model = MODELS[case.family]().requires_grad_(False)
    bank = BankEngine(Bank(model), METHODS[type(case.method)].add(model, case.method, 0), OPTIMIZER)
    expected = [report.loss for report in run(bank, case.family, Peers())]
    for losses, weights in (worker[name] for worker in found(part)):
        assert losses == pytest.approx(expected, abs=1e-5)
        for key, weight in bank.masters.items():
            torch.testing.assert_close(weights[key], weight.detach(), rtol=0, atol=1e-4)
