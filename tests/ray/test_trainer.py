"""Which processes a run of Ray Train has beside its workers, and what a lost controller leaves."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import ray.train
from ray._private import state as cluster_state
from ray.train import FailureConfig, RunConfig, ScalingConfig

from raytune_ft.train.trainer import Trainer, start_fit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


COORDINATOR = "_AutoscalingCoordinatorActor"


def work(folder: Path) -> str:
    """Say where this is, and wait until it may go."""
    (folder / "worker").write_text(str(os.getpid()))
    while not (folder / "go").exists():
        time.sleep(0.05)
    return "went"


@pytest.fixture
def trainer_of(tmp_path: Path) -> Iterator[Callable[[bool], Trainer]]:
    """Makes the trainer of a run with one worker."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # the workers cannot import tests

    def make(own_cluster: bool) -> Trainer:
        return Trainer(
            work,
            tmp_path,
            own_cluster=own_cluster,
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1.5}),
            run_config=RunConfig(
                name="run",
                storage_path=str(tmp_path / "storage"),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )

    yield make
    ray.cloudpickle.unregister_pickle_by_value(module)


def until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up_at
        time.sleep(0.1)


def actors() -> dict[str, int]:
    """Process id of each actor that is alive, by its class."""
    found = cluster_state.actors().values()
    return {actor["ActorClassName"]: actor["Pid"] for actor in found if actor["State"] == "ALIVE"}


@pytest.mark.parametrize(("own_cluster", "others"), [(True, set()), (False, {"PlacementGroupCleaner"})])
def test_a_run_has_few_processes_beside_its_workers(
    trainer_of: Callable[[bool], Trainer], tmp_path: Path, own_cluster: bool, others: set[str]
) -> None:
    before = set(actors())
    ended = start_fit(trainer_of(own_cluster))
    until((tmp_path / "worker").exists)
    found = set(actors()) - before
    (tmp_path / "go").touch()
    assert ended.result(60).return_value == "went"
    # One serves all runs of a cluster, and outlives them.
    assert not own_cluster or COORDINATOR not in found
    assert found - {COORDINATOR} == {"TrainController", "RayTrainWorker", "SynchronizationActor"} | others


def test_without_its_controller_a_run_ends_and_leaves_the_cluster_to_others(
    trainer_of: Callable[[bool], Trainer], tmp_path: Path
) -> None:
    whole = ray.available_resources()["CPU"]
    ended = start_fit(trainer_of(True))
    until((tmp_path / "worker").exists)
    assert ray.available_resources()["CPU"] == whole - 1.5
    os.kill(actors()["TrainController"], signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ended.result(60)
    until(lambda: ray.available_resources().get("CPU") == whole)
    pid = int((tmp_path / "worker").read_text())
    until(lambda: not Path(f"/proc/{pid}").exists())
