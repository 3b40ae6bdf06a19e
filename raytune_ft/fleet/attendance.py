"""A lane at its desk: the lease that a thread renews, and the news that it carries."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, Self

from raytune_ft.errors import RaytuneError, StorageError, TrainingError
from raytune_ft.fleet.desk import Stepped, Taken
from raytune_ft.train.progress import Event

BEAT_S = 1.0
HANGS_AFTER_S = 1800.0
"""A lane whose own thread stands in one place for so long never comes back. A step or a pass of an evaluation
takes seconds, and a store that is away is waited for for a third of this time."""


class LeaseLost(Exception):
    """The desk took the lane for lost, and others may have its jobs; or it cannot be reached."""


class DeskGone(Exception):
    """The driver has ended, and with it the fleet; for now."""


class LaneUnfit(TrainingError):
    """The lane's machine lacks something that the fleet's jobs need."""


class DeskDoor(Protocol):
    """What a lane asks and tells; see `raytune_ft.fleet.desk.Desk`.

    Every method may raise `DeskGone`, and `LeaseLost` where the desk cannot be reached for now.
    """

    def join(self, lane: str, host: str, device: str) -> None: ...
    def take(self, lane: str, base: str | None, free: int) -> Taken: ...
    def loaded(self, lane: str, base: str, slots: int, seconds: float) -> None: ...
    def cannot_load(self, lane: str, base: str, reason: str) -> bool: ...
    def started(self, lane: str, job: str, step: int, steps: int, notices: Sequence[str]) -> None: ...
    def beat(self, lane: str, steps: Mapping[str, Stepped], checkpoints: Mapping[str, int]) -> bool: ...
    def done(
        self, lane: str, job: str, result: dict[str, Any], losses: tuple[tuple[int, float], ...]
    ) -> bool: ...
    def failed(self, lane: str, job: str, reason: str) -> bool: ...
    def give_back(self, lane: str, job: str, reason: str, *, alone: bool) -> bool: ...
    def end(self, lane: str) -> None: ...
    def lose(self, lane: str, *, announced: bool, reason: str) -> None: ...


class Attendance:
    """A lane under one name, from joining to the end of its lease.

    The thread that makes it is the lane's own, which trains. Where that hangs, nobody could end the lane but
    its process itself: it does, and the driver replaces it.
    """

    def __init__(self, desk: DeskDoor, lane: str, host: str, device: str) -> None:
        """Join.

        Args:
            desk: where.
            lane: a name that was never used.
            host: of the lane.
            device: of the lane, for people.
        """
        self.desk = desk
        self.lane = lane
        self._lock = threading.Lock()
        self._steps: dict[str, Stepped] = {}
        self._checkpoints: dict[str, int] = {}
        self._lost = False
        self._failure: Exception | None = None
        self._left = threading.Event()
        self._owner = threading.get_ident()
        self._place: tuple[tuple[int, int], ...] | None = None
        self._moved_at: float | None = time.monotonic()
        """When the owner was last seen elsewhere; None: it may stand still."""
        self._thread = threading.Thread(target=self._renew, name="attendance", daemon=True)
        desk.join(lane, host, device)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._left.set()
        self._thread.join()

    def check(self) -> None:
        """Do nothing while the lease is held, as far as is known; it asks nobody.

        Raises:
            LeaseLost: it is over.
            DeskGone: so is the fleet.
            Exception: what a thread of the lane met with.
        """
        if threading.get_ident() == self._owner:
            self._move()
        if self._failure is not None:
            raise self._failure
        if self._lost:
            raise LeaseLost(self.lane)

    def may_write(self) -> None:
        """As `check`, for those that wait for a store that is away: where the lane has given one up, so do
        they.

        Raises:
            LeaseLost: the lease is over, or the lane ends for its store.
            DeskGone: so is the fleet.
            Exception: what a thread of the lane met with otherwise.
        """
        try:
            self.check()
        except StorageError as error:
            raise LeaseLost(self.lane) from error

    def trouble(self, error: BaseException) -> None:
        """What concerns the lane, and not one of its jobs: `check` raises the first of it."""
        if self._failure is None:
            # Ray would take others for an order to exit.
            self._failure = error if isinstance(error, Exception) else TrainingError(_said(error, "lane"))

    def lost(self) -> None:
        """The lease is over."""
        self._lost = True

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Within, the owner may stay in one place for as long as it likes: a load may take long."""
        self._moved_at = None
        try:
            yield
        finally:
            self._moved_at = time.monotonic()

    def stepped(self, job: str, at: Stepped) -> None:
        """How far a job is, to be told with the next beat."""
        self._move()
        with self._lock:
            self._steps[job] = at

    def kept(self, job: str, step: int) -> None:
        """A job has a checkpoint, to be told with the next beat."""
        with self._lock:
            self._checkpoints[job] = step

    def beat(self) -> None:
        """Tell what there is to tell, and renew the lease."""
        with self._lock:
            steps, self._steps = self._steps, {}
            checkpoints, self._checkpoints = self._checkpoints, {}
        if not self.desk.beat(self.lane, steps, checkpoints):
            self.lost()

    def _renew(self) -> None:
        while not self._left.wait(BEAT_S):
            try:
                if self._hangs():
                    self._exit()
                self.beat()
            except BaseException as error:  # noqa: BLE001  raised again where the lane checks
                self.trouble(error)
                return

    def _move(self) -> None:
        if self._moved_at is not None:
            self._moved_at = time.monotonic()

    def _hangs(self) -> bool:
        frame = sys._current_frames().get(self._owner)
        place: list[tuple[int, int]] = []
        while frame is not None:
            place.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        if tuple(place) != self._place:
            self._place = tuple(place)
            self._move()
        return self._moved_at is not None and time.monotonic() > self._moved_at + HANGS_AFTER_S

    def _exit(self) -> None:
        faulthandler.dump_traceback()
        with suppress(Exception):
            reason = f"it stood in one place for {HANGS_AFTER_S / 60:.0f} min; its log says where"
            self.desk.lose(self.lane, announced=False, reason=reason)
        os._exit(1)


class JobEvents:
    """Where the recorder of a job writes: only how far it is goes on to the desk."""

    def __init__(self, attendance: Attendance, job: str, tokens: int) -> None:
        """Go on after `tokens` that earlier lanes trained on."""
        self._attendance = attendance
        self._job = job
        self._tokens = tokens

    def write(self, event: Event) -> None:
        """See `raytune_ft.train.recorder.Events`."""
        history = event.get("history")
        if not history:
            return
        last = history[-1]
        self._tokens += sum(entry["tokens"] for entry in history)
        steps = max(event["steps"], last["step"])
        self._attendance.stepped(self._job, Stepped(last["step"], steps, last["loss"], self._tokens))


def reason_of(error: BaseException) -> str:
    """Why a job cannot be trained, in one message."""
    return str(error) if isinstance(error, RaytuneError) else _said(error, "job")


def _said(error: BaseException, who: str) -> str:
    said = str(error).strip().partition("\n")[0][:300]
    return f"the {who} failed: {type(error).__name__}: {said}"
