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
"""Workers that have room are there sooner. One looks so often."""
SILENT_S = 120.0
"""A worker says that it loads as soon as it has started, which imports take seconds of."""
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
    # Nodes that are to come may bring the first GPUs.
    wanted = cluster.model_copy(update={"device": "gpu"}) if wait_s and cluster.device == "auto" else cluster
    try:
        while True:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            try:
                return _place(wanted, nodes)
            except BadInput as error:
                if time.monotonic() >= give_up_at or cluster.device == "cpu":
                    return _without_more(cluster, nodes, wait_s, tell)
                if not told:
                    request_resources(bundles=[{"GPU": 1.0}] * cluster.least_workers)
                    reason = (
                        str(error) if any(node.get("GPU") for node in nodes) else "the cluster has no GPU"
                    )
                    tell({"phase": f"Waiting up to {wait_s:.0f} s for more nodes: {reason}"})
                    told = True
            time.sleep(min(_POLL_S, wait_s))
    finally:
        if told:
            # From here on Ray Train asks for what it needs; this request would hold the nodes for ever.
            request_resources(bundles=[])


def _without_more(
    cluster: ClusterSpec, nodes: list[dict[str, float]], wait_s: float, tell: Tell
) -> Placement:
    placement = _place(cluster, nodes)
    tell({"phase": f"No GPU has come within {wait_s:.0f} s: training on CPU"})
    return placement


def _place(cluster: ClusterSpec, nodes: list[dict[str, float]]) -> Placement:
    """The least workers must find a GPU each; what CPUs there are is divided among the most."""
    least = place(cluster.model_copy(update={"workers": cluster.least_workers}), nodes)
    if least.use_gpu:
        return least
    return place(cluster.model_copy(update={"workers": cluster.most_workers}), nodes)


class BusyCluster:
    """Tells when the workers wait for others to leave the cluster, or have room and do not start."""

    def __init__(self, cluster: ClusterSpec, placement: Placement, tell: Tell) -> None:
        self._workers = cluster.least_workers
        self._elastic = cluster.elastic is not None
        self._needs = placement.resources
        self._tell = tell
        self._job = ray.get_runtime_context().get_job_id()
        self._look_at = time.monotonic() + TOLD_AFTER_S
        self._told = False
        """Of the present wait. A node that is lost later makes the workers wait again."""
        self._group: str | None = None
        """The workers' own, once they have one; another for each attempt."""
        self._group_since = 0.0
        self._came = False
        """An event, since the workers have that group."""

    def look(self, *, came: bool) -> None:
        """Called again and again.

        Args:
            came: whether the workers have sent an event since the last call.
        """
        self._came |= came
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + TOLD_AFTER_S
        groups = self._groups()
        created = next((name for name, (state, _) in groups.items() if state == "CREATED"), None)
        if created is not None:
            self._told = False
            self._look_at_start(created)
        elif not self._told and self._is_waiting(list(groups.values())):
            self._tell_what_lacks()

    def _groups(self) -> dict[str, tuple[str, list[dict[str, float]]]]:
        """State and bundles of the groups that may be the workers'; others of the cluster look the same."""
        found = {
            name: (group["state"], list(group["bundles"].values()))
            for name, group in placement_group_table().items()
            # The id ends with that of the job that made it.
            if name.endswith(self._job)
        }
        return {
            name: (state, bundles)
            for name, (state, bundles) in found.items()
            if all(bundle == self._needs for bundle in bundles)
        }

    def _look_at_start(self, group: str) -> None:
        if group != self._group:
            # What came since the last look may be of these workers already.
            self._group, self._group_since = group, time.monotonic()
        elif not self._came and time.monotonic() - self._group_since > SILENT_S:
            self._came = True
            self._tell(
                {
                    "phase": f"The workers have had room for {SILENT_S:.0f} s, and none has started; "
                    "their logs are on their nodes, in /tmp/ray/session_latest/logs"
                }
            )

    def _is_waiting(self, groups: list[tuple[str, list[dict[str, float]]]]) -> bool:
        # Ray asks for nothing before it knows how many workers there will be.
        return self._elastic or any(
            state in ("PENDING", "RESCHEDULING") and len(bundles) == self._workers
            for state, bundles in groups
        )

    def _tell_what_lacks(self) -> None:
        self._came = False
        free = ray.available_resources()
        short = {
            name: need * self._workers
            for name, need in self._needs.items()
            if free.get(name, 0.0) + _NEARLY < need * self._workers
        }
        # What this run has reserved already is not free either.
        if short:
            lacks = ", ".join(
                f"{need:g} {name}, and {free.get(name, 0.0):g} are free" for name, need in short.items()
            )
            self._told = True
            self._tell({"phase": f"Waiting for room in the cluster: the run needs {lacks}"})
