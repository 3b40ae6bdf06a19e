"""The sharded engine: what is trained is divided among the workers (ZeRO, Rajbhandari et al. 2020).

DeepSpeed divides and communicates; what a pass, a norm and a step are stays what the bank's are, so that a
run's result depends neither on the stage nor on the number of workers, but for rounding.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raytune_ft.errors import OutOfMemory
from raytune_ft.methods.routing import Route, Share, set_route
from raytune_ft.planner import bucket_elements
from raytune_ft.quantise import is_divided, whole_shape
from raytune_ft.spec import ClusterSpec, OptimizerSpec
from raytune_ft.train.batch import Batch
from raytune_ft.train.engine import Block, Snapshot, pass_number, pass_seed, peak_memory_bytes
from raytune_ft.train.export import export_full, gathered
from raytune_ft.train.faults import is_out_of_memory
from raytune_ft.train.forward import forward_of
from raytune_ft.train.loss import chunk_tokens, chunked_cross_entropy, cross_entropy_sum, sums_by_group
from raytune_ft.train.optimizers import make_optimizer
from raytune_ft.train.peers import Peers
from raytune_ft.train.shards import copy_shards, load_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def zero_config(
    cluster: ClusterSpec, *, weight_bits: int, max_grad_norm: float | None, parameters: int, hidden: int
) -> dict[str, Any]:
    """DeepSpeed's settings.

    Args:
        cluster: stage and offload.
        weight_bits: of the base; 32 computes in float32, all others in bfloat16 with float32 masters.
        max_grad_norm: where the gradient is clipped; None for never.
        parameters: that the method trains.
        hidden: width of the model.
    """
    bucket = bucket_elements(parameters)
    zero: dict[str, Any] = {
        "stage": cluster.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        # DeepSpeed refuses it in stage 1 where the loop forms the passes.
        "overlap_comm": cluster.zero_stage >= 2 and torch.cuda.is_available(),
    }
    if cluster.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            # Norms and biases cost more latency than memory.
            "stage3_param_persistence_threshold": 10 * hidden,
            "sub_group_size": 10**9,
        }
    # Pinned memory is what a GPU copies from without waiting.
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if cluster.offload != "none":
        zero["offload_optimizer"] = host
    if cluster.offload == "parameters":
        zero["offload_param"] = host
    config: dict[str, Any] = {
        # The loop forms the passes; DeepSpeed only wants a number.
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
    if weight_bits != 32:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        # Else the workers' gradients would be added up in bfloat16.
        config["communication_data_type"] = "fp32"
    return config


def join_group(device: torch.device) -> None:
    """Let DeepSpeed use the process group that Ray made.

    DeepSpeed would compile a CPU kernel for inference here, which takes 40 s, and fails without a compiler.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


@contextmanager
def divided_while_loading(config: Mapping[str, Any]) -> Iterator[None]:
    """Within, transformers divides each weight as it loads it (stage 3), so that no worker holds the base."""
    from transformers.integrations import HfDeepSpeedConfig

    kept = HfDeepSpeedConfig(dict(config))
    yield
    # transformers asks for it through a weak reference: from here on models load as usual again.
    del kept


class _Pass(nn.Module):
    """The whole of a pass as one module: the unit around which DeepSpeed gathers and releases weights."""

    def __init__(self, model: "PreTrainedModel", *, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self._forward = forward_of(model, hooks=False, compiled=compiled)

    def hold_head(self) -> None:
        """Keep the head's weights gathered through a pass: its chunks are not modules of their own."""
        from deepspeed.runtime.zero import register_external_parameter

        for weight in self._forward.head:
            register_external_parameter(self, weight)

    def forward(self, *, batch: Batch, scale: Tensor | None) -> tuple[Tensor, Tensor] | Tensor:
        """Objective and losses (N,); without a scale the sum of all cross-entropies alone."""
        hidden_ND, project = self._forward.learned(batch), self._forward.project
        size = chunk_tokens(hidden_ND, self._forward.head)
        if scale is None:
            return cross_entropy_sum(hidden_ND, batch.labels_N, project, size)
        return chunked_cross_entropy(
            hidden_ND,
            batch.labels_N,
            scale.expand(batch.learned_tokens),
            project,
            self._forward.head,
            size,
        )


class ShardedEngine:
    """Trains parameters whose optimizer state, gradients or weights are divided among the workers.

    It is its own base, for one job alone. All workers call every method together, `evaluate` and `save` too,
    and `evaluate` with the same rows.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        parameters: Mapping[str, nn.Parameter],
        optimizer: OptimizerSpec,
        config: Mapping[str, Any],
        *,
        device: torch.device,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        peers: Peers = Peers(),
    ) -> None:
        """Divide the model.

        Args:
            model: with its method; `join_group` was called before.
            parameters: what is trained, by name.
            optimizer: its kind must be `adamw`.
            config: see `zero_config`.
            device: of this worker.
            seed: of the dropout.
            gradient_checkpointing: recompute activations in the backward pass.
            compiled: see `forward_of`; not in stage 3.
            peers: the workers of the run.
        """
        import deepspeed

        if gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.model = model
        self.parameters = dict(parameters)
        self.device = device
        self.seed = seed
        self.peers = peers
        self.slot = 0
        self.shares_passes = False
        self.tokens_per_pass = 0
        self._vocabulary = whole_shape(model.get_input_embeddings().weight)[0]
        if "bf16" in config and is_divided(model):
            # What was added to a divided model has to have its dtype: else DeepSpeed fails where it trains
            # some of its weights too. Others it casts itself.
            for parameter in self.parameters.values():
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(torch.bfloat16)
        unit = _Pass(model, compiled=compiled)
        self.deepspeed, *_ = deepspeed.initialize(
            model=unit,
            optimizer=make_optimizer(list(self.parameters.values()), optimizer),
            config=dict(config),
        )
        if self.deepspeed.zero_optimization_stage() == 3:
            unit.hold_head()

    @property
    def base(self) -> "ShardedEngine":
        """See `Engine.base`."""
        return self

    def accumulate(self, blocks: Sequence[Block]) -> list[list[float] | Exception]:
        """See `Base.accumulate`.

        Raises:
            OutOfMemory: the device's memory does not hold the pass.
            DataError: a token is none of the base's.
        """
        (block,) = blocks
        if (failure := block.batch.unknown_token(self._vocabulary)) is not None:
            raise failure
        torch.manual_seed(pass_seed(self.seed, pass_number(block.step, block.forward)))
        self.deepspeed.train()
        try:
            batch = block.batch.to(self.device)
            set_route(self.model, Route([Share(0, block.step, batch.example_BX, batch.position_ids_BT)]))
            # DeepSpeed takes the mean over the workers, and the objective is a sum.
            scale = self.peers.count / torch.tensor(block.divisor, dtype=torch.float32, device=self.device)
            objective, loss_N = self.deepspeed(batch=batch, scale=scale)
            self.deepspeed.backward(objective, scale_wrt_gas=False)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"step {block.step}: {block.batch.input_ids_BT.numel()} tokens in a forward pass do not fit "
                "the device; use a smaller batch.sequences_per_worker or model.gradient_checkpointing: true "
                f"({error})"
            ) from None
        return [sums_by_group(loss_N, batch.group_N, block.sources).tolist()]

    def idle(self) -> None:
        """See `Base.idle`."""
        self.accumulate([Block(self, _nothing(), step=0, forward=0, divisor=1, sources=1)])

    def select(self) -> None:
        """See `Engine.select`: there is no other job."""

    def update(self, learning_rate: float) -> float:
        """See `Engine.update`."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        if self.deepspeed.optimizer.overflow:
            return math.inf
        return float(self.deepspeed.get_global_grad_norm())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """See `Engine.evaluate`."""
        if (failure := batch.unknown_token(self._vocabulary)) is not None:
            raise failure
        self.deepspeed.eval()
        return float(self.deepspeed(batch=batch.to(self.device), scale=None))

    def snapshot(self) -> Snapshot:
        """See `Engine.snapshot`; each worker has a part of its own."""
        return copy_shards(self.deepspeed, self.parameters, self.peers.rank)

    def load(self, folder: Path) -> None:
        """See `Engine.load`; the workers that saved may have been more or fewer."""
        load_shards(self.deepspeed, self.parameters, folder)

    def write_model(self, folder: Path) -> None:
        """Write a Hugging Face model folder; the first worker alone writes, and none holds the model."""
        export_full(self.model, folder, self.peers.rank)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Within, the first worker's model holds what is trained whole, as its float32 masters: adapters."""
        found = gathered(self.deepspeed, self.parameters)
        divided = {name: self.parameters[name].data for name in found}
        for name, tensor in found.items():
            self.parameters[name].data = tensor
        try:
            yield
        finally:
            for name, tensor in divided.items():
                self.parameters[name].data = tensor

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return peak_memory_bytes(self.device)


def _nothing() -> Batch:
    """A row without anything to learn, for any kind of model: its gradient is zero."""
    one_BT, none_N = torch.zeros(1, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return Batch(one_BT, one_BT, none_N, none_N, none_N, one_BT, tokens=0, decoder_ids_BS=one_BT)
