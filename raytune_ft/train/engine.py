"""What the loop needs of whatever holds the weights."""

from pathlib import Path
from typing import Protocol

from raytune_ft.train.batch import Batch


class Engine(Protocol):
    """Holds a model and its optimizer. The loop decides when, the engine knows how."""

    def accumulate(self, batch: Batch, *, step: int, forward: int, learned_tokens: int) -> float:
        """Add the gradient of one forward pass; return its sum of cross-entropies.

        Args:
            batch: the rows of the pass.
            step: optimizer step that the pass belongs to.
            forward: number of the pass within the step.
            learned_tokens: learned tokens of the whole step, over all passes and workers: the sum of losses
                is divided by it, so that the gradient does not depend on how the step was divided.
        """
        ...

    def update(self, learning_rate: float) -> float:
        """Clip, step the optimizer, clear the gradients; return the norm of the gradient before clipping.

        Where that norm is not finite the weights stay as they are.
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
