"""A full fine-tune as a bare DeepSpeed script, on batches that were laid out before; one process of several.

torchrun starts it. The first process prints one line of JSON: seconds and loss of each step; all say on
standard error when a step has ended.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig


class LearnedLoss(nn.Module):
    """Sum of the cross-entropies of the learned tokens: logits exist for no others, here as there."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, predictor_N: Tensor, labels_N: Tensor
    ) -> Tensor:
        """The sum, in float32."""
        output = self.model.model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False)
        hidden_ND = output.last_hidden_state.flatten(0, 1).index_select(0, predictor_N)
        return F.cross_entropy(self.model.lm_head(hidden_ND), labels_N, reduction="sum")


def engine_of(base: str, stage: int, bucket_elements: int) -> Any:
    """DeepSpeed's engine around the base, with plain AdamW."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket_elements,
        "allgather_bucket_size": bucket_elements,
        "overlap_comm": False,
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    # transformers divides the weights while it loads them, for as long as this is held.
    held = HfDeepSpeedConfig(config) if stage == 3 else None
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    del held
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=LearnedLoss(model), optimizer=optimizer, config=config)
    return engine


def train(
    engine: Any, steps: list[dict[str, Any]], tensors: dict[str, Tensor], workers: int
) -> dict[str, Any]:
    """Take all steps; this process' seconds, and its part of the losses."""
    names = ("input_ids_BT", "position_ids_BT", "predictor_N", "labels_N")
    engine.train()
    seconds, losses, first_step_at = [], [], 0.0
    for number, step in enumerate(steps):
        began = time.perf_counter()
        for group in engine.optimizer.param_groups:
            group["lr"] = step["learning_rate"]
        loss_sum = engine(*(tensors[f"{number}.{name}"] for name in names))
        # DeepSpeed takes the mean over the processes, and the objective is the mean over all learned tokens.
        engine.backward(loss_sum * (workers / step["learned_tokens"]))
        engine.step()
        losses.append(loss_sum.item() / step["learned_tokens"])
        seconds.append(time.perf_counter() - began)
        print("step ended", file=sys.stderr, flush=True)
        first_step_at = first_step_at or time.time()
    return {
        "step_seconds": seconds,
        "losses": losses,
        "first_step_at": first_step_at,
        "tokens_per_step": statistics.mean(step["tokens"] for step in steps),
    }


def main() -> None:
    """Train on all batches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with the model in base and the passes in batches")
    parser.add_argument("--stage", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # It would compile a kernel for inference, which takes 40 s.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batches = arguments.folder / "batches"
    shared = json.loads((batches / "steps.json").read_text())
    engine = engine_of(str(arguments.folder / "base"), arguments.stage, shared["bucket_elements"])
    found = train(engine, shared["steps"], load_file(batches / f"rank-{rank}.safetensors"), workers)
    losses = torch.tensor(found["losses"], dtype=torch.float64)
    torch.distributed.all_reduce(losses)
    if rank == 0:
        print(json.dumps({**found, "losses": losses.tolist()}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
