"""The same QLoRA job with TRL's SFTTrainer; runs in an environment of its own. Prints one line of JSON."""

import argparse
import json
import time
from typing import Any

started = time.perf_counter()

import torch  # noqa: E402  the clock starts before the imports, which are part of a job
from datasets import load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer  # noqa: E402


class StepClock(TrainerCallback):
    """Sums the time inside steps: the span over which the other side counts its tokens per second."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def main() -> None:
    """Train one epoch at batch 8 and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--to", required=True)
    arguments = parser.parse_args()
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = f"{arguments.folder}/base"
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantisation, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = load_dataset("json", data_files=f"{arguments.folder}/data.jsonl", split="train")
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=arguments.to,
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            max_length=512,
            packing=arguments.packing,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    for module in trainer.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # An evaluation would otherwise repack the weights for good, and the gradients would be lost.
            module.support_avx512bf16_for_cpu = False
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    clock = StepClock()
    trainer.add_callback(clock)
    result = trainer.train()
    trainer.save_model(arguments.to)
    print(
        json.dumps(
            {
                "tokens": tokens,
                "train_seconds": clock.seconds,
                "tokens_per_second": tokens / clock.seconds,
                "loss": result.training_loss,
                "steps": result.global_step,
                "seconds": time.perf_counter() - started,
            }
        )
    )


if __name__ == "__main__":
    main()
