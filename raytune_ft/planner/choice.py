"""What `auto` becomes on a device."""

from dataclasses import dataclass
from typing import Literal

from raytune_ft.planner.facts import ModelFacts
from raytune_ft.planner.memory import MemoryPlan, memory_plan
from raytune_ft.spec import JobSpec

_USABLE = 0.85
"""Share of a device's memory that a plan may fill; the rest is for the runtime and fragmentation."""


@dataclass(frozen=True)
class Choice:
    """What `auto` became. Kept with the run, so that a resumed run computes in the same order."""

    resident: Literal["packed", "dequantised"]
    tokens_per_forward: int
    memory: MemoryPlan


def usable_bytes(device_bytes: int) -> int:
    """What a plan may fill of a device."""
    return int(device_bytes * _USABLE)


def choice_of(job: JobSpec, facts: ModelFacts, device_bytes: int) -> Choice:
    """How much of a step a forward pass should take on a device: one row at least, whether it fits or not.

    Passes grow while they leave half of the usable memory: larger ones gain little.
    """
    rows = job.data.max_tokens
    limit = -(-job.batch.sequences // job.cluster.least_workers) * rows
    usable = usable_bytes(device_bytes)
    resident: Literal["packed", "dequantised"] = "packed"
    if job.model.weight_bits == 4:
        # A dequantised base is only faster; half of the memory stays for what else the step needs.
        dequantised = memory_plan(facts, job, resident="dequantised", tokens_per_forward=rows)
        affordable = job.model.resident == "auto" and dequantised.total <= usable // 2
        resident = "dequantised" if affordable or job.model.resident == "dequantised" else "packed"

    def plan(tokens: int) -> MemoryPlan:
        return memory_plan(facts, job, resident=resident, tokens_per_forward=tokens)

    tokens = rows
    while tokens < limit and plan(min(2 * tokens, limit)).total <= usable // 2:
        tokens = min(2 * tokens, limit)
    return Choice(resident, tokens, plan(tokens))
