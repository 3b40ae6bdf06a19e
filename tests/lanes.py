"""Fleets of tiny jobs, and lanes that run in the test's own process."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from raytune_ft.catalog import Catalog
from raytune_ft.data.sources import fingerprint, list_objects
from raytune_ft.fleet.desk import Desk, Order
from raytune_ft.fleet.events import FleetEvent
from raytune_ft.fleet.lane import Lane
from raytune_ft.fleet.plan import plan_fleet
from raytune_ft.fleet.queue import Queue
from raytune_ft.model_files import base_identity, model_folder, read_facts
from raytune_ft.spec import FleetSpec
from raytune_ft.spec.fleet_file import parse_fleet
from raytune_ft.storage import open_storage
from raytune_ft.train.lease import Holder, Lease
from raytune_ft.train.placement import Placement
from raytune_ft.train.run import name_inputs

CHANNEL = "a-launch"
PLACEMENT = Placement(use_gpu=False, threads=1, cpus=0.5, workers_per_node=1)


def write_task(folder: Path, name: str, *, examples: int = 40, answer: Callable[[int], str] = str) -> Path:
    """Short instructions, whose answers are a task's own."""
    path = folder / f"{name}.jsonl"
    lines = [
        json.dumps({"instruction": f"Name number {n} of {name}.", "output": answer(n % 7)})
        for n in range(examples)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def fleet_of(base: Path, catalog: Path | str, jobs: Mapping[str, Mapping[str, Any]], **top: Any) -> FleetSpec:
    """A fleet of jobs of 6 steps in 32 bits; `jobs` by name, each over the defaults."""
    return parse_fleet(
        {
            "name": "small",
            "defaults": {
                "model": {"path": str(base), "weight_bits": 32},
                "data": {"max_tokens": 64},
                "method": {"rank": 4},
                "optimizer": {"learning_rate": 5.0e-3},
                "schedule": {"steps": 6},
                "batch": {"sequences": 4},
                "checkpoint": {"every_steps": 2},
                "cluster": {"device": "cpu"},
                "evaluate": {"metrics": []},
                "publish": {"catalog": str(catalog)},
            },
            "jobs": [{"name": name, **job} for name, job in jobs.items()],
            **top,
        }
    )


def job_on(path: Path, **sections: Any) -> dict[str, Any]:
    """A job whose data is one file."""
    return {**sections, "data": {"sources": [{"uri": str(path)}], **sections.get("data", {})}}


def adapter(catalog: Path | str, name: str, to: Path) -> dict[str, torch.Tensor]:
    """The tensors of the first published version."""
    Catalog.at(str(catalog)).pull(f"{name}@v1", to)
    tensors: dict[str, torch.Tensor] = load_file(to / "adapter_model.safetensors")
    return tensors


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether all bits are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Locked:
    """A desk for several threads: an actor takes one call after another too."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._desk, name)

        def call(*args: Any, **named: Any) -> Any:
            with self._lock:
                return method(*args, **named)

        return call


class Shop:
    """A fleet with its desk, whose driver is the test."""

    def __init__(self, fleet: FleetSpec, folder: Path, *, lease_s: float = 30.0) -> None:
        plan = plan_fleet(
            fleet,
            lambda path: read_facts(model_folder(path, weights=False)),
            place_name="fleet.yaml",
            device_bytes=None,
            flops_per_s=None,
        )
        self.storage = open_storage(str(folder))
        placed = [job for group in plan.groups for job in group.jobs]
        orders = {}
        for job in placed:
            found = fingerprint(list_objects(job.spec.data))
            inputs = name_inputs(found, base_identity(job.spec.model.path), None)
            orders[job.spec.name] = Order(job.spec, inputs)
        self.queue = Queue(
            [job.queued for job in placed], lanes=1, lease_s=lease_s, on_failure=fleet.on_failure
        )
        self.desk = Locked(Desk(self.queue, orders, plan.groups, lease_s=lease_s, began_at=0.0))
        self.events: list[FleetEvent] = []
        self._lease = Lease(self.storage, Holder.here(CHANNEL), renew_s=60, expires_s=600)
        self._lease.take(lambda _: None)

    def lane(self, name: str = "lane-1", desk: Any = None, **settings: Any) -> Lane:
        """A lane that asks this shop's desk."""
        return Lane(name, desk or self.desk, PLACEMENT, self.storage, CHANNEL, **settings)

    def run(self, **settings: Any) -> None:
        """Train with one lane to the end."""
        self.lane(**settings).run()
        self.read()

    def read(self) -> list[FleetEvent]:
        """All events so far."""
        self.events += self.desk.news().events
        return self.events

    def close(self) -> None:
        """Give the lease back."""
        self._lease.give_back()
