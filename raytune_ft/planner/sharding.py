"""What the workers divide among themselves: ZeRO's arithmetic (Rajbhandari et al. 2020, section 3)."""

from dataclasses import dataclass
from typing import Literal

from raytune_ft.spec import JobSpec

_LEAST_BUCKET = 1 << 20
_MOST_BUCKET = 1 << 28
_BUCKETS_PER_PASS = 16


@dataclass(frozen=True)
class Sharding:
    """How the states of the training are divided among the workers."""

    stage: Literal[0, 1, 2, 3]
    """0: each worker holds all; 1: the optimizer's state is divided; 2: gradients too; 3: weights too."""
    offload: Literal["none", "optimizer", "parameters"]
    """What stands in the host's memory: the optimizer's state and the gradients it takes, or weights too."""
    workers: int

    @classmethod
    def of(cls, job: JobSpec) -> "Sharding":
        """The job's own. With the fewest workers, each of them holds most."""
        return cls(job.cluster.zero_stage, job.cluster.offload, job.cluster.least_workers)


def zero_states(
    weights: int, gradients: int, optimizer: int, *, stage: int, workers: int
) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state on one of the workers.

    Args:
        weights: bytes of all weights.
        gradients: bytes of all gradients.
        optimizer: bytes of all of the optimizer's state, float32 copies of the weights included.
        stage: of ZeRO, 0 to 3.
        workers: that divide them.
    """

    def held(total: int, from_stage: int) -> int:
        return -(-total // workers) if stage >= from_stage else total

    return held(weights, 3), held(gradients, 2), held(optimizer, 1)


def bucket_elements(parameters: int) -> int:
    """Elements that sharded workers communicate at once.

    Gradients leave while the backward pass still computes those before them, so a pass needs several buckets;
    each costs its own latency, and its own memory three times over.

    >>> [bucket_elements(n) for n in (10_000_000, 1_000_000_000, 70_000_000_000)]
    [1048576, 62500000, 268435456]
    """
    return min(max(parameters // _BUCKETS_PER_PASS, _LEAST_BUCKET), _MOST_BUCKET)
