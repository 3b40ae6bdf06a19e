"""The bank: one resident base on one device, and what is trained on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raytune_ft.errors import ModelError, OutOfMemory
from raytune_ft.methods import saving
from raytune_ft.methods.lora import set_step
from raytune_ft.methods.selective import Unfreezing
from raytune_ft.planner import LOGITS_CHUNK_TOKENS
from raytune_ft.quantise import whole_shape
from raytune_ft.spec import OptimizerSpec
from raytune_ft.train.batch import Batch
from raytune_ft.train.engine import Snapshot, pass_number, pass_seed, peak_memory_bytes
from raytune_ft.train.forward import forward_of
from raytune_ft.train.loss import cross_entropy_sum, grouped_cross_entropy
from raytune_ft.train.peers import Peers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = "trainable.safetensors"
_OPTIMIZER = "optimizer.pt"


def make_optimizer(parameters: list[nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or its 8-bit and paged kinds (Dettmers et al. 2022, 2023).

    Weight decay acts on matrices only: pulling norms and biases to zero has no regularising meaning.
    """
    groups = [
        {"params": [p for p in parameters if len(whole_shape(p)) >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if len(whole_shape(p)) < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.epsilon}
    if spec.kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    import bitsandbytes as bnb

    # Paging moves state between a GPU's memory and the host's; on CPU there is one memory.
    paged = spec.kind.startswith("paged") and parameters[0].device.type == "cuda"
    if spec.kind == "paged_adamw_32bit":
        kind = bnb.optim.PagedAdamW32bit if paged else bnb.optim.AdamW32bit
    else:
        kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    return optimizer


class BankEngine:
    """Trains the given parameters of a model that stays on its device.

    Parameters in bfloat16 are trained through float32 master copies: AdamW's small steps would vanish in
    bfloat16's 8 bits of mantissa.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        parameters: Mapping[str, nn.Parameter],
        optimizer: OptimizerSpec,
        *,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        unfreezing: Unfreezing | None = None,
        peers: Peers = Peers(),
    ) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.device = next(model.parameters()).device
        self.seed = seed
        self.peers = peers
        self._unfreezing = unfreezing
        self.max_grad_norm = optimizer.max_grad_norm
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self.optimizer = make_optimizer(list(self.masters.values()), optimizer)
        self._forward = forward_of(model, compiled=compiled)
        if gradient_checkpointing:
            model.activation_checkpointing_enable()

    def accumulate(self, batch: Batch, *, step: int, forward: int, divisor_G: Sequence[int]) -> list[float]:
        """See `Engine.accumulate`.

        Raises:
            OutOfMemory: the device's memory does not hold the pass.
        """
        passes = pass_number(step, forward)
        set_step(self.model, passes)
        self._freeze(step)
        # A base may have dropout of its own. Its masks become a function of the pass, as ours are, so that a
        # resumed run draws those that an uninterrupted one drew.
        torch.manual_seed(pass_seed(self.seed, passes))
        self.model.train()
        try:
            batch = batch.to(self.device)
            scale_G = 1.0 / torch.tensor(divisor_G, dtype=torch.float32, device=self.device)
            objective, sums_G = grouped_cross_entropy(
                self._forward.learned(batch),
                batch.labels_N,
                batch.group_N,
                scale_G,
                self._forward.project,
                self._forward.head,
                LOGITS_CHUNK_TOKENS,
            )
            objective.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"step {step}: {batch.input_ids_BT.numel()} tokens in a forward pass do not fit the device; "
                f"use a smaller batch.sequences_per_worker or model.gradient_checkpointing: true ({error})"
            ) from None
        self._collect()
        return sums_G.tolist()

    def _freeze(self, step: int) -> None:
        """Leave those without a gradient that are not trained yet: clipping and optimizer pass them over.

        A worker without a pass in a step has no gradients anyway, so that all workers agree.
        """
        if self._unfreezing is None:
            return
        trained = self._unfreezing.trained(step)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in trained)

    def _collect(self) -> None:
        """Add the gradients of bfloat16 parameters to their float32 masters, where passes add up exactly."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def idle(self) -> None:
        """See `Engine.idle`. Each worker holds all weights, so nobody needs another within a pass."""

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

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """See `Engine.evaluate`."""
        self.model.eval()
        batch = batch.to(self.device)
        hidden_ND = self._forward.learned(batch)
        return float(cross_entropy_sum(hidden_ND, batch.labels_N, self._forward.project, LOGITS_CHUNK_TOKENS))

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
        """
        try:
            tensors = load_file(folder / _WEIGHTS)
            state = torch.load(folder / _OPTIMIZER, map_location=self.device, weights_only=True)
        except (FileNotFoundError, SafetensorError, RuntimeError, UnpicklingError, EOFError) as error:
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
        return peak_memory_bytes(self.device)


def _copied(held: Any) -> Any:
    """The same dicts and lists with copies of their tensors in the host's memory."""
    if isinstance(held, Tensor):
        return held.detach().to("cpu", copy=True)
    if isinstance(held, dict):
        return {key: _copied(value) for key, value in held.items()}
    return [_copied(value) for value in held] if isinstance(held, list) else held
