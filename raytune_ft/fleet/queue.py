"""Who trains what: the state of a fleet's jobs, and the rules by which lanes get them.

Pure state: no Ray, no store and no clock. Times are arguments, in seconds of any one clock; a state that
is to outlive its process needs the time of day.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from raytune_ft.errors import StorageError

State = Literal["queued", "leased", "done", "failed"]

ALONE_AFTER = 2
"""A job whose lanes were lost so often has the next one to itself: then it is known whose fault a loss is."""
# What is read back, from a bucket that others may write to, is as strict as a job file.
_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class QueuedJob:
    """What the queue must know of a job."""

    __pydantic_config__ = _STRICT

    name: str
    digest: str
    """Of the resolved job: another digest is another job."""
    base: str
    """Jobs that have it equal can be on a lane together, or one after another without a reload."""
    seconds: float
    """Predicted, alone on a lane. The longest are handed out first."""
    shares_batch: bool = True
    """Others may be on the lane at the same time."""
    max_restarts: int = 3
    """Lost lanes that it survives."""


@dataclass
class Entry:
    """A job's state."""

    __pydantic_config__ = _STRICT

    job: QueuedJob
    state: State = "queued"
    lane: str | None = None
    """That holds its lease."""
    losses: int = 0
    """Lanes that were lost under it, unannounced."""
    checkpoint_step: int | None = None
    """Of the last checkpoint that a lane spoke of."""
    reason: str | None = None
    """Why it failed."""

    @property
    def alone(self) -> bool:
        """It needs a lane to itself."""
        return not self.job.shares_batch or self.losses >= ALONE_AFTER


@dataclass
class _Lease:
    base: str | None
    expires_at: float
    slots: int | None = None
    """Jobs that it had room for when it asked last; None: it loads its base, and has not asked yet."""
    jobs: set[str] = field(default_factory=set)

    @property
    def has_room(self) -> bool:
        return self.slots is None or len(self.jobs) < self.slots


@dataclass(frozen=True)
class Offer:
    """What a lane gets when it asks. At most one field says something; if none does, it asks again later."""

    jobs: Mapping[str, int | None] = field(default_factory=dict)
    """Leased to it now, the longest first, each with the step of its checkpoint if one is known."""
    switch_to: str | None = None
    """Nothing is left of its base, and this one has work for it: load it, then ask again."""
    ended: bool = False
    """Nothing is left, nor can anything come back."""
    lost: bool = False
    """Its lease is over, and others may have its jobs: drop them all, and join again."""


@dataclass
class _Snapshot:
    __pydantic_config__ = _STRICT

    schema_version: Literal[1]
    lanes: int
    lease_s: float
    on_failure: Literal["continue", "stop"]
    entries: list[Entry]
    leases: dict[str, tuple[str | None, float, int | None]]


_SNAPSHOT = TypeAdapter(_Snapshot)


class Queue:
    """All jobs of a fleet; each ends once, as done or failed.

    A lane joins, takes jobs of the base that it holds, renews its lease while it trains them, and says how
    each ended. A lane that does not renew in time is lost: its jobs are queued again. It gets its share of
    the open work, and more only if no other lane with room has less: none trains many while another waits.

    Args:
        jobs: with distinct names.
        lanes: that are at work or on their way; who starts and ends them keeps it true.
        lease_s: how long after its last word a lane counts as lost.
        on_failure: `stop`: once a job failed, no more is handed out.
        previous: what is known of jobs from before. Of one with an equal digest the end, the losses and the
            checkpoint still hold; one that was leased is queued.
    """

    def __init__(
        self,
        jobs: Iterable[QueuedJob],
        *,
        lanes: int,
        lease_s: float,
        on_failure: Literal["continue", "stop"] = "continue",
        previous: Mapping[str, Entry] = MappingProxyType({}),
    ) -> None:
        self.lanes = lanes
        self._lease_s = lease_s
        self._on_failure = on_failure
        self._entries: dict[str, Entry] = {}
        self._leases: dict[str, _Lease] = {}
        self._waiting: dict[tuple[str, bool], list[tuple[float, str]]] = {}
        self._counts: Counter[State] = Counter()
        self._open_us: Counter[str] = Counter()
        for job in jobs:
            self._add(_from_before(job, previous.get(job.name)))

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every job's state by name; not to be changed."""
        return MappingProxyType(self._entries)

    @property
    def counts(self) -> Mapping[State, int]:
        """How many jobs are in each state."""
        return MappingProxyType(self._counts)

    @property
    def stopped(self) -> bool:
        """A job failed, and the fleet was to stop then."""
        return self._on_failure == "stop" and self._counts["failed"] > 0

    @property
    def ended(self) -> bool:
        """No lane trains, and none will."""
        return not self._counts["leased"] and (self.stopped or not self._counts["queued"])

    def join(self, lane: str, now: float) -> None:
        """A lane is there. Its name was never used before, or its lease is over."""
        self._leases[lane] = _Lease(None, now + self._lease_s)

    def take(self, lane: str, base: str | None, free: int, now: float) -> Offer:
        """Lease jobs to a lane.

        Args:
            lane: who asks; its lease is renewed.
            base: what it holds; None: nothing yet.
            free: how many more jobs of that base it has room for.
            now: the time.
        """
        if not self.renew(lane, now):
            return Offer(lost=True)
        self.expire(now)
        lease = self._leases[lane]
        lease.base, lease.slots = base, len(lease.jobs) + free
        if self.stopped or not self._counts["queued"]:
            return Offer(ended=self.stopped or self._counts["leased"] == len(lease.jobs))
        if any(self._entries[name].alone for name in lease.jobs):
            return Offer()
        if base is not None and (self._waiting.get((base, False)) or self._waiting.get((base, True))):
            return Offer(jobs=self._hand_out(lane, lease, base))
        if lease.jobs:
            return Offer()
        switch_to = self._next_base()
        if switch_to is not None:
            lease.base, lease.slots = switch_to, None
        return Offer(switch_to=switch_to)

    def renew(self, lane: str, now: float, checkpoints: Mapping[str, int] = MappingProxyType({})) -> bool:
        """A lane is alive.

        Args:
            lane: which.
            now: the time.
            checkpoints: the step of each checkpoint that it made since it last said so.

        Returns:
            False if it is too late: the lane's jobs are others' to take, and it must drop them.
        """
        lease = self._leases.get(lane)
        if lease is None:
            return False
        lease.expires_at = now + self._lease_s
        for name in lease.jobs & checkpoints.keys():
            self._entries[name].checkpoint_step = checkpoints[name]
        return True

    def finish(self, lane: str, name: str) -> bool:
        """A job was trained and published.

        Returns:
            False if the lane holds no lease on it: then nothing changes.
        """
        return self._end(lane, name, "done", None)

    def fail(self, lane: str, name: str, reason: str) -> bool:
        """A job cannot be trained; see `finish`."""
        return self._end(lane, name, "failed", reason)

    def lose(self, lane: str, *, announced: bool = False) -> tuple[str, ...]:
        """A lane is gone; its jobs are queued again, from their checkpoints.

        A job that was alone on it, and has lost more lanes than it may, has failed.

        Args:
            lane: which. Unknown ones have nothing to lose.
            announced: it was preempted or sent away, which is no job's fault.

        Returns:
            The jobs that it had.
        """
        lease = self._leases.pop(lane, None)
        if lease is None:
            return ()
        for name in sorted(lease.jobs):
            entry = self._entries[name]
            entry.losses += not announced
            guilty = not announced and len(lease.jobs) == 1 and entry.losses > entry.job.max_restarts
            self._move(entry, "failed" if guilty else "queued", reason=_guilt(entry) if guilty else None)
        return tuple(sorted(lease.jobs))

    def expire(self, now: float) -> tuple[str, ...]:
        """Lose every lane whose lease is over; the jobs that they had."""
        over = sorted(lane for lane, lease in self._leases.items() if lease.expires_at <= now)
        return tuple(name for lane in over for name in self.lose(lane))

    def retry_failed(self) -> tuple[str, ...]:
        """Queue what failed once more; which these are."""
        failed = [entry for entry in self._entries.values() if entry.state == "failed"]
        for entry in failed:
            entry.losses = 0
            self._move(entry, "queued")
        return tuple(entry.job.name for entry in failed)

    def snapshot(self) -> bytes:
        """The whole state as JSON."""
        state = _Snapshot(
            1,
            self.lanes,
            self._lease_s,
            self._on_failure,
            list(self._entries.values()),
            {lane: (lease.base, lease.expires_at, lease.slots) for lane, lease in self._leases.items()},
        )
        return _SNAPSHOT.dump_json(state)

    @classmethod
    def restored(cls, snapshot: bytes, place: str) -> "Queue":
        """The queue of which `snapshot` was made; `place` is where it was read, for the message.

        Raises:
            StorageError: it is none.
        """
        try:
            state = _SNAPSHOT.validate_json(snapshot)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "its beginning"
            raise StorageError(f"{place}: not the state of a fleet, at {where}; {_REMEDY}") from None
        found = cls([], lanes=state.lanes, lease_s=state.lease_s, on_failure=state.on_failure)
        found._leases = {lane: _Lease(*lease) for lane, lease in state.leases.items()}
        for entry in state.entries:
            held = entry.state == "leased"
            if entry.job.name in found._entries or held != (entry.lane in found._leases):
                raise StorageError(f"{place}: {entry.job.name} has no one place in it; {_REMEDY}")
            found._add(entry)
        return found

    def _add(self, entry: Entry) -> None:
        self._entries[entry.job.name] = entry
        self._counts[entry.state] += 1
        if entry.state in ("queued", "leased"):
            self._open_us[entry.job.base] += _us(entry)
        if entry.state == "queued":
            self._wait(entry)
        elif entry.lane is not None:
            self._leases[entry.lane].jobs.add(entry.job.name)

    def _wait(self, entry: Entry) -> None:
        line = self._waiting.setdefault((entry.job.base, entry.alone), [])
        heapq.heappush(line, (-entry.job.seconds, entry.job.name))

    def _move(
        self, entry: Entry, state: State, *, lane: str | None = None, reason: str | None = None
    ) -> None:
        was_open, is_open = (one in ("queued", "leased") for one in (entry.state, state))
        self._counts[entry.state] -= 1
        self._counts[state] += 1
        self._open_us[entry.job.base] += (is_open - was_open) * _us(entry)
        entry.state, entry.lane, entry.reason = state, lane, reason
        if state == "queued":
            self._wait(entry)

    def _end(self, lane: str, name: str, state: State, reason: str | None) -> bool:
        lease = self._leases.get(lane)
        if lease is None or name not in lease.jobs:
            return False
        lease.jobs.remove(name)
        self._move(self._entries[name], state, reason=reason)
        return True

    def _hand_out(self, lane: str, lease: _Lease, base: str) -> dict[str, int | None]:
        handed: dict[str, int | None] = {}
        # Only an empty lane can take those that go alone, and as long as others wait it is rarely empty.
        alone = not lease.jobs and bool(self._waiting.get((base, True)))
        line = self._waiting.get((base, alone), [])
        while line and lease.has_room and self._may_have_more(lease, base):
            entry = self._entries[heapq.heappop(line)[1]]
            self._move(entry, "leased", lane=lane)
            lease.jobs.add(entry.job.name)
            handed[entry.job.name] = entry.checkpoint_step
            if alone:
                break
        return handed

    def _may_have_more(self, lease: _Lease, base: str) -> bool:
        """Whether a lane has less than its share of a base's open work, or least of those that have room."""
        held_us, total_us = self._held_us(lease), self._open_us.total()
        coming = max(0, self.lanes - sum(other.base is not None for other in self._leases.values()))
        coming = round(coming * self._open_us[base] / total_us) if total_us else coming
        if not lease.jobs or held_us * (self._lanes_on(base) + coming) < self._open_us[base]:
            return True
        return not coming and all(
            held_us <= self._held_us(other)
            for other in self._leases.values()
            if other.base == base and other.has_room
        )

    def _held_us(self, lease: _Lease) -> int:
        return sum(_us(self._entries[name]) for name in lease.jobs)

    def _lanes_on(self, base: str) -> int:
        return sum(lease.base == base for lease in self._leases.values())

    def _next_base(self) -> str | None:
        """The base with the most that nobody has begun, for each lane on it; None if other lanes will do.

        Who asks has nothing left of its own base, so it is on none of these.
        """
        queued_s: dict[str, float] = {}
        queued: Counter[str] = Counter()
        for (base, _), line in sorted(self._waiting.items()):
            queued[base] += len(line)
            queued_s[base] = queued_s.get(base, 0.0) - math.fsum(negative_s for negative_s, _ in line)
        loading = Counter(lease.base for lease in self._leases.values() if lease.slots is None)
        worth = [base for base in queued_s if queued[base] > loading[base]]
        return max(worth, key=lambda base: queued_s[base] / (1 + self._lanes_on(base)), default=None)


_REMEDY = "remove it, and the fleet goes on from what each job left in the bucket"


def _us(entry: Entry) -> int:
    """Whole microseconds: sums that are added to and taken from stay exact."""
    return round(entry.job.seconds * 1e6)


def _guilt(entry: Entry) -> str:
    return (
        f"its lane was lost {entry.losses} times, at last with no other job on it, and "
        f"cluster.max_restarts = {entry.job.max_restarts}"
    )


def _from_before(job: QueuedJob, before: Entry | None) -> Entry:
    if before is None or before.job.digest != job.digest:
        return Entry(job)
    if before.state == "leased":
        return replace(before, job=job, state="queued", lane=None)
    return replace(before, job=job)
