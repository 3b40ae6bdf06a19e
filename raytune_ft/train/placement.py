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
    sizes = sorted(
        (max(1.0, node.get("CPU", 1.0)) for node in nodes if not use_gpu or node.get("GPU", 0.0) >= 1),
        reverse=True,
    )
    used = sizes[: cluster.workers] or [1.0]
    smallest = used[-1]
    per_node = -(-cluster.workers // len(used))
    # Data tasks need a CPU beside the workers, or the two would wait for each other.
    spare = max(smallest - task_cpus(smallest), smallest / 2)
    if use_gpu:
        return Placement(True, 1, min(1.0, spare / per_node), per_node)
    return Placement(False, max(1, int(smallest) // per_node), spare / per_node, per_node)
