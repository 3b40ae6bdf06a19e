"""Who trains what: the state of a fleet's jobs, and the rules by which lanes get them.

Pure state: no Ray, no store and no clock. Times are arguments, in seconds of any one clock.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from raytune_ft.errors import StorageError
from raytune_ft.fleet.entry import STRICT, Entry, QueuedJob, State, as_before, process_of


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
    """Nothing is left for it. Should a job come back, another lane comes for it."""
    lost: bool = False
    """Its lease is over, and others may have its jobs: drop them all, and join again."""


@dataclass
class _Snapshot:
    __pydantic_config__ = STRICT

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
            self._add(as_before(job, previous.get(job.name)))

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
            # Who waits for what may come back is paid for meanwhile.
            last = not lease.jobs or self._counts["leased"] == len(lease.jobs)
            return Offer(ended=self.stopped or last)
        if self._is_alone(lease):
            return Offer()
        handed = {} if base is None else self._hand_out(lane, lease, base)
        if lease.jobs:
            return Offer(jobs=handed)
        switch_to = self._next_base(base)
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
            self._entries[name].count_checkpoint(checkpoints[name])
        return True

    def put_off(self, seconds: float) -> None:
        """All leases hold for so much longer: nobody listened to the lanes meanwhile."""
        for lease in self._leases.values():
            lease.expires_at += seconds

    def finish(self, lane: str, name: str) -> bool:
        """A job was trained and published.

        Returns:
            False if the lane holds no lease on it: then nothing changes.
        """
        return self._end(lane, name, "done", None)

    def fail(self, lane: str, name: str, reason: str) -> bool:
        """A job cannot be trained; see `finish`."""
        return self._end(lane, name, "failed", reason)

    def give_back(self, lane: str, name: str, reason: str, *, alone: bool) -> bool:
        """A lane cannot go on with a job, and others may; see `finish`.

        A lane gets it once more if all that there are refused it, and what it refuses twice has failed.

        Args:
            lane: which.
            name: of the job.
            reason: why.
            alone: whoever tries it next has no other job beside it.
        """
        if not self.holds(lane, name):
            return False
        entry = self._entries[name]
        twice = process_of(lane) in entry.refused_by
        entry.count_refusal(lane, alone=alone)
        return self._end(lane, name, "failed" if twice else "queued", reason if twice else None)

    def fail_waiting(self, base: str, reason: str) -> tuple[str, ...]:
        """No job of a base that nobody has begun can be trained; which these are."""
        names = sorted(name for alone in (False, True) for _, name in self._waiting.pop((base, alone), ()))
        for name in names:
            self._move(self._entries[name], "failed", reason=reason)
        return tuple(names)

    def holds(self, lane: str, name: str) -> bool:
        """Whether a lane has the lease on a job."""
        lease = self._leases.get(lane)
        return lease is not None and name in lease.jobs

    def is_loaded(self, base: str) -> bool:
        """Whether a lane has a base ready."""
        return any(lease.base == base and lease.slots is not None for lease in self._leases.values())

    def lose(self, lane: str, *, announced: bool = False) -> tuple[str, ...]:
        """A lane is gone; its jobs are queued again, from their checkpoints.

        A job that was alone on it, and has lost more lanes than it may without coming further, has failed.

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
            if not announced:
                entry.count_loss()
            guilty = not announced and len(lease.jobs) == 1 and entry.losses > entry.job.max_restarts
            self._move(entry, "failed" if guilty else "queued", reason=entry.guilt if guilty else None)
        return tuple(sorted(lease.jobs))

    def expire(self, now: float) -> tuple[str, ...]:
        """Lose every lane whose lease is over; the jobs that they had."""
        over = sorted(lane for lane, lease in self._leases.items() if lease.expires_at <= now)
        return tuple(name for lane in over for name in self.lose(lane))

    def retry_failed(self) -> tuple[str, ...]:
        """Queue what failed once more; which these are."""
        failed = [entry for entry in self._entries.values() if entry.state == "failed"]
        for entry in failed:
            entry.forgive()
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
            self._open_us[entry.job.base] += entry.microseconds
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
        self._open_us[entry.job.base] += (is_open - was_open) * entry.microseconds
        entry.state, entry.lane, entry.reason = state, lane, reason
        if state == "queued":
            self._wait(entry)

    def _end(self, lane: str, name: str, state: State, reason: str | None) -> bool:
        if not self.holds(lane, name):
            return False
        self._leases[lane].jobs.remove(name)
        self._move(self._entries[name], state, reason=reason)
        return True

    def _hand_out(self, lane: str, lease: _Lease, base: str) -> dict[str, int | None]:
        # Only an empty lane can take those that go alone, and as long as others wait it is rarely empty.
        handed = {} if lease.jobs else self._hand_from((base, True), lane, lease, most=1)
        return handed or self._hand_from((base, False), lane, lease)

    def _hand_from(
        self, which: tuple[str, bool], lane: str, lease: _Lease, most: float = math.inf
    ) -> dict[str, int | None]:
        line = self._waiting.get(which, [])
        refused: list[tuple[float, str]] = []
        handed: dict[str, int | None] = {}
        while line and len(handed) < most and lease.has_room and self._may_have_more(lease, which[0]):
            place = heapq.heappop(line)
            entry = self._entries[place[1]]
            if not entry.suits(lane, self._leases):
                refused.append(place)
                continue
            self._move(entry, "leased", lane=lane)
            lease.jobs.add(entry.job.name)
            handed[entry.job.name] = entry.checkpoint_step
        for place in refused:
            heapq.heappush(line, place)
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
            if other.base == base and other.has_room and not self._is_alone(other)
        )

    def _is_alone(self, lease: _Lease) -> bool:
        """Whether a lane has a job that no other may stand beside."""
        return any(self._entries[name].alone for name in lease.jobs)

    def _held_us(self, lease: _Lease) -> int:
        return sum(self._entries[name].microseconds for name in lease.jobs)

    def _lanes_on(self, base: str) -> int:
        return sum(lease.base == base for lease in self._leases.values())

    def _next_base(self, held: str | None) -> str | None:
        """The base with the most that nobody has begun, for each lane on it; None if other lanes will do.

        Args:
            held: what who asks has; nothing of it is left for it.
        """
        queued_s: dict[str, float] = {}
        queued: Counter[str] = Counter()
        for (base, _), line in sorted(self._waiting.items()):
            queued[base] += len(line)
            queued_s[base] = queued_s.get(base, 0.0) - math.fsum(negative_s for negative_s, _ in line)
        loading = Counter(lease.base for lease in self._leases.values() if lease.slots is None)
        worth = [base for base in queued_s if queued[base] > loading[base] and base != held]
        return max(worth, key=lambda base: queued_s[base] / (1 + self._lanes_on(base)), default=None)


_REMEDY = "remove it, and the fleet goes on from what each job left in the bucket"
