"""The same full fine-tune with TRL's SFTTrainer, accelerate and DeepSpeed, on CPU; one process of several.

torchrun starts it, in an environment of its own. The first process prints one line of JSON.
"""

import argparse
import json
import os
import time
from typing import Any

# Before accelerate is imported, which reads them: what `accelerate launch --use_deepspeed` sets.
os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}

import deepspeed.ops
import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

_DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2, "overlap_comm": False},
    "zero_allow_untested_optimizer": True,
}


class StepClock(TrainerCallback):
    """The time inside each step, and when the first one ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.first_step_at = 0.0
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.first_step_at = self.first_step_at or time.time()


def trainer_of(folder: str, rows: int, row_tokens: int, *, packing: bool) -> SFTTrainer:
    """The trainer, with `rows` of at most `row_tokens` in each process' pass."""
    base = f"{folder}/base"
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=load_dataset("json", data_files=f"{folder}/data.jsonl", split="train"),
        args=SFTConfig(
            output_dir=f"{folder}/trl",
            deepspeed=_DEEPSPEED,
            accelerator_config={"use_configured_state": True},
            per_device_train_batch_size=rows,
            num_train_epochs=1,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            max_length=row_tokens,
            packing=packing,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            fp16=False,
            dataloader_pin_memory=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )


def main() -> None:
    """Train one epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, required=True, help="rows of each process in a step")
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--packing", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # DeepSpeed would compile a kernel for inference, which takes 40 s.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # On CPU accelerate knows of several processes only where it is told the backend.
    PartialState(backend="gloo")
    trainer = trainer_of(arguments.folder, arguments.rows, arguments.row_tokens, packing=arguments.packing)
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    clock = StepClock()
    trainer.add_callback(clock)
    result = trainer.train()
    processes, stage = trainer.accelerator.num_processes, trainer.model_wrapped.zero_optimization_stage()
    if (processes, stage) != (int(os.environ["WORLD_SIZE"]), _DEEPSPEED["zero_optimization"]["stage"]):
        raise SystemExit(f"accelerate trained with {processes} processes at stage {stage}")
    if trainer.accelerator.process_index == 0:
        found = {
            "tokens_per_step": tokens / result.global_step,
            "step_seconds": clock.seconds,
            "loss": result.training_loss,
            "first_step_at": clock.first_step_at,
        }
        print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
