"""What one job trains on a bank, in its slot."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raytune_ft.errors import ModelError
from raytune_ft.methods import saving
from raytune_ft.methods.selective import Unfreezing
from raytune_ft.spec import OptimizerSpec
from raytune_ft.train.batch import Batch
from raytune_ft.train.engine import Snapshot, peak_memory_bytes
from raytune_ft.train.faults import fault_of_device
from raytune_ft.train.optimizers import make_optimizer
from raytune_ft.train.peers import Peers

if TYPE_CHECKING:
    from raytune_ft.train.bank import Bank

_WEIGHTS = "trainable.safetensors"
_OPTIMIZER = "optimizer.pt"


class BankEngine:
    """What one job trains on a bank.

    Parameters in bfloat16 are trained through float32 master copies: AdamW's small steps would vanish in
    bfloat16's 8 bits of mantissa.
    """

    def __init__(
        self,
        bank: "Bank",
        parameters: Mapping[str, nn.Parameter],
        optimizer: OptimizerSpec,
        *,
        slot: int = 0,
        seed: int = 0,
        shares_passes: bool = True,
        unfreezing: Unfreezing | None = None,
        peers: Peers = Peers(),
        paged: bool = True,
    ) -> None:
        """Train the given parameters.

        Args:
            bank: holds the model.
            parameters: of the model, by name.
            optimizer: of this job alone.
            slot: of the job's adapters.
            seed: of the dropout that the base has of its own.
            shares_passes: whether its blocks may stand beside those of other jobs.
            unfreezing: from which step on each parameter is trained; None: all from the first.
            peers: the workers that train it.
            paged: see `make_optimizer`.
        """
        self.base = bank
        self.model = bank.model
        self.parameters = dict(parameters)
        self.slot = slot
        self.seed = seed
        self.shares_passes = shares_passes
        self.peers = peers
        self._unfreezing = unfreezing
        self.max_grad_norm = optimizer.max_grad_norm
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self.optimizer = make_optimizer(list(self.masters.values()), optimizer, paged=paged)

    def begin(self, step: int) -> None:
        """Leave those without a gradient that are not trained yet: clipping and optimizer pass them over.

        A worker without a pass in a step has no gradients anyway, so that all workers agree.
        """
        if self._unfreezing is None:
            return
        trained = self._unfreezing.trained(step)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in trained)

    def collect(self) -> None:
        """Add the gradients of bfloat16 parameters to their float32 masters, where passes add up exactly."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def update(self, learning_rate: float) -> float:
        """See `Engine.update`."""
        self.peers.sum_gradients(self.masters.values())
        limit = self.max_grad_norm if self.max_grad_norm is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), limit)
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter is not self.masters[name]:
                    parameter.copy_(self.masters[name])
        return float(norm)

    def evaluate(self, batch: Batch) -> float:
        """See `Engine.evaluate`."""
        return self.base.evaluate(self, batch)

    def select(self) -> None:
        """See `Engine.select`."""
        self.base.select(self)

    def snapshot(self) -> Snapshot | None:
        """See `Engine.snapshot`. All workers hold the same, and the first one writes it."""
        if self.peers.rank:
            return None
        masters = _copied({name: p.contiguous() for name, p in self.masters.items()})
        state = _copied(self.optimizer.state_dict())

        def write(folder: Path) -> None:
            with saving(folder):
                save_file(masters, folder / _WEIGHTS)
                torch.save(state, folder / _OPTIMIZER)

        return write

    def load(self, folder: Path) -> None:
        """See `Engine.load`.

        Raises:
            ModelError: the checkpoint is damaged, or of another model or method.
            OutOfMemory, DeviceFailed: it is not the checkpoint's fault.
        """
        try:
            tensors = load_file(folder / _WEIGHTS)
            state = torch.load(folder / _OPTIMIZER, map_location=self.base.device, weights_only=True)
        except (FileNotFoundError, SafetensorError, RuntimeError, UnpicklingError, EOFError) as error:
            if (fault := fault_of_device(error)) is not None:
                raise fault from None
            (reason, *_) = str(error).splitlines() or [""]
            raise ModelError(
                f"{folder}: the checkpoint is cut short or damaged ({reason[:200]}); "
                "restore its files, or start over with --restart"
            ) from None
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in self.masters.items()}:
            raise ModelError("the checkpoint is of another model or method; --restart starts over")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[name])
                self.parameters[name].copy_(tensors[name])
        self.optimizer.load_state_dict(state)

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return peak_memory_bytes(self.base.device)


def _copied(held: Any) -> Any:
    """The same dicts and lists with copies of their tensors in the host's memory."""
    if isinstance(held, Tensor):
        return held.detach().to("cpu", copy=True)
    if isinstance(held, dict):
        return {key: _copied(value) for key, value in held.items()}
    return [_copied(value) for value in held] if isinstance(held, list) else held
