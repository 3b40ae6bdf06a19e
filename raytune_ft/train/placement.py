"""What each worker gets of the cluster: a pure function of its nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytune_ft.data.reader import task_cpus
from raytune_ft.errors import BadInput
from raytune_ft.spec import ClusterSpec


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
        BadInput: the cluster has no GPU or too few of them.
    """
    gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    if cluster.device == "gpu" and not gpus:
        raise BadInput("cluster.device = gpu: the cluster has no GPU; add a GPU node, or use device: auto")
    use_gpu = bool(gpus) and cluster.device != "cpu"
    if use_gpu and cluster.workers > gpus:
        raise BadInput(
            f"cluster.workers = {cluster.workers}: the cluster has {gpus} GPUs; use as many, or add nodes"
        )
    if use_gpu:
        return _on_gpus(cluster.workers, [node for node in nodes if node.get("GPU", 0.0) >= 1])
    return _on_cpus(cluster.workers, [node.get("CPU", 0.0) for node in nodes])


def _on_gpus(workers: int, nodes: Sequence[Mapping[str, float]]) -> Placement:
    # Half of a node's CPUs stay free for data tasks, also where every GPU has a run of its own.
    per_gpu = min(node.get("CPU", 1.0) / node["GPU"] for node in nodes)
    return Placement(True, 1, min(1.0, per_gpu / 2), -(-workers // len(nodes)))


def _on_cpus(workers: int, cpus: Sequence[float]) -> Placement:
    """On as many of the largest nodes as gives each worker the most threads."""
    sizes = sorted((size for size in cpus if size), reverse=True)[:workers] or [1.0]
    threads, used = max((max(1, int(sizes[n - 1]) // -(-workers // n)), n) for n in range(1, len(sizes) + 1))
    per_node = -(-workers // used)
    size = sizes[used - 1]
    # Most of the node, so that another run's workers cannot take what the data tasks of this one need.
    return Placement(False, threads, (size - max(task_cpus(size), size / 8)) / per_node, per_node)
