"""Room for the workers in the cluster: where there is none yet, what a run waits for."""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util import placement_group_table

from raytune_ft.errors import BadInput
from raytune_ft.spec import ClusterSpec
from raytune_ft.train.placement import Placement, place

TOLD_AFTER_S = 15.0
"""Workers that have room are there sooner."""
_POLL_S = 2.0
_NEARLY = 1e-6

Tell = Callable[[dict[str, Any]], None]


def find_room(cluster: ClusterSpec, wait_s: float, tell: Tell) -> Placement:
    """Place the workers on the nodes that are there, or that an autoscaler adds in time.

    Raises:
        BadInput: the cluster is too small, also after `wait_s` seconds.
    """
    give_up_at = time.monotonic() + wait_s
    told = False
    try:
        while True:
            try:
                return _place(cluster, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            except BadInput as error:
                if time.monotonic() >= give_up_at:
                    raise
                if not told:
                    request_resources(bundles=[{"GPU": 1.0}] * cluster.least_workers)
                    tell({"phase": f"Waiting up to {wait_s:.0f} s for more nodes: {error}"})
                    told = True
            time.sleep(min(_POLL_S, wait_s))
    finally:
        if told:
            # From here on Ray Train asks for what it needs; this request would hold the nodes for ever.
            request_resources(bundles=[])


def _place(cluster: ClusterSpec, nodes: list[dict[str, float]]) -> Placement:
    """The least workers must find a GPU each; what CPUs there are is divided among the most."""
    least = place(cluster.model_copy(update={"workers": cluster.least_workers}), nodes)
    if least.use_gpu:
        return least
    return place(cluster.model_copy(update={"workers": cluster.most_workers}), nodes)


class BusyCluster:
    """Tells once that the workers wait for others to leave the cluster."""

    def __init__(self, cluster: ClusterSpec, placement: Placement, tell: Tell) -> None:
        self._workers = cluster.least_workers
        self._elastic = cluster.elastic is not None
        self._needs = placement.resources
        self._tell = tell
        self._look_at = time.monotonic() + TOLD_AFTER_S

    def look(self, *, started: bool) -> None:
        """Called again and again; `started` once the workers have room."""
        if started or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _POLL_S
        free = ray.available_resources()
        short = {
            name: need * self._workers
            for name, need in self._needs.items()
            if free.get(name, 0.0) + _NEARLY < need * self._workers
        }
        # What this run has reserved already is not free either.
        if short and self._is_waiting():
            lacks = ", ".join(
                f"{need:g} {name}, and {free.get(name, 0.0):g} are free" for name, need in short.items()
            )
            self._look_at = float("inf")
            self._tell({"phase": f"Waiting for room in the cluster: the run needs {lacks}"})

    def _is_waiting(self) -> bool:
        groups = [
            (group["state"], list(group["bundles"].values())) for group in placement_group_table().values()
        ]
        if self._elastic:
            # Ray asks for nothing before it knows how many workers there will be.
            return not any(
                state == "CREATED" and all(bundle == self._needs for bundle in bundles)
                for state, bundles in groups
            )
        return ("PENDING", [self._needs] * self._workers) in groups
