"""How long a fleet takes on some number of GPUs: the queue's own rules, with rounds instead of training.

Event-driven: between two changes of a lane's jobs all its rounds take the same time.
"""

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from raytune_ft.errors import SpecError
from raytune_ft.fleet.entry import QueuedJob
from raytune_ft.fleet.queue import Queue
from raytune_ft.fleet.work import LaneSpeed, Work

_HOPELESS_PREEMPTIONS = 1000
"""For each job and lane: then lanes are lost faster than they come to a checkpoint."""
_NEARLY = 1e-9


@dataclass(frozen=True)
class Task:
    """A job, and what training it takes."""

    job: QueuedJob
    work: Work
    checkpoint_steps: int
    """Steps from one checkpoint to the next: what a preempted lane repeats at most."""


@dataclass(frozen=True)
class Resident:
    """A base on a lane."""

    slots: int
    speed: LaneSpeed
    load_s: float


@dataclass(frozen=True)
class Preemptions:
    """Lanes that are taken away, each at times of its own."""

    per_hour: float
    """Of each lane, on average; above 0."""
    seed: int = 0


@dataclass(frozen=True)
class Stay:
    """A job on a lane, from its entry to its end or the lane's."""

    lane: int
    base: str
    job: str
    start_s: float
    end_s: float
    finished: bool


@dataclass(frozen=True)
class Forecast:
    """What a fleet would take."""

    gpus: int
    lanes: int
    """That are used: no more than make it faster."""
    makespan_s: float
    """Until the last job is done."""
    gpu_s: float
    """Sum over the lanes, each from its start to its last step."""
    training_s: float
    """Part of `gpu_s` in which steps are made, those that a preemption undoes included."""
    steps: int
    """Of all jobs, those that are repeated included."""
    base_loads: int
    preemptions: int
    stays: tuple[Stay, ...]

    @property
    def gpu_hours(self) -> float:
        """`gpu_s` in hours."""
        return self.gpu_s / 3600

    @property
    def idle_share(self) -> float:
        """Share of the GPU-hours in which nothing is trained: starts, loads, waiting."""
        return 1 - self.training_s / self.gpu_s if self.gpu_s else 0.0


def forecasts(
    tasks: Sequence[Task],
    residents: Mapping[str, Resident],
    gpu_counts: Sequence[int],
    *,
    start_s: float,
    preemptions: Preemptions | None = None,
) -> list[Forecast]:
    """What a fleet would take on each number of GPUs; more never take longer, for some may be left out.

    Args:
        tasks: the jobs.
        residents: each base on a lane, by the name that jobs give it.
        gpu_counts: ascending.
        start_s: until a new lane is there.
        preemptions: losses of lanes, if there are any.
    """
    found: list[Forecast] = []
    for gpus in gpu_counts:
        forecast = simulate(tasks, residents, gpus, start_s=start_s, preemptions=preemptions)
        if found and found[-1].makespan_s < forecast.makespan_s:
            forecast = replace(found[-1], gpus=gpus)
        found.append(forecast)
    return found


def simulate(
    tasks: Sequence[Task],
    residents: Mapping[str, Resident],
    lanes: int,
    *,
    start_s: float,
    preemptions: Preemptions | None = None,
) -> Forecast:
    """Train all jobs on so many lanes; see `forecasts`.

    Raises:
        SpecError: lanes would be lost faster than they come to a checkpoint.
    """
    run = _Simulation(tasks, residents, lanes, start_s, preemptions)
    run.to_the_end()
    used = [lane.last_s for lane in run.lanes if lane.last_s]
    return Forecast(
        gpus=lanes,
        lanes=len(used),
        makespan_s=max(used, default=0.0),
        gpu_s=math.fsum(used),
        training_s=math.fsum(lane.training_s for lane in run.lanes),
        steps=run.steps,
        base_loads=run.base_loads,
        preemptions=run.preemptions,
        stays=tuple(run.stays),
    )


@dataclass
class _Lane:
    number: int
    name: str
    losses: random.Random
    base: str | None = None
    ready: bool = False
    """It is there, and its base is loaded."""
    since_s: dict[str, float] = field(default_factory=dict)
    """When each of its jobs entered."""
    began_s: float = 0.0
    """When the rounds began that are under way."""
    round_s: float = 0.0
    version: int = 0
    """Counts changes of what it does: events of before are void."""
    training_s: float = 0.0
    last_s: float = 0.0


class _Simulation:
    def __init__(
        self,
        tasks: Sequence[Task],
        residents: Mapping[str, Resident],
        lanes: int,
        start_s: float,
        preemptions: Preemptions | None,
    ) -> None:
        self.tasks = {task.job.name: task for task in tasks}
        self.remaining = {name: task.work.steps for name, task in self.tasks.items()}
        self.residents = residents
        self.start_s = start_s
        self.losses = preemptions
        self.queue = Queue([task.job for task in tasks], lanes=lanes, lease_s=math.inf)
        seed = preemptions.seed if preemptions else 0
        # No secret hangs on these numbers.
        self.lanes = [_Lane(n, f"{n}", random.Random(f"{seed}/{n}")) for n in range(lanes)]  # noqa: S311
        self.steps = self.base_loads = self.preemptions = 0
        self.stays: list[Stay] = []
        self._events: list[tuple[float, int, int, int]] = []
        self._pushed = 0

    def to_the_end(self) -> None:
        """Train everything."""
        for lane in self.lanes:
            self.queue.join(lane.name, 0.0)
            self._push(self.start_s, lane)
            self._next_loss(lane, 0.0)
        while self.queue.counts["done"] < len(self.tasks):
            now, _, number, version = heapq.heappop(self._events)
            lane = self.lanes[number]
            if version < 0:
                self._lose(lane, now)
            elif version == lane.version:
                lane.ready = True
                changed = self._advance(lane, now)
                changed |= self._ask(lane, now)
                if changed and self.queue.counts["queued"]:
                    self._wake(now)

    def _push(self, at_s: float, lane: _Lane, *, loss: bool = False) -> None:
        """Events of one moment happen in the order of the lanes."""
        self._pushed += 1
        heapq.heappush(self._events, (at_s, self._pushed, lane.number, -1 if loss else lane.version))

    def _ask(self, lane: _Lane, now: float) -> bool:
        """A lane between two rounds: take what the queue gives, and go on; whether it took anything."""
        lane.version += 1
        free = self.residents[lane.base].slots - len(lane.since_s) if lane.base is not None else 0
        offer = self.queue.take(lane.name, lane.base, free, now)
        if offer.switch_to is not None:
            lane.base, lane.ready = offer.switch_to, False
            self.base_loads += 1
            self._push(now + self.residents[lane.base].load_s, lane)
            return True
        for name in offer.jobs:
            lane.since_s[name] = now
        if lane.since_s and lane.base is not None:
            tokens = math.fsum(self.tasks[name].work.tokens_per_step for name in lane.since_s)
            lane.round_s = self.residents[lane.base].speed.seconds(len(lane.since_s), tokens)
            lane.began_s = now
            self._push(now + min(self.remaining[name] for name in lane.since_s) * lane.round_s, lane)
        return bool(offer.jobs)

    def _wake(self, now: float) -> None:
        """Let lanes with room ask once more, at the end of the round that is under way."""
        for lane in self.lanes:
            if lane.ready:
                if not lane.since_s:
                    self._push(now, lane)
                elif lane.base is not None and len(lane.since_s) < self.residents[lane.base].slots:
                    rounds = math.ceil((now - lane.began_s) / lane.round_s - _NEARLY)
                    self._push(lane.began_s + rounds * lane.round_s, lane)

    def _advance(self, lane: _Lane, now: float) -> bool:
        """Count the rounds of a lane up to now, of which the last one just ended; whether a job did, too."""
        if lane.since_s:
            self._count(lane, round((now - lane.began_s) / lane.round_s), now)
        ended = [name for name in lane.since_s if not self.remaining[name]]
        for name in ended:
            self.queue.finish(lane.name, name)
            self._leave(lane, name, now, finished=True)
        return bool(ended)

    def _count(self, lane: _Lane, rounds: int, now: float) -> None:
        for name in lane.since_s:
            self.remaining[name] -= rounds
        self.steps += rounds * len(lane.since_s)
        lane.training_s += rounds * lane.round_s
        lane.last_s = now
        lane.began_s += rounds * lane.round_s

    def _leave(self, lane: _Lane, name: str, now: float, *, finished: bool) -> None:
        start_s = lane.since_s.pop(name)
        self.stays.append(Stay(lane.number, lane.base or "", name, start_s, now, finished))

    def _lose(self, lane: _Lane, now: float) -> None:
        self.preemptions += 1
        if self.losses and self.preemptions > _HOPELESS_PREEMPTIONS * (len(self.tasks) + len(self.lanes)):
            raise SpecError(
                f"--preemptions {self.losses.per_hour:g}: lanes would be lost faster than they come from one "
                "checkpoint to the next; give a lower rate, or set checkpoint.every_steps lower"
            )
        if lane.since_s:
            self._count(lane, math.floor((now - lane.began_s) / lane.round_s + _NEARLY), now)
        for name in list(lane.since_s):
            task = self.tasks[name]
            done = task.work.steps - self.remaining[name]
            self.remaining[name] += done % task.checkpoint_steps
            self._leave(lane, name, now, finished=False)
        self.queue.lose(lane.name, announced=True)
        self.queue.join(lane.name, now)
        lane.base, lane.ready = None, False
        lane.version += 1
        self._push(now + self.start_s, lane)
        self._next_loss(lane, now)
        self._wake(now)

    def _next_loss(self, lane: _Lane, now: float) -> None:
        if self.losses is not None:
            self._push(now + lane.losses.expovariate(self.losses.per_hour / 3600), lane, loss=True)
