"""What is said of a run that Ray Train ended."""

import pytest
from botocore.exceptions import EndpointConnectionError
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from raytune_ft.errors import StorageError, StorageFull, TrainingError
from raytune_ft.spec import parse_job
from raytune_ft.train.budgets import lost

JOB = parse_job(
    {
        "name": "j",
        "model": {"path": "base"},
        "data": {"sources": [{"uri": "d.jsonl"}]},
        "publish": {"catalog": "c"},
        "cluster": {"max_restarts": 2, "max_preemptions": 1},
    }
)
GOES_ON = "the same command goes on from the last checkpoint"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            WorkerGroupError("x", {0: ValueError("x")}),
            TrainingError,
            f"the worker was lost more than cluster.max_restarts = 2 times; the last time: x; {GOES_ON}",
        ),
        (
            WorkerGroupError("x", {0: ValueError("x"), 1: RayActorError(preempted=True)}),
            TrainingError,
            f"nodes of the run were taken away more than cluster.max_preemptions = 1 times; {GOES_ON}",
        ),
        (
            PreemptionError(PreemptionInfo(None, {"node": [0]})),
            TrainingError,
            f"nodes of the run were taken away more than cluster.max_preemptions = 1 times; {GOES_ON}",
        ),
        (
            ControllerError(OSError(28, "No space left on device")),
            StorageError,
            f"Ray Train could not go on: [Errno 28] No space left on device; {GOES_ON}",
        ),
        (
            ControllerError(RuntimeError("no list")),
            TrainingError,
            f"Ray Train could not go on: no list; {GOES_ON}",
        ),
        (ControllerError(StorageFull("the disk is full")), StorageFull, "the disk is full"),
        (
            ControllerError(EndpointConnectionError(endpoint_url="http://me:pa/ss@store:9000/b?x=1")),
            StorageError,
            'Ray Train could not go on: Could not connect to the endpoint URL: "http://store:9000/b?x=1"; '
            f"{GOES_ON}",
        ),
    ],
)
def test_the_budget_that_was_spent(error: BaseException, kind: type[Exception], said: str) -> None:
    found = lost(JOB, error)
    assert (type(found), str(found)) == (kind, said)


def test_a_controller_that_died_is_no_lost_worker() -> None:
    assert str(lost(JOB, ActorDiedError())).startswith("Ray Train could not go on: ")
