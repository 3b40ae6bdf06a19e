"""An error that no lost worker explains ends a run at once, on any number of workers."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from torch import distributed

from raytune_ft.errors import TrainingError
from raytune_ft.spec import parse_job
from raytune_ft.train import worker
from raytune_ft.train.assignment import Assignment, TrainingData, train_worker
from raytune_ft.train.placement import Placement
from raytune_ft.train.progress import recorded_failure
from raytune_ft.train.run import RunState

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def assignment(workers: int) -> Assignment:
    values = {
        "name": "j",
        "model": {"path": "base"},
        "data": {"sources": [{"uri": "d.jsonl"}]},
        "publish": {"catalog": "c"},
        "cluster": {"workers": workers},
    }
    state, data = RunState(1, "attempt", "data", "base"), cast(TrainingData, None)
    return Assignment(parse_job(values), state, data, uuid.uuid4().hex, Placement(False, 1, 1.0, 1))


def raising(error: Exception) -> Callable[[Any], None]:
    def run_recipe(_: Any) -> None:
        raise error

    return run_recipe


@pytest.fixture
def process_group() -> Iterator[None]:
    """What Ray Train sets up before it calls a worker."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("error", [TypeError("x"), ValueError("x"), KeyError("x"), NotImplementedError("x")])
@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_told_and_not_retried(error: Exception, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "run_recipe", raising(error))
    given = assignment(workers)
    said = f"the worker failed: {type(error).__name__}: {error}"
    if workers == 1:
        found = train_worker(given)
    else:
        with pytest.raises(TrainingError):
            train_worker(given)
        found = recorded_failure(given.channel)
    assert (type(found), str(found)) == (TrainingError, said)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("error", [RuntimeError("x"), ConnectionError("x")])
def test_what_a_lost_worker_explains_is_left_to_ray(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "run_recipe", raising(error))
    given = assignment(2)
    with pytest.raises(type(error)):
        train_worker(given)
    assert recorded_failure(given.channel) is None


def test_a_worker_whose_group_was_taken_away_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "run_recipe", lambda _: distributed.barrier())
    given = assignment(2)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        train_worker(given)
    assert recorded_failure(given.channel) is None
