"""Several workers compute what one computes. Real processes over gloo, on a tiny real model."""

import math
import os
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import PreTrainedModel

from raytune_ft.data.pack import share
from raytune_ft.errors import Diverged
from raytune_ft.methods import METHODS
from raytune_ft.spec import FullSpec, LoraSpec, OptimizerSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Layout, Step, Tokens
from raytune_ft.train.loop import StepReport, fit
from raytune_ft.train.peers import Peers

METHOD_SPECS = {
    "lora": LoraSpec(rank=4, alpha=8),
    "dropout": LoraSpec(rank=4, alpha=8, dropout=0.2),
    "full": FullSpec(),
}
STEPS = 10
WORLDS = (3, 2)
LARGE = 20 << 20
"""Elements: more than a bucket of gradients holds."""


def step_examples(step: int) -> list[Tokens]:
    """Uneven examples of two sources; the last step has one, so that all workers but one have none."""
    random = np.random.default_rng(step)
    lengths = random.integers(4, 40, 1 if step == STEPS - 1 else 7)
    return [
        Tokens(random.integers(6, 320, n), np.arange(n) >= n // 2, at % 2, at) for at, n in enumerate(lengths)
    ]


def own_step(examples: list[Tokens], peers: Peers) -> Step:
    layout = Layout(True, 64, 2, None, 96)
    mine = share([len(example.input_ids) for example in examples], peers.count)[peers.rank]
    return Step(layout.batches([examples[at] for at in mine]), len(examples), "", sources=2)


def new_engine(model: PreTrainedModel, method: LoraSpec | FullSpec, peers: Peers) -> BankEngine:
    torch.set_num_threads(1)
    model.requires_grad_(False)
    # Adam divides by the gradient's own size, so a small epsilon would blow up the rounding of tiny ones.
    optimizer = OptimizerSpec(learning_rate=1e-3, epsilon=1e-4, max_grad_norm=1.0)
    return BankEngine(Bank(model), METHODS[type(method)].add(model, method, 0), optimizer, peers=peers)


def train(name: str, peers: Peers) -> dict[str, Any]:
    bank = new_engine(tiny.llama(), METHOD_SPECS[name], peers)
    reports: list[StepReport] = []
    steps = (own_step(step_examples(step), peers) for step in range(STEPS))
    fit(bank, steps, start=0, learning_rate=lambda _: 1e-3, report=reports.append, peers=peers)
    weights = {name: parameter.detach() for name, parameter in bank.parameters.items()}
    return {"reports": reports, "weights": weights}


def diverge(peers: Peers) -> tuple[str, bool]:
    """What is raised when one worker alone meets a loss that is not finite, and whether the weights stand."""
    model = tiny.gpt2()
    model.transformer.wpe.weight.data[60] = math.nan
    bank = new_engine(model, METHOD_SPECS["lora"], peers)
    longest = Tokens(np.arange(3, 67), np.ones(64, dtype=np.bool_))
    steps = [step_examples(0), [*step_examples(1), longest]]
    kept: dict[str, torch.Tensor] = {}

    def report(_: StepReport) -> None:
        kept.update({name: p.detach().clone() for name, p in bank.parameters.items()})

    try:
        fit(
            bank,
            [own_step(examples, peers) for examples in steps],
            start=0,
            learning_rate=lambda _: 1e-3,
            report=report,
            peers=peers,
        )
    except Diverged as error:
        return str(error), all(torch.equal(p, kept[name]) for name, p in bank.parameters.items())
    return "", False


def some_gradients(peers: Peers) -> list[Any]:
    """Gradients summed up: on all workers, on one, on none, and of a parameter larger than a bucket."""
    small, lone, unused, large = (nn.Parameter(torch.zeros(size)) for size in (3, 2, 4, LARGE))
    small.grad = torch.full_like(small, peers.rank + 1.0)
    if peers.rank == peers.count - 1:
        lone.grad = torch.tensor([1.0, -1.0])
    large.grad = torch.full_like(large, 0.5)
    peers.sum_gradients([small, lone, unused, large])
    assert lone.grad is not None
    return [small.grad.tolist(), lone.grad.tolist(), unused.grad, large.grad.unique().tolist()]


def work(rank: int, folder: str) -> None:
    """One worker: joins a group of each size that it is part of, and writes what it found."""
    for count in WORLDS:
        if rank >= count:
            return
        address = f"file://{folder}/group{count}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
        peers = Peers.current()
        found: dict[str, Any] = {name: train(name, peers) for name in METHOD_SPECS}
        found["peers"] = (peers.rank, peers.count)
        found["sum"] = peers.sum([2.0**53 - 3, rank, 0.1])
        found["gradients"] = some_gradients(peers)
        found["diverged"] = diverge(peers)
        if count == WORLDS[-1]:
            found["lost"] = lose_one(peers)
        torch.save(found, f"{folder}/{count}-{rank}.pt")
        dist.destroy_process_group()


def lose_one(peers: Peers) -> bool:
    """Whether a worker hears of the end of another while it waits for it."""
    peers.sum([0.0])
    if peers.rank:
        os._exit(0)
    try:
        peers.sum([0.0])
    except RuntimeError:
        return True
    return False


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("peers")
    # The process that was asked to vanish has no result of its own.
    mp.spawn(work, args=(str(folder),), nprocs=max(WORLDS))
    return {
        tuple(int(part) for part in path.stem.split("-")): torch.load(path, weights_only=False)
        for path in sorted(folder.glob("*.pt"))
    }


@pytest.mark.parametrize("name", sorted(METHOD_SPECS))
@pytest.mark.parametrize("workers", sorted(WORLDS))
def test_several_workers_train_as_one(
    name: str, workers: int, found: dict[tuple[int, int], dict[str, Any]]
) -> None:
    alone = train(name, Peers())
    ours = found[workers, 0][name]
    for one, several in zip(alone["reports"], ours["reports"], strict=True):
        assert several.loss == pytest.approx(one.loss, abs=1e-6)
        assert several.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
        assert several.source_loss_sums == pytest.approx(one.source_loss_sums, rel=1e-6, abs=1e-6)
        same = ("step", "examples", "tokens", "learned_tokens", "source_learned_tokens")
        assert [getattr(several, field) for field in same] == [getattr(one, field) for field in same]
    for key, weight in alone["weights"].items():
        torch.testing.assert_close(ours["weights"][key], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(METHOD_SPECS))
def test_all_workers_hold_the_same_bits(name: str, found: dict[tuple[int, int], dict[str, Any]]) -> None:
    first = found[3, 0][name]
    for rank in (1, 2):
        other = found[3, rank][name]
        assert all(torch.equal(p, other["weights"][key]) for key, p in first["weights"].items())
        assert [r.loss for r in other["reports"]] == [r.loss for r in first["reports"]]
        assert [r.grad_norm for r in other["reports"]] == [r.grad_norm for r in first["reports"]]


def test_every_worker_gets_the_sums(found: dict[tuple[int, int], dict[str, Any]]) -> None:
    for rank in range(3):
        seen = found[3, rank]
        assert seen["peers"] == (rank, 3)
        assert seen["sum"] == [3 * (2.0**53 - 3), 3.0, pytest.approx(0.3)]
        assert seen["gradients"] == [[6.0] * 3, [1.0, -1.0], None, [1.5]]


def test_a_loss_that_is_not_finite_stops_all_workers_at_the_same_step(
    found: dict[tuple[int, int], dict[str, Any]],
) -> None:
    stops = {found[3, rank]["diverged"] for rank in range(3)}
    ((message, weights_stand),) = stops
    assert message.startswith("step 2: the loss is nan at learning rate 0.001")
    assert weights_stand


def test_a_worker_that_waits_for_a_lost_one_hears_of_it(
    found: dict[tuple[int, int], dict[str, Any]],
) -> None:
    assert found[2, 0]["lost"]


def test_a_single_worker_is_by_itself() -> None:
    alone = Peers.current()
    assert (alone.rank, alone.count) == (0, 1)
    assert alone.sum([0.1, 2]) == [0.1, 2]
    parameter = nn.Parameter(torch.zeros(2))
    alone.sum_gradients([parameter])
    assert parameter.grad is None
