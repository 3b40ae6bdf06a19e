"""How jobs come to a lane: taken and prepared in a thread, while others train."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import ray.exceptions

from raytune_ft.catalog import Signer
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.prepare import prepare, read_other_tasks
from raytune_ft.errors import DataError
from raytune_ft.fleet.attendance import Attendance, reason_of
from raytune_ft.fleet.checkpoints import JobCheckpoints
from raytune_ft.fleet.desk import Order, Taken
from raytune_ft.train.assignment import Assignment, TrainingData
from raytune_ft.train.peers import Peers
from raytune_ft.train.placement import Placement
from raytune_ft.train.publish import signer_of
from raytune_ft.train.recipe import Recipe
from raytune_ft.train.run import Run, name_inputs

_ASK_AGAIN_S = 0.3
"""Where nothing was to be had: another lane may be lost, or a job of another base be the last."""


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
            StorageError: the store failed.
        """
        job, began = order.job, time.perf_counter()
        # Before any work: the key is in the environment of this node, which the driver cannot see.
        signer = signer_of(job)
        data = prepare(job, tokenizer=self.encoder, cache=self.cache, here=True)
        others = read_other_tasks(job, tokenizer=self.encoder, cache=self.cache, here=True)
        found = name_inputs(data.fingerprint, self.identity, others.fingerprint if others else None)
        if found != order.inputs:
            raise DataError(
                f"{job.name}: its data or its base changed after the fleet had begun; run the same command "
                "again, and it is trained on what is there then"
            )
        run = Run(job)
        state = run.begin(data.fingerprint, self.identity, anew=True)
        assignment = Assignment(job, state, TrainingData.of(job, data, others), self.channel, self.placement)
        recipe = Recipe(assignment, Peers(), lambda _: None)
        checkpoints = JobCheckpoints(run.storage, job.checkpoint)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        checkpoint = folder if checkpoints.restore(folder) is not None else None
        if checkpoint is None:
            shutil.rmtree(folder)
        return Ready(order, recipe, data.fingerprint, signer, checkpoints, checkpoint, run, began)


class Intake:
    """Keeps the slots of a lane filled with jobs of the base that it holds."""

    def __init__(
        self, attendance: Attendance, base: str, slots: int, prepare: Callable[[Order], Ready]
    ) -> None:
        """Nothing is taken yet.

        Args:
            attendance: the lane at its desk.
            base: that the lane holds.
            slots: jobs that it can train at once.
            prepare: makes a job ready; what it raises ends that job alone.
        """
        self._attendance = attendance
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def end(self) -> Taken | None:
        """Why no more jobs of the base come; None as long as some may."""
        return self._end

    def take_ready(self) -> list[Ready]:
        """Those that can begin now."""
        with self._changed:
            found, self._ready = self._ready, []
        return found

    def wait(self, timeout_s: float) -> None:
        """Until a job is ready or none comes any more, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._end is not None, timeout_s)

    def left(self) -> None:
        """A slot is free again."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while not self._closed:
                if self._free and self._ask():
                    return
                with self._changed:
                    self._changed.wait(_ASK_AGAIN_S)
        except Exception as error:  # noqa: BLE001  it concerns the lane, which raises it where it checks
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
            ready = self._prepare(order)
        except ray.exceptions.RayError:
            # Something was lost beside the job.
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, it ends this job and no other
            self._attendance.desk.failed(self._attendance.lane, order.job.name, reason_of(error))
            self.left()
            return
        with self._changed:
            self._ready.append(ready)
            self._changed.notify_all()
