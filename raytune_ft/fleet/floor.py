"""The jobs that a lane trains at the moment: how each begins, and how it ends."""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from raytune_ft.errors import OutOfMemory, TrainingError
from raytune_ft.fleet.attendance import Attendance, JobEvents
from raytune_ft.fleet.blame import Blame, UnusableCheckpoint, reading_checkpoint
from raytune_ft.fleet.intake import Intake, Ready
from raytune_ft.fleet.keeping import JobKeeping
from raytune_ft.fleet.resident import Resident, free_device
from raytune_ft.storage import disk_errors
from raytune_ft.train.batch import Step
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.faults import fault_of_device
from raytune_ft.train.loop import Trainee
from raytune_ft.train.peers import Peers
from raytune_ft.train.recipe import Trained
from raytune_ft.train.recorder import Recorder
from raytune_ft.train.selection import check_best
from raytune_ft.train.workbench import Workbench

_POLL_S = 0.2
_ASK_NODE_EVERY_S = 2.0
_PUBLISH_S = 10.0
"""How long a lane that has to go waits for what it publishes; another can publish it, too."""
_MOST_LOSSES = 300
"""Points of a curve that is told at the end."""


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
        return self.ready.name


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
        blame: Blame,
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
            blame: decides on what jobs meet with.
            resident: the base.
            intake: where jobs come from.
            threads: of the lane, for what the store takes.
            folder: of this machine.
            may_publish: asked before; raises where another driver has taken over.
            node_goes: whether a notice has come that the lane's node will be taken away.
        """
        self._attendance = attendance
        self._blame = blame
        self._resident = resident
        self._intake = intake
        self._threads = threads
        self._folder = folder
        self._may_publish = may_publish
        self._node_goes = node_goes
        self._seats: dict[str, _Seat] = {}
        self._entering: Ready | None = None
        """A job on its way to a seat."""
        self._publishing: list[Future[None]] = []
        self._asked_node_at = time.monotonic()
        self.leaving = False
        """The node will go: every job keeps a checkpoint after its next step."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        for seat in self._seats.values():
            seat.open.close()
            self._resident.leave(seat.bench)

    def offer(self, training: int) -> list[Trainee]:
        """Who joins those that train; see `raytune_ft.train.loop.Offer`.

        Raises:
            LeaseLost: the lane has to drop all its jobs.
            Preempted: it has to go.
            OutOfMemory: a job that was to join does not fit; see `give_way`.
            Exception: a thread of the lane met with something that concerns all jobs.
        """
        joining: list[Trainee] = []
        while True:
            self._attendance.check()
            if self._has_notice():
                if not training or self.leaving:
                    self._go()
                # Nobody joins: the others' checkpoints come first.
                self.leaving = True
                self._intake.close()
                return []
            # In this order: who is ready was so before none came any more.
            over = self._intake.end is not None
            while (ready := self._intake.next_ready()) is not None:
                if (trainee := self._seat(ready)) is not None:
                    joining.append(trainee)
            if joining or training or over:
                return joining
            self._intake.wait(_POLL_S)

    def give_way(self, error: OutOfMemory) -> None:
        """Make room after the device's memory was full: a job by itself does not fit it.

        Raises:
            OutOfMemory: of several jobs nobody knows whose fault it was; from now on there are half as many.
        """
        seated, entering = list(self._seats.values()), self._entering
        jobs = len(seated) + (entering is not None)
        if jobs > 1:
            self._resident.set_slots(jobs // 2)
            raise error
        for seat in seated:
            self._leave(seat, error)
        if entering is not None:
            self._entering = None
            self._blame.settle(entering.name, error)
            self._free_slot()
        error.__traceback__ = None
        free_device()

    def _has_notice(self) -> bool:
        now = time.monotonic()
        if not self.leaving and now - self._asked_node_at >= _ASK_NODE_EVERY_S:
            self._asked_node_at = now
            return self._node_goes()
        return self.leaving

    def _go(self) -> None:
        # Every job has done a step since, and its checkpoint is on its way.
        for seat in self._seats.values():
            seat.keeping.drain()
        wait(self._publishing, _PUBLISH_S)
        self._attendance.beat()
        # At once: the lane may not live to see its threads end.
        reason = "its node will be taken away"
        self._attendance.desk.lose(self._attendance.lane, announced=True, reason=reason)
        raise Preempted

    def _seat(self, ready: Ready) -> Trainee | None:
        """Let a job begin; None where it cannot."""
        self._entering = ready
        trainee: Trainee | None = None
        try:
            trainee = self._seat_at(ready)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  libraries of other languages raise their own
            if (fault := fault_of_device(error)) is not None:
                raise fault from None
            self._blame.settle(ready.name, error)
            self._free_slot()
        finally:
            if ready.checkpoint is not None:
                shutil.rmtree(ready.checkpoint, ignore_errors=True)
        self._entering = None
        return trainee

    def _seat_at(self, ready: Ready) -> Trainee:
        """Let a job begin where its newest checkpoint stands of which any use can be made."""
        folder = ready.checkpoint
        while True:
            bench = None
            try:
                bench = self._resident.bench(ready.order.job, ready.fingerprint, ready.checkpoint)
                return self._begin(ready, bench)
            except BaseException as error:
                if bench is not None:
                    self._resident.leave(bench)
                if not isinstance(error, UnusableCheckpoint) or folder is None:
                    raise
                logging.getLogger(__name__).warning("%s: left a checkpoint out: %s", ready.name, error)
            step = ready.checkpoints.restore_older(folder)
            ready = replace(ready, checkpoint=None if step is None else folder)

    def _begin(self, ready: Ready, bench: Workbench) -> Trainee:
        job, recipe = ready.order.job, ready.recipe
        position = self._begin_recipe(ready, bench)
        keeping = JobKeeping(
            ready.checkpoints,
            self._threads,
            self._folder,
            may_write=self._attendance.may_write,
            on_kept=lambda step: self._attendance.kept(job.name, step),
        )
        check_best(position.history, job.best_by, keeping.kept)
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
            best_by=job.best_by,
            stopping=job.schedule.early_stopping,
        )
        desk, lane = self._attendance.desk, self._attendance.lane
        # A job that goes on was told of when it began.
        notices = () if position.step else recipe.counts["notices"]
        desk.started(lane, job.name, position.step, recipe.total_steps, notices)
        seat = _Seat(ready, bench, keeping, recorder)
        steps = seat.open.enter_context(recipe.steps(bench.layout, position.step))
        self._seats[job.name] = seat
        return Trainee(
            bench.engine,
            recorder.until_stopped(_without_panics(steps)),
            position.step,
            recipe.learning_rate,
            recorder,
            lambda reason: self._leave(seat, reason),
        )

    def _begin_recipe(self, ready: Ready, bench: Workbench) -> Position:
        if ready.checkpoint is None:
            return ready.recipe.begin(bench, None)
        with reading_checkpoint():
            return ready.recipe.begin(bench, ready.checkpoint)

    def _leave(self, seat: _Seat, reason: BaseException | None) -> None:
        """A job has ended: done where there is no reason.

        Raises:
            OutOfMemory, DeviceFailed: what is still to be done with it, the device does not do.
        """
        seat.open.close()
        trained: Trained | None = None
        if reason is None:
            try:
                trained = self._finish(seat)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001  the same
                if (fault := fault_of_device(error)) is not None:
                    raise fault from None
                reason = error
        del self._seats[seat.name]
        self._resident.leave(seat.bench)
        if trained is not None:
            under_way = [one for one in self._publishing if not one.done()]
            self._publishing = [*under_way, self._threads.submit(self._publish, seat.ready, trained)]
        elif reason is not None:
            self._blame.settle(seat.name, reason)
        self._free_slot()

    def _finish(self, seat: _Seat) -> Trained | None:
        with disk_errors(str(self._folder)):
            folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            position = seat.recorder.finish()
            return seat.ready.recipe.finish(seat.bench, position, folder, seat.keeping.fetch)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _free_slot(self) -> None:
        """A job has left. If it was found to need the lane for itself, others have as much room as before."""
        freed, planned = 1, self._resident.plan.slots
        if self._resident.slots == 1 < planned and not self._seats:
            freed = planned
            self._resident.set_slots(planned)
        self._intake.left(freed)

    def _publish(self, ready: Ready, trained: Trained) -> None:
        """In a thread, since the others train meanwhile. The slot is free already."""

        def publish() -> dict[str, Any]:
            self._may_publish()
            result = ready.recipe.publish(trained, ready.signer, time.perf_counter() - ready.began)
            ready.run.finish(result, ready.order.inputs)
            return result

        try:
            result = self._blame.insist(publish, self._pause)
            desk, lane = self._attendance.desk, self._attendance.lane
            desk.done(lane, ready.name, result, _curve(trained.position.history))
        except BaseException as error:  # noqa: BLE001  libraries of other languages raise their own
            self._blame.settle(ready.name, error)
        finally:
            shutil.rmtree(trained.folder, ignore_errors=True)

    def _pause(self, seconds: float) -> None:
        self._attendance.check()
        time.sleep(seconds)


def _without_panics(steps: Iterator[Step]) -> Iterator[Step]:
    """Steps whose failures are a job's own. A library of another language raises what ends a process."""
    while True:
        try:
            step = next(steps)
        except StopIteration:
            return
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as panic:
            raise TrainingError(f"reading its data failed: {type(panic).__name__}: {panic}") from panic
        yield step


def _curve(history: list[dict[str, Any]]) -> tuple[tuple[int, float], ...]:
    """(step, loss) of at most so many steps as are told, the last one among them."""
    stride = -(-len(history) // _MOST_LOSSES)
    chosen = history[:: -max(1, stride)][::-1]
    return tuple((entry["step"], entry["loss"]) for entry in chosen)
