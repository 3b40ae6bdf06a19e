"""A desk with a few jobs, whose clock is the test's."""

from typing import Any

import tiny

from raytune_ft.fleet.desk import Desk, Order
from raytune_ft.fleet.entry import QueuedJob
from raytune_ft.fleet.placement import Group, Placed
from raytune_ft.fleet.queue import Queue
from raytune_ft.fleet.work import LaneSpeed, Work
from raytune_ft.planner import Lane, MemoryPlan, ModelFacts
from raytune_ft.spec import parse_job

FACTS = ModelFacts.from_config(tiny.llama().config.to_dict(), "base")


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def job(name: str) -> Placed:
    spec = parse_job(
        {
            "name": name,
            "model": {"path": "org/base"},
            "data": {"sources": [{"uri": f"{name}.jsonl"}]},
            "publish": {"catalog": "c"},
        }
    )
    return Placed(spec, Work(10, 100), QueuedJob(name, spec.digest(), "base-1", 10.0))


def desk_of(*names: str, **settings: Any) -> tuple[Desk, Clock]:
    clock = Clock()
    jobs = tuple(job(name) for name in names)
    lane = Lane("packed", 2, MemoryPlan(1, 1, 1, 1, 1), (64, 64))
    group = Group("base-1", jobs, FACTS, LaneSpeed(1, 1, 1), lane)
    queue = Queue([each.queued for each in jobs], lanes=1, lease_s=30.0, **settings)
    orders = {each.spec.name: Order(each.spec, "inputs") for each in jobs}
    return Desk(queue, orders, [group], lease_s=30.0, began_at=100.0, clock=clock), clock
