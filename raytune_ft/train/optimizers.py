"""The optimizers of a job file."""

from typing import Any

import torch
from torch import nn

from raytune_ft.quantise import import_bitsandbytes, whole_shape
from raytune_ft.spec import OptimizerSpec


def make_optimizer(
    parameters: list[nn.Parameter], spec: OptimizerSpec, *, paged: bool = True
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or its 8-bit and paged kinds (Dettmers et al. 2022, 2023).

    Weight decay acts on matrices only: pulling norms and biases to zero has no regularising meaning.

    Args:
        parameters: what it trains.
        spec: of the job.
        paged: page the state on a GPU, where the job asks for it. bitsandbytes never frees what it pages.
    """
    groups = [
        {"params": [p for p in parameters if len(whole_shape(p)) >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if len(whole_shape(p)) < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.epsilon}
    if spec.kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    bnb = import_bitsandbytes()
    # Paging moves state between a GPU's memory and the host's; on CPU there is one memory.
    paged = paged and spec.kind.startswith("paged") and parameters[0].device.type == "cuda"
    if spec.kind == "paged_adamw_32bit":
        kind = bnb.optim.PagedAdamW32bit if paged else bnb.optim.AdamW32bit
    else:
        kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    return optimizer
