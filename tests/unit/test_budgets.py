"""Which checkpoints Ray Train keeps of a run, and what is said of one that it ended."""

import math
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from ray.exceptions import ActorDiedError, RayActorError
from ray.train import Checkpoint
from ray.train._internal.checkpoint_manager import _CheckpointManager
from ray.train._internal.session import _TrainingResult
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from raytune_ft.errors import StorageError, StorageFull, TrainingError
from raytune_ft.spec import parse_job
from raytune_ft.train.budgets import lost, run_config
from raytune_ft.train.run import Run
from raytune_ft.train.selection import ranking_value

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


@pytest.mark.parametrize(
    ("best_by", "better", "worse"), [("validation_loss", 1.0, 2.0), ("rougeL", 0.5, 0.25)]
)
def test_ray_keeps_the_first_of_the_best_and_nothing_that_was_not_measured(
    tmp_path: Path, best_by: str, better: float, worse: float
) -> None:
    job = parse_job(
        {
            "name": "j",
            "model": {"path": "base"},
            "data": {"sources": [{"uri": "d.jsonl"}]},
            "checkpoint": {"keep": 1, "keep_best": True, "best_by": best_by},
            "publish": {"catalog": str(tmp_path)},
        }
    )
    config = run_config(job, Run(job)).checkpoint_config
    manager = _CheckpointManager(config)
    history: list[dict[str, Any]] = []
    for step, value in enumerate((worse, better, None, better, math.nan, worse, None), 1):
        measured = {} if value is None else {best_by: value}
        entry = measured if best_by == "validation_loss" else {"validation_scores": measured}
        history.append({"step": step, **entry})
        (tmp_path / f"{step}").mkdir()
        metrics = {"step": step, best_by: ranking_value(history, best_by)}
        manager.register_checkpoint(_TrainingResult(Checkpoint(str(tmp_path / f"{step}")), metrics))
    assert {result.metrics["step"] for result in manager.best_checkpoint_results} == {2}
    assert {int(each.name) for each in tmp_path.iterdir()} == {2, 7}
