"""What each worker gets of the cluster: a pure function of its nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytune_ft.data.reader import task_cpus
from raytune_ft.errors import BadInput
from raytune_ft.spec import ClusterSpec

_WORKERS_PER_CPU = 4
"""More of them only wait for each other."""


@dataclass(frozen=True)
class Placement:
    """Resources of each worker of a run."""

    use_gpu: bool
    threads: int
    """Threads that a worker computes with on CPU."""
    cpus: float
    """What a worker reserves: less than it uses, so that reading and tokenising find room beside it."""
    workers_per_node: int

    @property
    def resources(self) -> dict[str, float]:
        """As Ray counts them."""
        return {"CPU": self.cpus} | ({"GPU": 1.0} if self.use_gpu else {})


def place(cluster: ClusterSpec, nodes: Sequence[Mapping[str, float]]) -> Placement:
    """Divide the nodes among the workers.

    Args:
        cluster: the job's.
        nodes: the resources of each node that is alive.

    Raises:
        BadInput: the cluster has no GPU or too few of them, or far too few CPUs.
    """
    gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    if cluster.device == "gpu" and not gpus:
        raise BadInput("cluster.device = gpu: the cluster has no GPU; add a GPU node, or use device: auto")
    use_gpu = bool(gpus) and cluster.device != "cpu"
    if use_gpu and cluster.workers > gpus:
        raise BadInput(_too_few(cluster, gpus))
    if use_gpu:
        return _on_gpus(cluster.workers, [node for node in nodes if node.get("GPU", 0.0) >= 1])
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    if cluster.least_workers > (most := int(max(cpus, 1.0) * _WORKERS_PER_CPU)):
        raise BadInput(_too_few_cpus(cluster, cpus, most))
    return _on_cpus(cluster.workers, [node.get("CPU", 0.0) for node in nodes])


def _too_few(cluster: ClusterSpec, gpus: int) -> str:
    more = "add nodes (--wait SECONDS waits for those of an autoscaler)"
    if cluster.elastic:
        least, most = cluster.elastic
        return (
            f"cluster.elastic = [{least}, {most}]: the cluster has {gpus} GPUs, and the least is {least}; "
            f"set it to [{gpus}, {most}], or {more}"
        )
    return (
        f"cluster.workers = {cluster.workers}: the cluster has {gpus} GPUs; use as many, or {more}, or set "
        f"cluster.elastic: [{gpus}, {cluster.workers}] instead, which takes up nodes as they come"
    )


def _too_few_cpus(cluster: ClusterSpec, cpus: float, most: int) -> str:
    name, value = ("elastic", [*cluster.elastic]) if cluster.elastic else ("workers", cluster.workers)
    return (
        f"cluster.{name} = {value}: the cluster has {cpus:g} CPUs, and {_WORKERS_PER_CPU} workers may "
        f"share one; use {most} or fewer"
    )


def _on_gpus(workers: int, nodes: Sequence[Mapping[str, float]]) -> Placement:
    # Half of a node's CPUs stay free for data tasks, also where every GPU has a run of its own.
    per_gpu = min(node.get("CPU", 1.0) / node["GPU"] for node in nodes)
    return Placement(True, 1, min(1.0, per_gpu / 2), -(-workers // len(nodes)))


def _on_cpus(workers: int, cpus: Sequence[float]) -> Placement:
    """On as many of the largest nodes as gives each worker the most threads."""
    sizes = sorted((size for size in cpus if size), reverse=True)[:workers] or [1.0]
    threads, used = max((max(1, int(sizes[n - 1]) // -(-workers // n)), n) for n in range(1, len(sizes) + 1))
    per_node = -(-workers // used)
    # Rounded up, they may fill fewer nodes: the smallest that has workers counts.
    size = sizes[-(-workers // per_node) - 1]
    # Most of the node, so that another run's workers cannot take what the data tasks of this one need.
    return Placement(False, threads, (size - max(task_cpus(size), size / 8)) / per_node, per_node)
