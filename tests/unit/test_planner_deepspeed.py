"""The planner's bytes against those that DeepSpeed really holds. Two real processes over gloo."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from sharding import join, run_group

from raytune_ft.planner import ModelFacts, memory_plan
from raytune_ft.spec import JobSpec, parse_job
from raytune_ft.train.optimizers import make_optimizer
from raytune_ft.train.sharded import zero_config

WORKERS = 2
CASES = [
    (stage, offload, bits)
    for bits in (32, 16)
    for stage, offload in ((1, "none"), (2, "none"), (2, "optimizer"), (3, "none"))
]
MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
"""Where DeepSpeed's optimizers keep their float32 copies: stages 1 and 2, stage 1 in bfloat16, stage 3."""


def job(stage: int, offload: str, bits: int) -> JobSpec:
    return parse_job(
        {
            "name": "plan",
            "model": {"path": "org/base", "weight_bits": bits},
            "data": {"sources": [{"uri": "data.jsonl"}], "max_tokens": 16},
            "method": {"kind": "full"},
            "cluster": {"workers": WORKERS, "zero_stage": stage, "offload": offload},
            "publish": {"catalog": "catalog"},
        }
    )


def held_bytes(spec: JobSpec) -> tuple[dict[str, int], dict[str, Any]]:
    """What one worker holds of weights and optimizer after a step, and the config of the model."""
    import deepspeed

    model = tiny.llama(hidden=128, layers=4, vocabulary=2000)
    if spec.model.weight_bits == 16:
        model = model.to(torch.bfloat16)
    config = zero_config(
        spec.cluster,
        weight_bits=spec.model.weight_bits,
        max_grad_norm=1.0,
        parameters=sum(p.numel() for p in model.parameters()),
        hidden=128,
    )
    optimizer = make_optimizer(list(model.parameters()), spec.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids_BT = torch.arange(32).view(2, 16)
    engine.backward(engine(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)
    engine.step()
    sharded = engine.optimizer
    masters = next(getattr(sharded, name) for name in MASTERS if hasattr(sharded, name))
    moments = [v for state in sharded.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    held = {
        "weights": sum(getattr(p, "ds_tensor", p).nbytes for p in engine.module.parameters()),
        "optimizer": sum(tensor.nbytes for tensor in (*masters, *moments)),
    }
    return held, model.config.to_dict()


def work(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    found = {case: held_bytes(job(*case)) for case in CASES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("planned")
    run_group(work, WORKERS, folder)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(WORKERS)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_weights_and_optimizer(case: tuple[int, str, int], found: list[dict[Any, Any]]) -> None:
    for worker in found:
        held, config = worker[case]
        plan = memory_plan(
            ModelFacts.from_config(config), job(*case), resident="packed", tokens_per_forward=16
        )
        assert plan.weights == pytest.approx(held["weights"], rel=0.05)
        if case[1] == "optimizer":
            # Master copy and two moments, and beside them the float32 gradient that they take.
            assert (plan.optimizer, plan.gradients) == (0, 0)
            assert plan.host == pytest.approx(held["optimizer"] * 4 / 3, rel=0.05)
        else:
            assert plan.optimizer == pytest.approx(held["optimizer"], rel=0.05)
