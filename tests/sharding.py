"""DeepSpeed engines of tiny models, in groups of real processes over gloo."""

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_ft.methods import METHODS
from raytune_ft.spec import FullSpec, LoraSpec
from raytune_ft.train.sharded import join_group

Names = dict[str, nn.Parameter]
METHOD_SPECS = {"full": FullSpec(), "lora": LoraSpec(rank=3, alpha=8)}


def run_group(work: Callable[[int, int, str], None], world: int, folder: Path) -> None:
    """Run `work(rank, world, folder)` in `world` processes."""
    # They start from a process that has imported what takes long.
    multiprocessing.set_forkserver_preload(
        ["deepspeed", "torch._inductor.compile_fx", "transformers.models.llama.modeling_llama"]
    )
    mp.start_processes(work, args=(world, str(folder)), nprocs=world, start_method="forkserver")


def join(rank: int, world: int, folder: str) -> None:
    """Make this process one of its group."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    # DeepSpeed collects garbage often, and all that was imported would be looked at each time.
    gc.freeze()
    dist.init_process_group("gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world)
    join_group(torch.device("cpu"))


def _config(stage: int, dtype: str, *, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": 5000,
        # Norms stay whole on all ranks, matrices do not.
        "stage3_param_persistence_threshold": 30,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_max_live_parameters": 10000,
        "sub_group_size": 4000,
    }
    if offload and stage >= 2:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **(bf16 if dtype == "bf16" else {}),
    }


def new_engine(
    stage: int,
    dtype: str = "fp32",
    *,
    method: str = "full",
    offload: bool = False,
    model: PreTrainedModel | None = None,
) -> tuple[Any, Names]:
    """An engine of odd sizes, and what it trains."""
    import deepspeed

    model = model or tiny.llama(hidden=24, vocabulary=97)
    model.requires_grad_(False)
    spec = METHOD_SPECS[method]
    names = METHODS[type(spec)].add(model, spec, 0)
    groups = [
        {"params": [p for p in names.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in names.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2, fused=True)
    config = _config(stage, dtype, offload=offload)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, names


def train(engine: Any, steps: Iterable[int]) -> None:
    """Steps of this rank's own tokens."""
    for step in steps:
        draw = torch.Generator().manual_seed(100 * step + dist.get_rank())
        tokens = torch.randint(3, 97, (1, 12), generator=draw)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()


def computed(names: Names) -> dict[str, Tensor]:
    """The weights that the model computes with."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(names.values())):
        return {name: parameter.detach().clone() for name, parameter in names.items()}


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the expected tensors that are not there bit for bit."""
    return [name for name in expected if not torch.equal(found[name], expected[name])]
