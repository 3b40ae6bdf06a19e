"""Bytes of a lane: one resident base, and the jobs that are trained on it together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raytune_ft.planner.choice import usable_bytes
from raytune_ft.planner.facts import ModelFacts
from raytune_ft.planner.memory import MemoryPlan, logits_bytes, memory_plan, weight_bytes
from raytune_ft.planner.refusal import choose
from raytune_ft.spec import JobSpec

Resident = Literal["packed", "dequantised"]


@dataclass(frozen=True)
class Lane:
    """How many jobs share a base on a device, and how the base is held."""

    resident: Resident
    slots: int
    memory: MemoryPlan
    """With those jobs that need most: whichever meet on the lane fit as well."""
    row_tokens: tuple[int, ...]
    """See the function: of as many jobs as there are slots, the most first. A pass holds no more."""


def row_tokens(job: JobSpec) -> int:
    """What the least block of a job may hold, in tokens: a row, or as many rows as it asks for."""
    asked = job.batch.sequences_per_worker
    rows = 1 if asked == "auto" else min(asked, job.batch.sequences)
    return rows * job.data.max_tokens


def lane_memory(facts: ModelFacts, jobs: Sequence[JobSpec], resident: str) -> MemoryPlan:
    """Predict the peak of a lane while it trains jobs of one base, in passes with the least block of each.

    The weights of the base stand there once. Each job adds its adapter, its gradients, its optimizer's state
    and the activations of its least block; see `row_tokens`.

    Args:
        facts: of the base.
        jobs: at least one; their `model` sections are equal.
        resident: how a 4-bit base is held: `packed` or `dequantised`.
    """
    base_bytes = weight_bytes(facts, jobs[0].model, resident)
    alone = [memory_plan(facts, job, resident=resident, tokens_per_forward=row_tokens(job)) for job in jobs]
    return MemoryPlan(
        weights=base_bytes + sum(plan.weights - base_bytes for plan in alone),
        gradients=sum(plan.gradients for plan in alone),
        optimizer=sum(plan.optimizer for plan in alone),
        activations=sum(plan.activations for plan in alone),
        logits=logits_bytes(facts, sum(map(row_tokens, jobs))),
        workspace=max(plan.workspace for plan in alone),
    )


def choose_lane(
    facts: ModelFacts, jobs: Sequence[JobSpec], device_bytes: int | None, most_slots: int
) -> Lane:
    """As many slots as a device holds, up to `most_slots`; a 4-bit base dequantised where that costs none.

    A dequantised base is only faster, so it may fill half of the usable memory, as for a single job.

    Args:
        facts: of the base.
        jobs: all jobs of it; any `slots` of them may meet on the lane.
        device_bytes: memory of the lane's device; None: not known, so nothing limits the slots.
        most_slots: at least 1.

    Raises:
        ModelError: the device does not hold one of the jobs by itself. Names what it would hold.
    """
    most = min(most_slots, len(jobs))
    model = jobs[0].model
    asked: Resident = "dequantised" if model.resident == "dequantised" else "packed"
    if device_bytes is None:
        return Lane(asked, most, _worst(facts, jobs, asked, most), _most_tokens(jobs, most))
    usable = usable_bytes(device_bytes)
    slots = _fitting(facts, jobs, asked, most, usable)
    if not slots:
        for job in jobs:
            choose(job, facts, device_bytes)
        slots = 1
    free = model.resident == "auto" and model.weight_bits == 4
    if free and _fitting(facts, jobs, "dequantised", most, usable // 2) == slots:
        asked = "dequantised"
    return Lane(asked, slots, _worst(facts, jobs, asked, slots), _most_tokens(jobs, slots))


def _worst(facts: ModelFacts, jobs: Sequence[JobSpec], resident: str, slots: int) -> MemoryPlan:
    """At least what any `slots` of the jobs need together.

    The largest states need not be those of the jobs with the longest rows, nor these those that keep most
    for each token.
    """
    alone = {id(job): lane_memory(facts, [job], resident) for job in jobs}

    def state_bytes(job: JobSpec) -> int:
        plan = alone[id(job)]
        return plan.weights + plan.gradients + plan.optimizer

    plan = lane_memory(facts, sorted(jobs, key=state_bytes, reverse=True)[:slots], resident)
    tokens = sum(_most_tokens(jobs, slots))
    token_bytes = max(alone[id(job)].activations // row_tokens(job) for job in jobs)
    return replace(plan, activations=token_bytes * tokens, logits=logits_bytes(facts, tokens))


def _most_tokens(jobs: Sequence[JobSpec], slots: int) -> tuple[int, ...]:
    return tuple(sorted(map(row_tokens, jobs), reverse=True)[:slots])


def _fitting(facts: ModelFacts, jobs: Sequence[JobSpec], resident: str, most: int, limit_bytes: int) -> int:
    """The most slots up to `most` that fit; each more needs more."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if _worst(facts, jobs, resident, middle).total <= limit_bytes:
            low = middle
        else:
            high = middle - 1
    return low
