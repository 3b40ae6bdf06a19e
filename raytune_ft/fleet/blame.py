"""Whose fault it is that something went wrong on a lane: the job's, which has failed, or not.

One bad job must not take others with it, nor one bad lane the jobs. What a job alone can be blamed for ends
it. Too small a device, or a store that answers and fails it, sends it to be tried once more, elsewhere if
there is a lane. All else ends the lane: its jobs go on elsewhere, and where that is no use, the fleet ends
with the reason, and the same command goes on with it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray.exceptions

from raytune_ft.errors import (
    DeviceFailed,
    ModelError,
    OutOfMemory,
    RaytuneError,
    RunHeld,
    StorageChanged,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageMissing,
    TrainingError,
)
from raytune_ft.fleet.attendance import Attendance, DeskGone, LaneUnfit, LeaseLost, reason_of
from raytune_ft.train.faults import fault_of_device
from raytune_ft.train.uploads import OUTAGE_S

Result = TypeVar("Result")

PAUSE_S = 5.0
_TRIES = 3
"""Of what fails in a store that answers otherwise."""
_LASTING = (StorageMissing, StorageChanged, StorageDenied, StorageFull)
"""Of a store: nothing that waiting would mend."""


class DoesNotFit(ModelError):
    """The lane's device does not hold the job; another's may."""


class UnusableCheckpoint(Exception):
    """A checkpoint is complete, and nobody can go on from it."""


_OF_THE_LANE = (ray.exceptions.RayError, RunHeld, LeaseLost, DeskGone, DeviceFailed, LaneUnfit, StorageFull)
_TO_BE_TRIED_AGAIN = (DoesNotFit, OutOfMemory, StorageError)


class Blame:
    """Settles what becomes of a job that something went wrong with."""

    def __init__(self, attendance: Attendance, ask_store: Callable[[], None]) -> None:
        """Blame nobody yet.

        Args:
            attendance: of the lane.
            ask_store: reads something from the store that is no job's; raises where that fails.
        """
        self._attendance = attendance
        self._ask_store = ask_store

    def settle(self, job: str, error: BaseException) -> None:
        """End the job, or give it back, or end the lane. Any thread may call it, and it raises nothing."""
        desk, lane = self._attendance.desk, self._attendance.lane
        try:
            found = fault_of_device(error) or error
            if self._is_of_the_lane(found):
                self._attendance.trouble(found)
            elif isinstance(found, _TO_BE_TRIED_AGAIN) and not isinstance(found, StorageDenied):
                desk.give_back(lane, job, str(found), alone=isinstance(found, OutOfMemory))
            else:
                desk.failed(lane, job, reason_of(found))
        except Exception as trouble:  # noqa: BLE001  raised again where the lane checks
            self._attendance.trouble(trouble)

    def insist(self, act: Callable[[], Result], pause: Callable[[float], None]) -> Result:
        """Do it, and while the store is away again and again, for up to `OUTAGE_S`.

        Args:
            act: what to do; what it has done before it fails does no harm.
            pause: waits so many seconds; raises where there is no use in it any more.

        Raises:
            StorageError: the store is away for longer, or refuses, or is full, or has something against this.
            RunHeld: another driver has taken over the fleet.
            Exception: what `act` and `pause` raise otherwise.
        """
        give_up_at = time.monotonic() + OUTAGE_S
        answers = 0
        while True:
            try:
                return act()
            except _LASTING:
                raise
            except StorageError:
                answers += not self._store_fails()
                if answers == _TRIES or time.monotonic() > give_up_at:
                    raise
            pause(PAUSE_S)

    def _is_of_the_lane(self, error: BaseException) -> bool:
        # Data that is gone or changed is a DataError by now; all else may be one job's, or nobody's.
        if isinstance(error, StorageError) and not isinstance(error, StorageFull):
            return self._store_fails()
        return isinstance(error, _OF_THE_LANE)

    def _store_fails(self) -> bool:
        try:
            self._ask_store()
        except StorageError:
            return True
        return False


@contextmanager
def reading_checkpoint() -> Iterator[None]:
    """Within, a checkpoint is read that may be of another program, of other data, or damaged.

    Raises:
        UnusableCheckpoint: it is.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RaytuneError) as error:
        if isinstance(error, TrainingError | StorageError):
            raise
        raise UnusableCheckpoint(f"{type(error).__name__}: {error}") from error


def may_load_elsewhere(error: BaseException) -> bool:
    """Whether a base did not load for want of memory, disk or network, rather than for what it is."""
    return any(
        fault_of_device(one) is not None
        or type(one).__module__.startswith("huggingface_hub")
        or (isinstance(one, OSError) and one.errno is not None and not isinstance(one, FileNotFoundError))
        for one in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
