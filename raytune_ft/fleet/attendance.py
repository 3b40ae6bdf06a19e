"""A lane at its desk: the lease that a thread renews, and the news that it carries."""

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from raytune_ft.errors import RaytuneError
from raytune_ft.fleet.desk import Stepped, Taken
from raytune_ft.train.progress import Event

BEAT_S = 1.0


class LeaseLost(Exception):
    """The desk took the lane for lost, and others may have its jobs."""


class DeskGone(Exception):
    """The driver has ended, and with it the fleet; for now."""


class DeskDoor(Protocol):
    """What a lane asks and tells; see `raytune_ft.fleet.desk.Desk`. Every method may raise `DeskGone`."""

    def join(self, lane: str, host: str, device: str) -> None: ...
    def take(self, lane: str, base: str | None, free: int) -> Taken: ...
    def loaded(self, lane: str, base: str, slots: int, seconds: float) -> None: ...
    def started(self, lane: str, job: str, step: int, steps: int) -> None: ...
    def beat(self, lane: str, steps: Mapping[str, Stepped], checkpoints: Mapping[str, int]) -> bool: ...
    def done(
        self, lane: str, job: str, result: dict[str, Any], losses: tuple[tuple[int, float], ...]
    ) -> bool: ...
    def failed(self, lane: str, job: str, reason: str) -> bool: ...
    def end(self, lane: str) -> None: ...
    def lose(self, lane: str, *, announced: bool, reason: str) -> None: ...


class Attendance:
    """A lane under one name, from joining to the end of its lease."""

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
        self._thread = threading.Thread(target=self._renew, name="attendance", daemon=True)
        desk.join(lane, host, device)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def check(self) -> None:
        """Do nothing while the lease is held, as far as is known; it asks nobody.

        Raises:
            LeaseLost: it is over.
            DeskGone: so is the fleet.
            Exception: what a thread of the lane met with.
        """
        if self._failure is not None:
            raise self._failure
        if self._lost:
            raise LeaseLost(self.lane)

    def trouble(self, error: Exception) -> None:
        """What concerns the lane, and not one of its jobs: `check` raises the first of it."""
        self._failure = self._failure or error

    def lost(self) -> None:
        """The lease is over."""
        self._lost = True

    def stepped(self, job: str, at: Stepped) -> None:
        """How far a job is, to be told with the next beat."""
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
                self.beat()
            except Exception as error:  # noqa: BLE001  raised again where the lane checks
                self.trouble(error)
                return


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


def reason_of(error: Exception) -> str:
    """Why a job cannot be trained, in one message."""
    if isinstance(error, RaytuneError):
        return str(error)
    said = str(error).strip().partition("\n")[0][:300]
    return f"the job failed: {type(error).__name__}: {said}"
