"""What the loop needs of whatever holds the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from raytune_ft.train.batch import Batch


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

    def save(self, folder: Path) -> None:
        """Write what is trained and the optimizer's state."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; training goes on bit for bit."""
        ...

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: of the device, or of the process on CPU."""
        ...
