"""The workers of one run, and what they add up together.

All workers call the same methods in the same order; a call returns when the slowest of them has made it. One
that fails beside the others, for want of memory for instance, leaves them waiting inside a call. They do not
wait for ever: a process that ends closes its connections, which gloo reports to the others at once; Ray ends
the whole group when one of its workers raises; and past the timeout of the process group every backend gives
up. So a worker that cannot go on has to raise, not return.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 64 << 20
"""Gradients that are added up at once: enough to use a network well, little beside what a model needs."""


@dataclass(frozen=True)
class Peers:
    """All workers as one of them sees them; by itself, a single one."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Peers":
        """The workers of this process' process group, or this process alone where it has none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up equally long lists, place by place, in float64; all workers get the same bits."""
        if self.count == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        totals = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(totals)
        return totals.tolist()

    def smallest(self, value: float) -> float:
        """The least of all workers' values, so that what each decides by its own machine is the same."""
        return min(self.sum([value if rank == self.rank else 0.0 for rank in range(self.count)]))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each float32 gradient by its sum over all workers, which get the same bits.

        A parameter without a gradient here counts as zeros, and stays without one where no worker has any:
        an optimizer leaves it alone then, as it does on a single worker.
        """
        if self.count == 1:
            return
        for bucket in _buckets(parameters):
            sizes = [parameter.numel() for parameter in bucket]
            present = torch.tensor([float(p.grad is not None) for p in bucket], device=bucket[0].device)
            flat = torch.cat([*(_flat_gradient(parameter) for parameter in bucket), present])
            dist.all_reduce(flat)
            *totals, anywhere = torch.split(flat, [*sizes, len(bucket)])
            for parameter, total, workers in zip(bucket, totals, anywhere.tolist(), strict=True):
                if workers and parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                if workers and parameter.grad is not None:
                    parameter.grad.copy_(total.view_as(parameter))


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    return parameter.grad.flatten()


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours together, up to the size of a bucket; a larger parameter by itself."""
    bucket: list[nn.Parameter] = []
    size_bytes = 0
    for parameter in parameters:
        more_bytes = parameter.numel() * torch.float32.itemsize
        if bucket and size_bytes + more_bytes > _BUCKET_BYTES:
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append(parameter)
        size_bytes += more_bytes
    if bucket:
        yield bucket
