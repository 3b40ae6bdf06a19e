"""Where a DeepSpeed engine holds master weights and optimizer state: ranges of flattened parameters."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytune_ft.errors import SpecError

if TYPE_CHECKING:
    import deepspeed


@dataclass(frozen=True)
class Fragment:
    """A range of a flattened parameter, and where this rank holds its master weights."""

    name: str
    start: int
    """First element of the range, in the parameter."""
    numel: int
    flat: Tensor
    """The tensor that the optimizer steps: its state stands under it."""
    offset: int
    """First element of the range, in `flat`."""

    def of(self, tensor: Tensor) -> Tensor:
        """The range as a view of a tensor that is laid out like `flat`."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def fragments(engine: "deepspeed.DeepSpeedEngine", names: Mapping[str, nn.Parameter]) -> list[Fragment]:
    """What this rank holds of every parameter: every element is the part of one rank alone.

    Raises:
        ValueError: `names` are not the parameters that the optimizer steps.
    """
    name_of = {parameter: name for name, parameter in names.items()}
    held = list(_held(engine))
    if {part.parameter for part in held} != set(name_of):
        raise ValueError(f"names: {len(names)} parameters, which are not those that the optimizer steps")
    return [
        Fragment(name_of[part.parameter], part.start, part.numel, part.flat, part.offset)
        for part in held
        if part.numel > 0
    ]


class _Held(NamedTuple):
    """As `Fragment`; `numel` is not positive where this rank holds nothing of the parameter."""

    parameter: nn.Parameter
    flat: Tensor
    start: int
    numel: int
    offset: int


def _held(engine: "deepspeed.DeepSpeedEngine") -> Iterator[_Held]:
    """The layout of DeepSpeed 0.19's optimizers, which its public functions show only in part."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer, rank = engine.optimizer, dist.get_rank()
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        flats = optimizer.fp32_partitioned_groups_flat
        for flat, parameters in zip(flats, optimizer.fp16_groups, strict=True):
            yield from _divided(flat, parameters, rank)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        flats, offsets = optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_offsets
        for flat, parameters, at in zip(flats, optimizer.round_robin_bit16_groups, offsets, strict=True):
            yield from _in_a_row(flat, parameters, at, rank)
    else:  # BF16_Optimizer: stage 1 of bfloat16 weights.
        for flat, parameters in zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True):
            at = [0, *accumulate(parameter.numel() for parameter in parameters)]
            yield from _in_a_row(flat, parameters, at[:-1], rank)


def _divided(flat: Tensor, parameters: Iterable[nn.Parameter], rank: int) -> Iterator[_Held]:
    """Stage 3: every parameter is divided among all ranks; a rank's parts stand one after another."""
    offset = 0
    for parameter in parameters:
        part_numel = parameter.partition_numel()  # type: ignore[attr-defined]  # DeepSpeed adds it
        start = rank * part_numel
        # The last part is padded.
        end = min(start + part_numel, parameter.ds_numel)  # type: ignore[attr-defined]
        yield _Held(parameter, flat, start, end - start, offset)
        offset += part_numel


def _in_a_row(
    flat: Tensor, parameters: Iterable[nn.Parameter], offsets: Iterable[int], rank: int
) -> Iterator[_Held]:
    """Stages 1 and 2: whole parameters stand one after another; each rank has its part of the row."""
    first, last = rank * flat.numel(), (rank + 1) * flat.numel()
    for parameter, at in zip(parameters, offsets, strict=True):
        low, high = max(at, first), min(at + parameter.numel(), last)
        yield _Held(parameter, flat, low - at, high - low, low - first)


def optimizer_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> tuple[int, dict[str, Tensor]]:
    """Steps taken, and what is kept for each element: before the first step, nothing.

    Raises:
        SpecError: the optimizer keeps something for blocks of elements.
    """
    kept = dict(optimizer.state.get(flat, {}))
    step = int(kept.pop("step", 0))
    for name, value in kept.items():
        if not isinstance(value, Tensor) or value.numel() != flat.numel():
            raise SpecError(
                f"optimizer.kind: {type(optimizer).__name__} keeps '{name}' for blocks of elements, which "
                "cannot be divided among workers; use adamw"
            )
    return step, kept


def refresh(engine: "deepspeed.DeepSpeedEngine") -> None:
    """Make the weights that the model computes with from the masters; all ranks call it."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay whole on every rank: they are gathered again.
        optimizer.checkpoint_event_epilogue()
        optimizer.invalidate_secondary_tensor()
    else:
        optimizer.update_lp_params()
