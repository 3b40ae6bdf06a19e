"""What is refused before anything is loaded, and what would do instead."""

from raytune_ft.errors import ModelError
from raytune_ft.planner.choice import Choice, choice_of, usable_bytes
from raytune_ft.planner.facts import ModelFacts
from raytune_ft.planner.memory import MemoryPlan, memory_plan, optimizer_bytes
from raytune_ft.planner.options import Option, alternatives
from raytune_ft.planner.sharding import Sharding
from raytune_ft.spec import FullSpec, JobSpec, OptimizerSpec

_SMALLEST_OPTIMIZER = OptimizerSpec(kind="adamw_8bit")


def check_max_tokens(job: JobSpec, facts: ModelFacts) -> None:
    """Refuse rows that are longer than the model's positions.

    Raises:
        ModelError: names both figures.
    """
    if facts.max_positions is not None and job.data.max_tokens > facts.max_positions:
        raise ModelError(
            f"data.max_tokens = {job.data.max_tokens} is above the {facts.max_positions} positions of "
            f"{job.model.path}; set data.max_tokens: {facts.max_positions} or less"
        )


def choose(job: JobSpec, facts: ModelFacts, device_bytes: int) -> Choice:
    """Decide what the job file leaves to `auto`, for a device of `device_bytes` in each worker.

    Raises:
        ModelError: not even one row fits the device. Names the nearest configuration that does.
    """
    choice = choice_of(job, facts, device_bytes)
    row = memory_plan(facts, job, resident=choice.resident, tokens_per_forward=job.data.max_tokens)
    if row.total <= usable_bytes(device_bytes):
        return choice
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in row.terms.items() if size)
    others = [settings(job, option) for option in alternatives(job, facts, device_bytes)]
    raise ModelError(
        f"{job.model.path} needs {row.total / 2**30:.2f} GiB to train on one row of {job.data.max_tokens} "
        f"tokens (GiB: {listed}), and the device can give {usable_bytes(device_bytes) / 2**30:.2f}; "
        f"use {' or '.join(others) if others else _remedy(job, row, choice.resident)}"
    )


def settings(job: JobSpec, option: Option) -> str:
    """What a job file has to say to become that option, and what it then needs beside the device."""
    new, old = option.sharding, Sharding.of(job)
    changed = {
        "workers": new.workers if new.workers != old.workers else None,
        "zero_stage": new.stage if new.stage != old.stage else None,
        "offload": new.offload if new.offload != old.offload else None,
    }
    said = ", ".join(f"cluster.{name}: {value}" for name, value in changed.items() if value is not None)
    host = f" ({option.given.host / 2**30:.2f} GiB of the host's memory for each worker)"
    return said + (host if option.given.host else "")


def _remedy(job: JobSpec, plan: MemoryPlan, resident: str) -> str:
    """What makes the largest term smaller, and is not done yet."""
    full = isinstance(job.method, FullSpec)
    match max(plan.terms, key=lambda name: plan.terms[name]):
        case "weights" if resident == "dequantised":
            return "model.resident: packed"
        case "weights" if not full and job.model.weight_bits != 4:
            return "model.weight_bits: 4"
        case "optimizer" if not job.cluster.zero_stage and optimizer_bytes(
            1, job.optimizer
        ) > optimizer_bytes(1, _SMALLEST_OPTIMIZER):
            return "optimizer.kind: adamw_8bit"
        case "weights" | "gradients" | "optimizer" | "workspace":
            return "method.kind: lora" if full else "a larger device, or a smaller base"
        case "activations" if not job.model.gradient_checkpointing:
            return "model.gradient_checkpointing: true, or a smaller data.max_tokens"
    return "a smaller data.max_tokens"
