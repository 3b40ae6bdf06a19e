"""Ray Train's run, without the processes beside its workers that would serve nobody.

Each of them takes seconds of a run's begin, and wakes a hundred times a second as long as it lasts.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import ray
import ray.exceptions
import ray.train
from ray import PlacementGroupID
from ray._private.state import state as cluster_state
from ray.actor import ActorHandle
from ray.core.generated import gcs_pb2
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

_T = TypeVar("_T")


class Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray is not typed
    """A run of Ray Train whose workers read their data by themselves."""

    def __init__(self, work: Callable[[_T], Any], order: _T, *, own_cluster: bool, **given: Any) -> None:
        """Start nothing yet.

        Args:
            work: what each worker does.
            order: what it is given. The controller does not unpickle it, which would import what it is.
            own_cluster: nobody else uses the cluster, it does not grow, and it was started by this process
                and ends with it.
            given: see `DataParallelTrainer`.
        """
        super().__init__(partial(work, order), **given)
        self._own_cluster = own_cluster

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        # An actor that divides data sets among the workers, also where there are none; and one that outlives
        # controller and driver, to give back to others what the workers had.
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if self._own_cluster else (DatasetsCallback,)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]

    def _initialize_and_run_controller(self, **given: Any) -> ray.train.Result:
        result: ray.train.Result
        if not self._own_cluster:
            result = super()._initialize_and_run_controller(**given)
            return result
        if not self.scaling_config.elasticity_enabled:
            given["scaling_policy"] = _NoneToAsk(self.scaling_config)
        # As above, without variables of its own: it has those of this process anyway, and with others it
        # could not take one of the processes that Ray holds ready.
        controller = ray.remote(num_cpus=0)(TrainController).remote(**given)
        try:
            ray.get(controller.run.remote())
            result = ray.get(controller.get_result.remote())
        except ray.exceptions.RayActorError:
            _free_groups_of(controller)
            raise
        return result


def _free_groups_of(controller: ActorHandle) -> None:
    """Give the cluster back what a controller reserved that is lost; Ray waits for the end of its driver."""
    accessor = cluster_state._connect_and_get_accessor()
    for known in accessor.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(known)
        if group.creator_actor_id == controller._actor_id.binary():
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


class _NoneToAsk(FixedScalingPolicy):  # type: ignore[misc]  # Ray is not typed
    """Does not tell an autoscaler what the run needs: there is none."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


def start_fit(trainer: Trainer) -> "Future[ray.train.Result]":
    """Run the trainer in a thread of its own.

    `fit` blocks, and in the main thread it would also take over Ctrl-C.
    """
    ended: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            ended.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001  raised again where the result is asked for
            ended.set_exception(error)

    threading.Thread(target=fit, name="fit", daemon=True).start()
    return ended
