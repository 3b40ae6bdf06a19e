"""A fleet before it runs: its jobs, what they take, how they are placed, and how long that would last."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from raytune_ft.data.sources import list_source
from raytune_ft.errors import DataError
from raytune_ft.fleet.placement import Group, place
from raytune_ft.fleet.simulate import Forecast, Preemptions, Resident, Task, forecasts
from raytune_ft.fleet.work import CPU_FLOPS, GPU_FLOPS, Work, estimate
from raytune_ft.planner import ModelFacts, check_max_tokens
from raytune_ft.spec import FleetSpec, JobSpec, expand
from raytune_ft.spec.problems import message

LANE_START_S = 20.0
"""Until a worker is there on a node that is."""
LOAD_BYTES_PER_S = 0.5e9
"""From a bucket or disk through quantisation, of the base's 16-bit weights."""
_LISTERS = 16


@dataclass(frozen=True)
class FleetPlan:
    """What is known of a fleet before it runs."""

    fleet: FleetSpec
    groups: tuple[Group, ...]
    device_bytes: int | None
    flops_per_s: float

    @property
    def tokens(self) -> int:
        """Of all jobs: an estimate."""
        return sum(group.tokens for group in self.groups)

    def forecasts(self, gpu_counts: Sequence[int], preemptions: Preemptions | None = None) -> list[Forecast]:
        """How long it would take on each number of GPUs; see `raytune_ft.fleet.simulate`."""
        tasks = [
            Task(job.queued, job.work, job.spec.checkpoint.every_steps)
            for group in self.groups
            for job in group.jobs
        ]
        residents = {
            group.base: Resident(group.lane.slots, group.speed, 2 * group.facts.parameters / LOAD_BYTES_PER_S)
            for group in self.groups
        }
        return forecasts(tasks, residents, gpu_counts, start_s=LANE_START_S, preemptions=preemptions)


def plan_fleet(
    fleet: FleetSpec,
    facts_of: Callable[[str], ModelFacts],
    *,
    place_name: str,
    device_bytes: int | None,
    flops_per_s: float | None,
) -> FleetPlan:
    """Expand a fleet, estimate its jobs from the sizes of their data, and place them.

    Lists the data; reads none of it, and of the bases their configs alone.

    Args:
        fleet: the checked fleet file.
        facts_of: reads the dimensions of a `model.path`.
        place_name: the fleet's file, for messages.
        device_bytes: memory of a lane's device; None: not known.
        flops_per_s: what a lane's device sustains; None: a guess by `cluster.device`.

    Raises:
        SpecError: a job is none.
        DataError: a source names nothing.
        ModelError: a base is none, or a job does not fit.
        StorageError: a store cannot be listed.
    """
    jobs, sizes = list_jobs(fleet, place_name)
    facts = {path: facts_of(path) for path in sorted({job.model.path for job in jobs})}
    for job in jobs:
        check_max_tokens(job, facts[job.model.path])
    if flops_per_s is None:
        on_cpu = all(job.cluster.device == "cpu" for job in jobs)
        flops_per_s = CPU_FLOPS if on_cpu else GPU_FLOPS
    worked = [(job, _work(job, sizes)) for job in jobs]
    groups = place(worked, facts, device_bytes=device_bytes, slots=fleet.lanes.slots, flops_per_s=flops_per_s)
    return FleetPlan(fleet, groups, device_bytes, flops_per_s)


def list_jobs(fleet: FleetSpec, place_name: str) -> tuple[tuple[JobSpec, ...], Mapping[str, int]]:
    """All jobs of a fleet, and the bytes that each uri of their sources names.

    Raises:
        SpecError: a job is none.
        DataError: sources name nothing; all of them in one message.
        StorageError: a store cannot be listed.
    """
    listed = _sizes_of_glob(fleet.for_each.glob, place_name) if fleet.for_each else {}
    jobs = expand(fleet, listed, place=place_name)
    wanted = {source.uri for job in jobs for source in job.data.sources} - listed.keys()
    sizes: dict[str, int | DataError] = {**listed, **_total_sizes(sorted(wanted))}
    problems = [
        f"{job.name}: data.sources[{at}].uri = {problem}"
        for job in jobs
        for at, source in enumerate(job.data.sources)
        if isinstance(problem := sizes[source.uri], DataError)
    ]
    if problems:
        raise DataError(message(place_name, problems))
    return jobs, {uri: size for uri, size in sizes.items() if isinstance(size, int)}


def _work(job: JobSpec, sizes: Mapping[str, int]) -> Work:
    return estimate(job, [sizes[source.uri] for source in job.data.sources])


def _sizes_of_glob(glob: str, place_name: str) -> dict[str, int]:
    try:
        return {found.uri: found.size_bytes for found in list_source(glob).objects}
    except DataError as error:
        raise DataError(message(place_name, [f"for_each.glob = {error}"])) from None


def _total_sizes(uris: Iterable[str]) -> dict[str, int | DataError]:
    """Bytes below each uri, or what is wrong with it."""

    def total(uri: str) -> int | DataError:
        try:
            return sum(found.size_bytes for found in list_source(uri).objects)
        except DataError as error:
            return error

    wanted = list(uris)
    with ThreadPoolExecutor(_LISTERS) as pool:
        return dict(zip(wanted, pool.map(total, wanted), strict=True))
