"""What the loop needs of whatever holds the weights."""

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from raytune_ft.train.batch import Batch

_FORWARDS_PER_STEP = 1 << 16
_SEED_STRIDE = 1 << 40


def pass_number(step: int, forward: int) -> int:
    """Number of a forward pass within the run."""
    return step * _FORWARDS_PER_STEP + forward


def pass_seed(seed: int, number: int) -> int:
    """Seed of the dropout that a base has of its own, for a pass of a run with `seed`: a resumed run draws
    alike."""
    return (seed * _SEED_STRIDE + number) % 2**63


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


Snapshot = Callable[[Path], None]
"""Writes what an engine held when the snapshot was taken into a folder, whatever it holds by now."""


@dataclass(frozen=True)
class Block:
    """What one job has in a pass. It computes the same alone and beside the blocks of others."""

    engine: "Engine"
    """Whose weights it is computed with."""
    batch: Batch
    step: int
    """Optimizer step of the job that it belongs to."""
    forward: int
    """Number of the block within the step, over all workers."""
    divisor: int
    """What the sum of its cross-entropies is divided by: the number of learned tokens of the job's step, over
    all blocks and workers, so that the gradient does not depend on how the step was divided."""
    sources: int
    """`Batch.group_N` stays below it."""


class Base(Protocol):
    """What computes passes: a model that stays where it is while jobs come and go."""

    @property
    def tokens_per_pass(self) -> int:
        """Most padded tokens of a pass that several jobs share; 0: each job has passes of its own."""
        ...

    def accumulate(self, blocks: Sequence[Block]) -> list[list[float] | Exception]:
        """Add the gradients of one forward pass.

        Args:
            blocks: at most one of each job; more than one only where all of their engines `share_passes`.

        Returns:
            For each block its sums of cross-entropies by source; or why it cannot be computed, in which case
            it left no gradient to another job.

        Raises:
            OutOfMemory: the device's memory does not hold the pass.
            DeviceFailed: the device does not work any more.
        """
        ...

    def idle(self) -> None:
        """Take part in a pass of other workers in which this one has nothing to compute.

        All workers have the same number of passes in a step, these included: where weights are divided among
        them, one that computes needs all others.
        """
        ...


class Engine(Protocol):
    """Holds what one job trains, and its optimizer. The loop decides when, the engine knows how."""

    @property
    def base(self) -> Base:
        """What computes its passes."""
        ...

    @property
    def shares_passes(self) -> bool:
        """Whether its blocks may stand beside those of other jobs."""
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

    def select(self) -> None:
        """Make the model compute with this job's weights alone, until the next pass or evaluation."""
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
