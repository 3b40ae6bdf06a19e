"""What the loop needs of whatever holds the weights."""

import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from raytune_ft.train.batch import Batch

_FORWARDS_PER_STEP = 1 << 16
_SEED_STRIDE = 1 << 40


def pass_number(step: int, forward: int) -> int:
    """Number of a forward pass within the run. Dropout is drawn from it: a resumed run draws alike."""
    return step * _FORWARDS_PER_STEP + forward


def pass_seed(seed: int, number: int) -> int:
    """Seed of the dropout that a base has of its own, for a pass of a run with `seed`."""
    return (seed * _SEED_STRIDE + number) % 2**63


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


Snapshot = Callable[[Path], None]
"""Writes what an engine held when the snapshot was taken into a folder, whatever it holds by now."""


class Engine(Protocol):
    """Holds a model and its optimizer. The loop decides when, the engine knows how."""

    def accumulate(self, batch: Batch, *, step: int, forward: int, divisor_G: Sequence[int]) -> list[float]:
        """Add the gradient of one forward pass; return its sums of cross-entropies, one for each group.

        Args:
            batch: the rows of the pass.
            step: optimizer step that the pass belongs to.
            forward: number of the pass within the step, over all workers.
            divisor_G: what the sum of each group is divided by before all are added up. Where all groups
                train the same weights it is the number of learned tokens of the whole step, over all passes
                and workers, so that the gradient does not depend on how the step was divided.
        """
        ...

    def idle(self) -> None:
        """Take part in a pass of other workers in which this one has nothing to compute.

        All workers have the same number of passes in a step, these included: where weights are divided among
        them, one that computes needs all others.
        """
        ...

    def update(self, learning_rate: float) -> float:
        """Add up the gradients of all workers, clip, step the optimizer, clear the gradients.

        All workers call it, also one that had no pass. Where the norm is not finite the weights stay as they
        are.

        Returns:
            The norm of the gradient before clipping, the same on all workers.
        """
        ...

    def evaluate(self, batch: Batch) -> float:
        """Sum of cross-entropies without a gradient."""
        ...

    def snapshot(self) -> Snapshot | None:
        """Copy this worker's part of what is trained and of the optimizer's state; None without a part.

        The copy is in the host's memory, so that training goes on while it is written. All workers call it,
        and write each into a folder of its own; Ray merges the folders into one.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read what a snapshot wrote; training goes on bit for bit."""
        ...

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: of the device, or of the process on CPU."""
        ...
