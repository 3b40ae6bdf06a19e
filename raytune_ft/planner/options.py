"""The configurations that a job could have, and which of them fit a device."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from raytune_ft.errors import SpecError
from raytune_ft.planner.choice import Choice, choice_of, usable_bytes
from raytune_ft.planner.facts import ModelFacts
from raytune_ft.planner.memory import MemoryPlan, memory_plan
from raytune_ft.planner.sharding import Sharding
from raytune_ft.spec import JobSpec, parse_job

_MOST_WORKERS = 4096
_STAGES: tuple[tuple[Literal[0, 1, 2, 3], Literal["none", "optimizer", "parameters"]], ...] = (
    *((0, "none"), (1, "none"), (2, "none"), (3, "none")),
    *((2, "optimizer"), (3, "optimizer"), (3, "parameters")),
)
"""From the least to the most that a step communicates."""


@dataclass(frozen=True)
class Option:
    """The job with one way to divide it."""

    job: JobSpec
    tokens_given: int
    """Of a pass of the job's `batch.sequences_per_worker`, or of one row where that is `auto`."""
    given: MemoryPlan
    """With passes of `tokens_given`."""
    auto: Choice | None
    """What `auto` would become, and the bytes with it; None without a device."""
    fits: bool | None
    """Whether a pass of one row fits the device, so that the job can be trained; None without one."""

    @property
    def sharding(self) -> Sharding:
        """How it is divided."""
        return Sharding.of(self.job)


def options(job: JobSpec, facts: ModelFacts, device_bytes: int | None) -> list[Option]:
    """Every stage and offload that is allowed with the job, on its own workers.

    Args:
        job: the job.
        facts: of its model.
        device_bytes: memory of a worker's device; None where it is not known.
    """
    return [
        option_of(candidate, facts, device_bytes) for candidate in _divided(job, job.cluster.least_workers)
    ]


def option_of(job: JobSpec, facts: ModelFacts, device_bytes: int | None) -> Option:
    """The job as it is written."""
    auto = None if device_bytes is None else choice_of(job, facts, device_bytes)
    resident = auto.resident if auto else _resident(job)
    per_worker = job.batch.sequences_per_worker
    tokens = job.data.max_tokens * (1 if per_worker == "auto" else per_worker)
    given = memory_plan(facts, job, resident=resident, tokens_per_forward=tokens)
    row = memory_plan(facts, job, resident=resident, tokens_per_forward=job.data.max_tokens)
    fits = None if device_bytes is None else row.total <= usable_bytes(device_bytes)
    return Option(job, tokens, given, auto, fits)


def alternatives(job: JobSpec, facts: ModelFacts, device_bytes: int) -> list[Option]:
    """Configurations near the job that fit a device, the nearest first.

    The lowest stage that fits on the job's own workers. Where none does: what waits in the host's memory,
    which is for the user to have, and beside it the fewest workers that need no such memory. Empty where
    nothing fits: then the model, the method or the rows are too large.
    """
    own = [option for option in options(job, facts, device_bytes) if option.fits]
    if own and own[0].sharding.offload == "none":
        return own[:1]
    counts = _counts_above(job)
    first = bisect_left(
        counts, True, key=lambda workers: _without_host(job, facts, device_bytes, workers) is not None
    )
    found = _without_host(job, facts, device_bytes, counts[first]) if first < len(counts) else None
    return [*own[:1], *([found] if found else [])]


def _counts_above(job: JobSpec) -> list[int]:
    """Numbers of workers above the job's own that its batch can be divided among."""
    sequences, per_worker = job.batch.sequences, job.batch.sequences_per_worker
    return [
        workers
        for workers in range(job.cluster.least_workers + 1, min(_MOST_WORKERS, sequences) + 1)
        if per_worker == "auto" or sequences % (per_worker * workers) == 0
    ]


def _without_host(job: JobSpec, facts: ModelFacts, device_bytes: int, workers: int) -> Option | None:
    """The lowest stage by which the job fits on so many workers; with more of them, each holds no more."""
    divided = (option_of(candidate, facts, device_bytes) for candidate in _divided(job, workers))
    return next((option for option in divided if option.fits and option.sharding.offload == "none"), None)


def _divided(job: JobSpec, workers: int) -> Iterator[JobSpec]:
    """The job on so many workers, divided in every way that its sections allow."""
    values = job.resolved()
    same = workers == job.cluster.least_workers
    for stage, offload in _STAGES:
        counts = {} if same else {"workers": workers, "elastic": None}
        values["cluster"] = {**job.resolved()["cluster"], **counts, "zero_stage": stage, "offload": offload}
        try:
            yield parse_job(values)
        except SpecError:
            continue


def _resident(job: JobSpec) -> str:
    return "dequantised" if job.model.resident == "dequantised" and job.model.weight_bits == 4 else "packed"
