"""Which jobs share a base, which of them a batch, how many at a time, and which come first."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raytune_ft.errors import ModelError
from raytune_ft.fleet.entry import QueuedJob
from raytune_ft.fleet.work import LaneSpeed, Work, speed_of
from raytune_ft.planner import Lane, ModelFacts, choose_lane, usable_bytes
from raytune_ft.spec import JobSpec


@dataclass(frozen=True)
class Placed:
    """A job, and when it comes."""

    spec: JobSpec
    work: Work
    queued: QueuedJob


@dataclass(frozen=True)
class Group:
    """The jobs of one base."""

    base: str
    jobs: tuple[Placed, ...]
    """The longest first."""
    facts: ModelFacts
    speed: LaneSpeed
    lane: Lane

    @property
    def tokens(self) -> int:
        """Of all jobs."""
        return sum(job.work.tokens for job in self.jobs)


def base_of(job: JobSpec) -> str:
    """Names what a lane must hold for a job: the base, how it is held, and where.

    >>> from raytune_ft.spec import parse_job
    >>> values = {"name": "a", "model": {"path": "org/base"}, "data": {"sources": [{"uri": "a.jsonl"}]},
    ...           "publish": {"catalog": "c"}}
    >>> wide = {**values, "name": "b", "method": {"rank": 64}}
    >>> base_of(parse_job(values)) == base_of(parse_job(wide))
    True
    """
    held = {**job.model.model_dump(mode="json"), "device": job.cluster.device}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]


def shares_batch(job: JobSpec) -> bool:
    """Whether others may be on the lane with a job. A classifier trains a part of the base: its head."""
    return job.method.shares_batch and not job.model.labels


def place(
    jobs: Sequence[tuple[JobSpec, Work]],
    facts: Mapping[str, ModelFacts],
    *,
    device_bytes: int | None,
    slots: int | Literal["auto"],
    flops_per_s: float,
) -> tuple[Group, ...]:
    """Group jobs by base, and give each group the slots that its lanes have.

    A lane's slots hold any jobs of the group at the same time, the largest as well. `auto` adds slots until
    the memory is full, or until what a round costs whoever takes part is a twentieth of it.

    Args:
        jobs: with distinct names, in any order.
        facts: of each `model.path`.
        device_bytes: memory of a lane's device; None: not known, so nothing limits the slots.
        slots: `lanes.slots`.
        flops_per_s: what a lane's device sustains.

    Returns:
        The groups, that with the most work first.

    Raises:
        ModelError: a job fits no lane, or not so many do as `slots` says.
    """
    by_base: dict[str, list[tuple[JobSpec, Work]]] = {}
    for job, work in jobs:
        by_base.setdefault(base_of(job), []).append((job, work))
    groups = [
        _group(base, members, facts[members[0][0].model.path], device_bytes, slots, flops_per_s)
        for base, members in by_base.items()
    ]
    return tuple(sorted(groups, key=lambda group: (-sum(j.queued.seconds for j in group.jobs), group.base)))


def _group(
    base: str,
    members: Sequence[tuple[JobSpec, Work]],
    facts: ModelFacts,
    device_bytes: int | None,
    slots: int | Literal["auto"],
    flops_per_s: float,
) -> Group:
    speed = speed_of(facts, members[0][0].model, flops_per_s)
    placed = [Placed(job, work, _queued(base, job, speed.alone(work))) for job, work in members]
    placed.sort(key=lambda job: (-job.queued.seconds, job.spec.name))
    together = [job for job in placed if job.queued.shares_batch]
    most = _most_slots(speed, together) if slots == "auto" else min(slots, len(together))
    lane = choose_lane(facts, [job.spec for job in placed], device_bytes, max(1, most))
    if slots != "auto" and lane.slots < most and device_bytes is not None:
        raise ModelError(
            f"lanes.slots = {slots}: of {members[0][0].model.path} the device holds {lane.slots} jobs at a "
            f"time in the {usable_bytes(device_bytes) / 2**30:.2f} GiB that it can give; set {lane.slots} or "
            "auto"
        )
    return Group(base, tuple(placed), facts, speed, lane)


def _most_slots(speed: LaneSpeed, together: Sequence[Placed]) -> int:
    steps = sum(job.work.steps for job in together)
    return speed.useful_slots(sum(job.work.tokens for job in together) / steps) if steps else 1


def _queued(base: str, job: JobSpec, seconds: float) -> QueuedJob:
    return QueuedJob(
        name=job.name,
        digest=job.digest(),
        base=base,
        seconds=seconds,
        shares_batch=shares_batch(job),
        max_restarts=job.cluster.max_restarts,
    )
