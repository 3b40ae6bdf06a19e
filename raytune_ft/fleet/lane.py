"""A lane: one worker that holds a base, takes jobs of it from the desk, and trains them together.

Jobs enter and leave at step boundaries. A job that cannot be trained leaves alone, with its reason. All that
a job needs to be gone on with elsewhere is in the bucket; what a lane holds may be lost at any time.
"""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from itertools import count
from pathlib import Path

import torch

from raytune_ft.data.encoder import Encoder
from raytune_ft.errors import ModelError, OutOfMemory
from raytune_ft.fleet.attendance import Attendance, DeskDoor, LeaseLost
from raytune_ft.fleet.blame import Blame, may_load_elsewhere
from raytune_ft.fleet.desk import Taken
from raytune_ft.fleet.floor import Floor, Preempted
from raytune_ft.fleet.intake import Intake, Preparing
from raytune_ft.fleet.placement import Group
from raytune_ft.fleet.resident import Resident, free_device
from raytune_ft.fleet.scratch import scratch_folder
from raytune_ft.storage import Storage
from raytune_ft.train.lease import check_holds
from raytune_ft.train.loop import train
from raytune_ft.train.placement import Placement

_POLL_S = 0.2
_SENDERS = 4
_RECONNECT_S = 1.0


class Lane:
    """From joining the desk to the end of the fleet's work."""

    def __init__(
        self,
        name: str,
        desk: DeskDoor,
        placement: Placement,
        fleet_storage: Storage,
        channel: str,
        *,
        cache: bool = True,
        node_goes: Callable[[], bool] = lambda: False,
    ) -> None:
        """Hold nothing yet.

        Args:
            name: of the lane; what it joins under begins with it.
            desk: of the fleet.
            placement: what the lane has of its machine.
            fleet_storage: the fleet's folder, where its driver holds a lease.
            channel: names the launch of the driver.
            cache: keep tokenised data in the bucket, and take it from there.
            node_goes: whether a notice has come that the lane's node will be taken away.
        """
        self._name = name
        self._desk = desk
        self._placement = placement
        self._fleet_storage = fleet_storage
        self._channel = channel
        self._cache = cache
        self._node_goes = node_goes
        self._resident: Resident | None = None

    def run(self) -> None:
        """Train until the fleet has ended, or the lane has to go.

        Raises:
            DeskGone: the driver has ended.
            RunHeld: another driver has taken over the fleet.
            DeviceFailed: the device does not go on; another process may.
            ModelError: the base cannot be loaded here; another lane may.
            StorageError: the store is away, or the disk is full.
            RayError: something was lost beside the lane.
        """
        for attempt in count(1):
            name = self._name if attempt == 1 else f"{self._name}.{attempt}"
            try:
                with Attendance(
                    self._desk, name, socket.gethostname(), _device_name(self._placement)
                ) as attendance:
                    self._serve(attendance)
                self._desk.end(name)
                return
            except LeaseLost:
                # The desk knows it, unless it could not be reached.
                self._say_lost(name, "it could not reach the desk for a while")
            except OutOfMemory as error:
                self._say_lost(name, str(error))
                error.__traceback__ = None
                free_device()
            except Preempted:
                return

    def _say_lost(self, name: str, reason: str) -> None:
        """The jobs of a name are nobody's, and none is to blame. Waits for a desk that cannot be reached."""
        while True:
            with suppress(LeaseLost):
                self._desk.lose(name, announced=True, reason=reason)
                return
            time.sleep(_RECONNECT_S)

    def _serve(self, attendance: Attendance) -> None:
        """Hold one base after another, each as long as there is work for it."""
        following: Group | None = None
        while True:
            # After a lost lease there is one already.
            if self._resident is None:
                following = following or self._next_group(attendance)
                if following is None:
                    return
                self._load(attendance, following)
                following = None
                continue
            resident = self._resident
            self._desk.loaded(attendance.lane, resident.group.base, resident.slots, resident.load_seconds)
            end = self._train(attendance, resident)
            if end.ended:
                return
            # Two bases at a time may not fit.
            del resident
            self._resident, following = None, end.switch_to
            free_device()

    def _next_group(self, attendance: Attendance) -> Group | None:
        """The base to load first; None where no work is left."""
        while True:
            attendance.check()
            taken = self._desk.take(attendance.lane, None, 0)
            if taken.lost:
                raise LeaseLost(attendance.lane)
            if taken.ended:
                return None
            if taken.switch_to is not None:
                return taken.switch_to
            time.sleep(_POLL_S)

    def _load(self, attendance: Attendance, group: Group) -> None:
        """Load a base; where no lane can, all jobs of it fail.

        Raises:
            ModelError: it cannot be loaded here, and nobody knows yet whether elsewhere it can.
        """
        try:
            with attendance.standing_still():
                self._resident = Resident(group, self._placement)
        except ModelError as error:
            if may_load_elsewhere(error) or not self._desk.cannot_load(
                attendance.lane, group.base, str(error)
            ):
                raise

    def _train(self, attendance: Attendance, resident: Resident) -> Taken:
        """Train jobs of the base until no more come; why none do."""

        def ask_store() -> None:
            check_holds(self._fleet_storage, self._channel)

        blame = Blame(attendance, ask_store)
        with (
            scratch_folder() as folder,
            ThreadPoolExecutor(_SENDERS) as threads,
            self._intake(attendance, blame, resident, folder) as intake,
            Floor(
                attendance,
                blame,
                resident,
                intake,
                threads,
                folder,
                may_publish=ask_store,
                node_goes=self._node_goes,
            ) as floor,
        ):
            while True:
                try:
                    train(resident.bank, floor.offer)
                    break
                except OutOfMemory as error:
                    floor.give_way(error)
        attendance.check()
        end = intake.end
        if end is None or end.lost:
            raise LeaseLost(attendance.lane)
        return end

    def _intake(self, attendance: Attendance, blame: Blame, resident: Resident, folder: Path) -> Intake:
        preparing = Preparing(
            # A tokenizer does not bear two threads.
            Encoder.of(deepcopy(resident.tokenizer)),
            resident.identity,
            self._placement,
            self._channel,
            folder,
            self._cache,
        )
        return Intake(attendance, blame, resident.group.base, resident.slots, preparing.prepare)


def _device_name(placement: Placement) -> str:
    return torch.cuda.get_device_name() if placement.use_gpu else "cpu"
