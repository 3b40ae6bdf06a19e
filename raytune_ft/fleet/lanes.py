"""The lanes of a fleet as its driver sees them: Ray Train runs of one worker each, watched and replaced."""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray._private.state import state as cluster_state
from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from raytune_ft.errors import DeviceFailed, RaytuneError, RunHeld, StorageError, TrainingError
from raytune_ft.fleet.attendance import DeskGone, LaneUnfit, LeaseLost
from raytune_ft.fleet.desk import Cause, Stepped, Taken
from raytune_ft.spec import ClusterSpec
from raytune_ft.storage import arrow_filesystem, join_uri, open_storage
from raytune_ft.train.budgets import cause
from raytune_ft.train.placement import Placement, place
from raytune_ft.train.room import TOLD_AFTER_S, Tell, find_room
from raytune_ft.train.trainer import Trainer, start_fit

LANES = "lanes/"
"""What Ray Train writes of a lane's run; nothing of it is ever read."""
CHANNEL_CHARACTERS = 8
"""Of the launch, at the beginning of their names."""
_NEARLY = 1e-6


@dataclass(frozen=True)
class LaneOrder:
    """All that the driver tells a lane."""

    name: str
    desk: Any
    """The actor."""
    placement: Placement
    fleet_uri: str
    channel: str
    cache: bool


def lane_worker(order: LaneOrder) -> RaytuneError | None:
    """Entry for Ray Train. Errors are returned: what Ray would make of them says less."""
    # Driver and controller unpickle what stands in this module, and have no use for torch.
    from raytune_ft.fleet.lane import Lane

    try:
        Lane(
            order.name,
            RemoteDesk(order.desk),
            order.placement,
            open_storage(order.fleet_uri),
            order.channel,
            cache=order.cache,
            node_goes=_node_goes,
        ).run()
    except DeskGone:
        return None
    except RaytuneError as error:
        return error
    except ray.exceptions.RayError:
        # Something was lost beside this worker.
        raise
    except Exception as error:
        logging.getLogger(__name__).exception("the lane failed")
        reason = str(error).strip().partition("\n")[0][:300]
        return TrainingError(f"the lane failed: {type(error).__name__}: {reason}")
    return None


def _node_goes() -> bool:
    info = ray.train.get_preemption_info()
    return bool(info and info.preempted_node_ids)


class RemoteDesk:
    """The desk, from a lane's process; see `raytune_ft.fleet.attendance.DeskDoor`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def join(self, lane: str, host: str, device: str) -> None:
        self._ask("join", lane, host, device)

    def take(self, lane: str, base: str | None, free: int) -> Taken:
        taken: Taken = self._ask("take", lane, base, free)
        return taken

    def loaded(self, lane: str, base: str, slots: int, seconds: float) -> None:
        self._ask("loaded", lane, base, slots, seconds)

    def cannot_load(self, lane: str, base: str, reason: str) -> bool:
        return bool(self._ask("cannot_load", lane, base, reason))

    def started(self, lane: str, job: str, step: int, steps: int, notices: Sequence[str]) -> None:
        self._ask("started", lane, job, step, steps, notices)

    def beat(self, lane: str, steps: Mapping[str, Stepped], checkpoints: Mapping[str, int]) -> bool:
        return bool(self._ask("beat", lane, steps, checkpoints))

    def done(
        self, lane: str, job: str, result: dict[str, Any], losses: tuple[tuple[int, float], ...]
    ) -> bool:
        return bool(self._ask("done", lane, job, result, losses))

    def failed(self, lane: str, job: str, reason: str) -> bool:
        return bool(self._ask("failed", lane, job, reason))

    def give_back(self, lane: str, job: str, reason: str, *, alone: bool) -> bool:
        return bool(self._ask("give_back", lane, job, reason, alone=alone))

    def end(self, lane: str) -> None:
        self._ask("end", lane)

    def lose(self, lane: str, *, announced: bool, reason: str) -> None:
        self._ask("lose", lane, announced=announced, reason=reason)

    def _ask(self, method: str, *given: Any, **named: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, method).remote(*given, **named))
        except ray.exceptions.ActorDiedError:
            raise DeskGone from None
        except ray.exceptions.ActorUnavailableError:
            # Whether it heard is not known, and jobs leased in an answer that was lost would be nobody's:
            # the lane gives all of them back, and joins again.
            raise LeaseLost(method) from None


def place_lanes(device: str, most: int, wait_s: float, tell: Tell) -> Placement:
    """What each lane gets of the cluster, as it is now or as an autoscaler makes it in time.

    Args:
        device: `cluster.device` of the jobs.
        most: lanes that there may be.
        wait_s: how long to wait for a first GPU.
        tell: hears of waiting.

    Raises:
        BadInput: there is no GPU, also after `wait_s` seconds.
    """
    cluster = ClusterSpec.model_validate({"device": device})
    first = find_room(cluster, wait_s, tell)
    if first.use_gpu:
        return first
    nodes = _nodes()
    cpus = int(sum(node.get("CPU", 0.0) for node in nodes))
    return place(cluster.model_copy(update={"workers": max(1, min(most, cpus))}), nodes)


def room_for(needs: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many lanes nodes have room for, when nobody else is there.

    >>> room_for({"CPU": 0.75}, [{"CPU": 2.0}, {"CPU": 1.0}, {"GPU": 1.0}])
    3
    """
    return sum(
        min(int(node.get(name, 0.0) / need + _NEARLY) for name, need in needs.items() if need)
        for node in nodes
    )


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@dataclass
class _Run:
    """A lane's run, until its process is gone."""

    name: str
    ended: "Future[ray.train.Result]"
    began: float
    likely: bool
    """It will find room, as far as is known."""


class Lanes:
    """The lanes that are at work or on their way.

    A lane that is lost is not restarted by Ray Train, but replaced: whose jobs go on where, and how often, is
    for the queue to say.
    """

    def __init__(
        self,
        desk: Any,
        placement: Placement,
        fleet_uri: str,
        channel: str,
        *,
        cache: bool,
        own_cluster: bool,
        tell: Tell,
    ) -> None:
        """Start none yet; see `LaneOrder` for what they are told, and `Trainer` for `own_cluster`."""
        self._desk = desk
        self._placement = placement
        self._fleet_uri = fleet_uri
        self._channel = channel
        self._cache = cache
        self._own_cluster = own_cluster
        self._tell = tell
        self._runs: list[_Run] = []
        self._numbers = count(1)
        self._told = False
        self._full = False
        """A lane found no room."""

    def __len__(self) -> int:
        return len(self._runs)

    def look(self) -> None:
        """Tell the desk of lanes that are gone.

        Raises:
            RunHeld: another driver has taken over the fleet.
        """
        gone = [run for run in self._runs if run.ended.done()]
        self._runs = [run for run in self._runs if not run.ended.done()]
        for run in gone:
            loss = _loss(run.ended)
            if loss is None:
                continue
            # One that found no room in time was never there; another may find some.
            self._full |= loss.for_room
            if not loss.for_room:
                self._desk.lose_attempts.remote(
                    run.name, announced=loss.announced, reason=loss.reason, cause=loss.cause
                )

    def start(self, most: int) -> None:
        """Start lanes, until there are `most` or as many as the cluster has or could have room for."""
        wanted = min(most, max(1, self._room()))
        for _ in range(wanted - len(self._runs)):
            self._start()
        self._desk.expect.remote([run.name for run in self._runs if run.likely])

    def tell_waiting(self, *, joined: bool) -> None:
        """Say once that all lanes wait for others to leave the cluster; `joined`: one of them has room."""
        if joined:
            self._told = True
        if self._told or not self._runs or time.monotonic() < self._runs[0].began + TOLD_AFTER_S:
            return
        self._told = True
        needs = " and ".join(f"{need:g} {name}" for name, need in self._placement.resources.items())
        self._tell({"phase": f"Waiting for room in the cluster: a lane needs {needs}"})

    def wait(self, timeout_s: float) -> None:
        """Until all that are at work have ended, or the time is over."""
        give_up_at = time.monotonic() + timeout_s
        while self._runs and time.monotonic() < give_up_at:
            time.sleep(0.1)
            self.look()

    def _room(self) -> int:
        needs = self._placement.resources
        grown = cluster_state.get_max_resources_from_cluster_config()
        return max(room_for(needs, _nodes()), room_for(needs, [grown]) if grown else 0)

    def _start(self) -> None:
        name = f"lane-{next(self._numbers)}"
        order = LaneOrder(name, self._desk, self._placement, self._fleet_uri, self._channel, self._cache)
        filesystem, path = arrow_filesystem(join_uri(self._fleet_uri, LANES.rstrip("/")))
        trainer = Trainer(
            lane_worker,
            order,
            own_cluster=self._own_cluster,
            scaling_config=ScalingConfig(
                num_workers=1,
                use_gpu=self._placement.use_gpu,
                resources_per_worker=self._placement.resources,
            ),
            backend_config=BackendConfig(),
            run_config=RunConfig(
                name=f"{self._channel[:CHANNEL_CHARACTERS]}-{name}",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=0
                ),
            ),
        )
        self._runs.append(_Run(name, start_fit(trainer), time.monotonic(), likely=not self._full))


def _preempted(error: Exception) -> bool:
    """Whether Ray knows that the node was taken away, though no notice came in time."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    # What a health check met with is wrapped.
    found = [getattr(failure, "health_check_failure", failure) for failure in failures]
    return any(isinstance(one, ray.exceptions.RayActorError) and one.preempted for one in found)


@dataclass(frozen=True)
class _Loss:
    """How a lane's process ended, where it should not have."""

    reason: str
    announced: bool = False
    for_room: bool = False
    """It never began: there was no room for it."""
    cause: Cause = "unknown"


def _loss(ended: "Future[ray.train.Result]") -> _Loss | None:
    """What became of a lane's process; None where it came to its end.

    Raises:
        RunHeld: another driver has taken over the fleet.
    """
    try:
        returned = ended.result().return_value
    except PreemptionError:
        return _Loss("its node was taken away", announced=True)
    except ControllerError as error:
        waited = isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)
        return _Loss(cause(error), for_room=waited)
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        return _Loss(cause(error), announced=_preempted(error))
    if isinstance(returned, RunHeld):
        raise returned
    if isinstance(returned, RaytuneError):
        return _Loss(str(returned), cause=_cause_of(returned))
    return None


def _cause_of(error: RaytuneError) -> Cause:
    if isinstance(error, StorageError):
        return "store"
    return "lane" if isinstance(error, LaneUnfit | DeviceFailed) else "unknown"
