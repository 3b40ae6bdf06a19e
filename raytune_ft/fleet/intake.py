"""How jobs come to a lane: taken and prepared in a thread, while others train."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from raytune_ft.catalog import Signer
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.other_tasks import read_other_tasks
from raytune_ft.data.prepare import prepare
from raytune_ft.errors import BadInput, DataError, TrainingError
from raytune_ft.fleet.attendance import Attendance, LaneUnfit
from raytune_ft.fleet.blame import Blame
from raytune_ft.fleet.desk import Order, Taken
from raytune_ft.storage import Storage, disk_errors
from raytune_ft.train.assignment import Assignment, TrainingData
from raytune_ft.train.kept import JobCheckpoints
from raytune_ft.train.lease import EXPIRES_S, newest_entry
from raytune_ft.train.peers import Peers
from raytune_ft.train.placement import Placement
from raytune_ft.train.publish import signer_of
from raytune_ft.train.recipe import Recipe
from raytune_ft.train.run import Run, name_inputs

_ASK_AGAIN_S = 0.3
"""Where nothing was to be had: another lane may be lost, or a job of another base be the last."""
_LOOK_AGAIN_S = 2.0
_CLOCKS_DIFFER_S = 600.0
"""That of the store and that of this machine, at most."""


@dataclass(frozen=True)
class Ready:
    """A job that can begin."""

    order: Order
    recipe: Recipe
    fingerprint: str
    """Of its data."""
    signer: Signer | None
    checkpoints: JobCheckpoints
    checkpoint: Path | None
    """Folder of the checkpoint that it goes on from; the lane removes it."""
    run: Run
    began: float
    """When it was taken, by `time.perf_counter`."""

    @property
    def name(self) -> str:
        """Of the job."""
        return self.order.job.name


@dataclass(frozen=True)
class Preparing:
    """What is the same for all jobs that a lane takes while it holds a base."""

    encoder: Encoder
    """Of the base's tokenizer, which takes longer to make than small data to read."""
    identity: str
    """Of the base that the lane holds."""
    placement: Placement
    channel: str
    """Of the fleet's driver."""
    folder: Path
    """Of this machine, for checkpoints on their way."""
    cache: bool

    def prepare(self, order: Order) -> Ready:
        """Read a job's data, or what of it is read before training, and fetch its checkpoint.

        Raises:
            BadInput: the data or the base is not what it should be, or is not what it was.
            LaneUnfit: there is no key to sign with on this machine.
            TrainingError: somebody else is at work on the job.
            StorageError: the store failed.
        """
        job, began = order.job, time.perf_counter()
        # Before any work: the key is in the environment of this node, which the driver cannot see.
        try:
            signer = signer_of(job)
        except BadInput as error:
            raise LaneUnfit(str(error)) from None
        data = prepare(job, tokenizer=self.encoder, cache=self.cache, here=True)
        others = read_other_tasks(job, tokenizer=self.encoder, cache=self.cache, here=True)
        found = name_inputs(data.fingerprint, self.identity, others.fingerprint if others else None)
        if found != order.inputs:
            raise DataError(
                f"{job.name}: its data or its base changed after the fleet had begun; run the same command "
                "again, and it is trained on what is there then"
            )
        run = Run(job)
        _check_free(run.storage)
        state = run.begin(data.fingerprint, self.identity, anew=True)
        assignment = Assignment(job, state, TrainingData.of(job, data, others), self.channel, self.placement)
        recipe = Recipe(assignment, Peers(), lambda _: None)
        checkpoints = JobCheckpoints(run.storage, keep=job.checkpoint.keep, best_by=job.best_by)
        with disk_errors(str(self.folder)):
            folder = Path(tempfile.mkdtemp(dir=self.folder))
        checkpoint = folder if checkpoints.restore(folder) is not None else None
        if checkpoint is None:
            shutil.rmtree(folder)
        return Ready(order, recipe, data.fingerprint, signer, checkpoints, checkpoint, run, began)


def _check_free(run: Storage) -> None:
    """Leave a run alone that somebody trains by itself; one who may be lost is waited for.

    Raises:
        TrainingError: somebody is at work on it.
        StorageError: the store failed.
    """
    give_up_at = time.monotonic() + EXPIRES_S
    first: int | None = None
    while (entry := newest_entry(run)) is not None:
        old = time.time() > entry.written_at + _CLOCKS_DIFFER_S + EXPIRES_S
        if entry.holder.released or entry.holder.alive() is False or old or time.monotonic() > give_up_at:
            return
        if entry.holder.alive() or first not in (None, entry.number):
            raise TrainingError(
                f"{run.uri}: {entry.holder} trains this job by itself; wait until it has ended, or end it, "
                "and run the same command with --retry-failed"
            )
        first = entry.number
        time.sleep(_LOOK_AGAIN_S)


class _Closed(Exception):
    """Nobody wants the job any more."""


class Intake:
    """Keeps the slots of a lane filled with jobs of the base that it holds."""

    def __init__(
        self, attendance: Attendance, blame: Blame, base: str, slots: int, prepare: Callable[[Order], Ready]
    ) -> None:
        """Nothing is taken yet.

        Args:
            attendance: the lane at its desk.
            blame: decides on what `prepare` raises.
            base: that the lane holds.
            slots: jobs that it can train at once.
            prepare: makes a job ready.
        """
        self._attendance = attendance
        self._blame = blame
        self._base = base
        self._prepare = prepare
        self._free = slots
        """Slots for which nothing was taken yet."""
        self._ready: list[Ready] = []
        self._changed = threading.Condition()
        self._closed = False
        self._end: Taken | None = None
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
        self._thread.join()

    def close(self) -> None:
        """Take no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def end(self) -> Taken | None:
        """Why no more jobs of the base come; None as long as some may."""
        return self._end

    def next_ready(self) -> Ready | None:
        """One that can begin now."""
        with self._changed:
            return self._ready.pop(0) if self._ready else None

    def wait(self, timeout_s: float) -> None:
        """Until a job is ready or none comes any more, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._end is not None, timeout_s)

    def left(self, slots: int = 1) -> None:
        """Slots are free again."""
        with self._changed:
            self._free += slots
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while not self._closed:
                if self._free and self._ask():
                    return
                with self._changed:
                    self._changed.wait(_ASK_AGAIN_S)
        except _Closed:
            return
        except BaseException as error:  # noqa: BLE001  it concerns the lane, which raises it where it checks
            self._attendance.trouble(error)

    def _ask(self) -> bool:
        """Take what is to be had, and prepare it; whether nothing more will come."""
        taken = self._attendance.desk.take(self._attendance.lane, self._base, self._free)
        if taken.lost:
            self._attendance.lost()
        if taken.lost or taken.ended or taken.switch_to is not None:
            with self._changed:
                self._end = taken
                self._changed.notify_all()
            return True
        with self._changed:
            self._free -= len(taken.orders)
        for order in taken.orders:
            if self._closed:
                break
            self._make_ready(order)
        return False

    def _make_ready(self, order: Order) -> None:
        try:
            ready = self._blame.insist(lambda: self._prepare(order), self._pause)
        except _Closed:
            raise
        except BaseException as error:  # noqa: BLE001  libraries of other languages raise their own
            self._blame.settle(order.job.name, error)
            self.left()
            return
        with self._changed:
            self._ready.append(ready)
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)
        if self._closed:
            raise _Closed
        self._attendance.check()
