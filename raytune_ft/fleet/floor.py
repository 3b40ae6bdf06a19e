"""The jobs that a lane trains at the moment: how each begins, and how it ends."""

import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray.exceptions

from raytune_ft.errors import OutOfMemory, RunHeld
from raytune_ft.fleet.attendance import Attendance, DeskGone, JobEvents, LeaseLost, reason_of
from raytune_ft.fleet.intake import Intake, Ready
from raytune_ft.fleet.keeping import JobKeeping
from raytune_ft.fleet.resident import Resident, free_device
from raytune_ft.train.loop import Trainee
from raytune_ft.train.peers import Peers
from raytune_ft.train.recipe import Trained
from raytune_ft.train.recorder import Recorder
from raytune_ft.train.workbench import Workbench

_POLL_S = 0.2
_ASK_NODE_EVERY_S = 2.0
_MOST_LOSSES = 300
"""Points of a curve that is told at the end."""
_OF_THE_LANE = (ray.exceptions.RayError, RunHeld, LeaseLost, DeskGone)
"""What a job may meet with and is not to blame for."""


class Preempted(Exception):
    """The lane's node will be taken away, and its jobs are kept."""


@dataclass
class _Seat:
    """A job that is trained."""

    ready: Ready
    bench: Workbench
    keeping: JobKeeping
    recorder: Recorder
    open: ExitStack = field(default_factory=ExitStack)
    """What reads its data."""

    @property
    def name(self) -> str:
        return self.ready.order.job.name


class _NodeWarnings:
    """Tells one job that the lane's node will go."""

    def __init__(self, floor: "Floor") -> None:
        self._floor = floor
        self._told = False

    def new(self, step: int) -> bool:
        """See `raytune_ft.train.recorder.Warnings`."""
        del step
        found = self._floor.leaving and not self._told
        self._told |= found
        return found


class Floor:
    """Seats the jobs that are ready, and publishes those that are trained."""

    def __init__(
        self,
        attendance: Attendance,
        resident: Resident,
        intake: Intake,
        threads: Executor,
        folder: Path,
        *,
        may_publish: Callable[[], None],
        node_goes: Callable[[], bool],
    ) -> None:
        """Nobody is seated yet.

        Args:
            attendance: the lane at its desk.
            resident: the base.
            intake: where jobs come from.
            threads: of the lane, for what the store takes.
            folder: of this machine.
            may_publish: asked before; raises where another driver has taken over.
            node_goes: whether a notice has come that the lane's node will be taken away.
        """
        self._attendance = attendance
        self._resident = resident
        self._intake = intake
        self._threads = threads
        self._folder = folder
        self._may_publish = may_publish
        self._node_goes = node_goes
        self._seats: dict[str, _Seat] = {}
        self._asked_node_at = time.monotonic()
        self.leaving = False
        """The node will go: every job keeps a checkpoint after its next step."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for seat in self._seats.values():
            seat.open.close()
            self._resident.leave(seat.bench)

    def offer(self, training: int) -> list[Trainee]:
        """Who joins those that train; see `raytune_ft.train.loop.Offer`.

        Raises:
            LeaseLost: the lane has to drop all its jobs.
            Preempted: it has to go.
            Exception: a thread of the lane met with something that concerns all jobs.
        """
        while True:
            self._attendance.check()
            self._heed_node()
            # In this order: who is ready was so before none came any more.
            over = self._intake.end is not None
            joining = [
                trainee for ready in self._intake.take_ready() if (trainee := self._seat(ready)) is not None
            ]
            if joining or training or over:
                return joining
            self._intake.wait(_POLL_S)

    def give_way(self, error: OutOfMemory) -> None:
        """Make room after a pass did not fit: a job by itself fails.

        Raises:
            OutOfMemory: of several jobs nobody knows whose fault it was; from now on there are half as many.
        """
        seated = list(self._seats.values())
        if len(seated) > 1:
            self._resident.set_slots(len(seated) // 2)
            raise error
        for seat in seated:
            self._leave(seat, error)
        error.__traceback__ = None
        free_device()

    def _heed_node(self) -> None:
        if self.leaving:
            # Every job has done a step since, and its checkpoint is on its way.
            for seat in self._seats.values():
                seat.keeping.drain()
            raise Preempted
        now = time.monotonic()
        if now - self._asked_node_at >= _ASK_NODE_EVERY_S:
            self._asked_node_at = now
            self.leaving = self._node_goes()

    def _seat(self, ready: Ready) -> Trainee | None:
        """Let a job begin; None where it cannot."""
        try:
            bench = self._resident.bench(ready.order.job, ready.fingerprint, ready.checkpoint)
            try:
                return self._begin(ready, bench)
            except BaseException:
                self._resident.leave(bench)
                raise
        except Exception as error:  # noqa: BLE001  whatever it is, it ends this job and no other
            self._fail(ready, error)
            self._intake.left()
            return None
        finally:
            if ready.checkpoint is not None:
                shutil.rmtree(ready.checkpoint, ignore_errors=True)

    def _begin(self, ready: Ready, bench: Workbench) -> Trainee:
        job, recipe = ready.order.job, ready.recipe
        position = recipe.begin(bench, ready.checkpoint)
        keeping = JobKeeping(
            ready.checkpoints,
            self._threads,
            self._folder,
            may_write=self._attendance.check,
            on_kept=lambda step: self._attendance.kept(job.name, step),
        )
        tokens = sum(entry["tokens"] for entry in position.history)
        recorder = Recorder(
            bench.engine,
            position,
            recipe.total_steps,
            job.checkpoint.every_steps,
            JobEvents(self._attendance, job.name, tokens),
            lambda: recipe.validate(bench),
            Peers(),
            recipe.ledger.to_json,
            keeping,
            _NodeWarnings(self),
        )
        desk, lane = self._attendance.desk, self._attendance.lane
        desk.started(lane, job.name, position.step, recipe.total_steps)
        seat = _Seat(ready, bench, keeping, recorder)
        steps = seat.open.enter_context(recipe.steps(bench.layout, position.step))
        self._seats[job.name] = seat
        return Trainee(
            bench.engine,
            steps,
            position.step,
            recipe.learning_rate,
            recorder,
            lambda reason: self._leave(seat, reason),
        )

    def _leave(self, seat: _Seat, reason: Exception | None) -> None:
        """A job has ended: done where there is no reason."""
        seat.open.close()
        trained: Trained | None = None
        if reason is None:
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            try:
                trained = seat.ready.recipe.finish(seat.bench, seat.recorder.finish(), folder)
            except Exception as error:  # noqa: BLE001  whatever it is, it ends this job and no other
                reason = error
                shutil.rmtree(folder, ignore_errors=True)
        del self._seats[seat.name]
        self._resident.leave(seat.bench)
        if trained is not None:
            self._threads.submit(self._publish, seat.ready, trained)
        elif reason is not None:
            self._fail(seat.ready, reason)
        self._intake.left()

    def _publish(self, ready: Ready, trained: Trained) -> None:
        """In a thread, since the others train meanwhile. The slot is free already."""
        try:
            self._may_publish()
            result = ready.recipe.publish(trained, ready.signer, time.perf_counter() - ready.began)
            ready.run.finish(result, ready.order.inputs)
            desk, lane = self._attendance.desk, self._attendance.lane
            desk.done(lane, ready.order.job.name, result, _curve(trained.position.history))
        except Exception as error:  # noqa: BLE001  whatever it is, it ends this job and no other
            self._fail(ready, error)
        finally:
            shutil.rmtree(trained.folder, ignore_errors=True)

    def _fail(self, ready: Ready, error: Exception) -> None:
        if isinstance(error, _OF_THE_LANE):
            self._attendance.trouble(error)
            return
        try:
            self._attendance.desk.failed(self._attendance.lane, ready.order.job.name, reason_of(error))
        except Exception as trouble:  # noqa: BLE001  raised again where the lane checks
            self._attendance.trouble(trouble)


def _curve(history: list[dict[str, Any]]) -> tuple[tuple[int, float], ...]:
    """(step, loss) of at most so many steps as are told, the last one among them."""
    stride = -(-len(history) // _MOST_LOSSES)
    chosen = history[:: -max(1, stride)][::-1]
    return tuple((entry["step"], entry["loss"]) for entry in chosen)
