"""What a pass of several jobs keeps for its backward pass, against what the plan of a lane says."""

from collections.abc import Sequence

import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedModel

from raytune_ft.planner import ModelFacts, lane_memory
from raytune_ft.spec import JobSpec, OptimizerSpec, parse_job
from raytune_ft.train.bank import Bank
from raytune_ft.train.batch import Tokens, assemble
from raytune_ft.train.engine import Block

DTYPES = {16: torch.bfloat16, 32: torch.float32}


def job(max_tokens: int, dropout: float, bits: int) -> JobSpec:
    return parse_job(
        {
            "name": "a",
            "model": {"path": "org/base", "weight_bits": bits},
            "data": {"sources": [{"uri": "s3://d/a.jsonl"}], "max_tokens": max_tokens},
            "method": {"rank": 4, "dropout": dropout},
            "publish": {"catalog": "s3://c"},
        }
    )


def kept_bytes(model: PreTrainedModel, jobs: Sequence[JobSpec]) -> int:
    """Of a pass with a full row of each job, in which two examples stand."""
    model.requires_grad_(False)
    bank = Bank(model, tokens_per_pass=1 << 20)
    blocks = []
    for seed, spec in enumerate(jobs):
        engine = bank.enter(spec.method, OptimizerSpec(), seed=seed)
        half = spec.data.max_tokens // 2
        example = Tokens(np.arange(half) % 300, np.arange(half) >= half // 2)
        batch = assemble([[example, example]], 2)
        blocks.append(Block(engine, batch, 0, forward=0, divisor=batch.learned_tokens, sources=1))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert all(isinstance(sums, list) for sums in bank.accumulate(blocks))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [(128,), (64, 64, 64, 64), (256, 32, 32)])
def test_a_pass_keeps_what_is_planned(lengths: tuple[int, ...], dropout: float, bits: int) -> None:
    model = tiny.llama(hidden=256, layers=4).to(DTYPES[bits])
    facts = ModelFacts.from_config(model.config.to_dict())
    jobs = [job(length, dropout, bits) for length in lengths]
    planned = lane_memory(facts, jobs, "packed").activations
    assert 0.6 * planned <= kept_bytes(model, jobs) <= planned
