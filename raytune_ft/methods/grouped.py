"""The updates of several jobs in a few products, where the device has a grouped one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

_ALIGNED = 8
"""Rows of bfloat16 must begin at multiples of 16 bytes."""
_HOPPER = (9, 0)
"""The first generation with a kernel for it; before, torch walks the groups one after another, as we do."""


def serves(x_ND: Tensor, y_NO: Tensor) -> bool:
    """Whether the device has a grouped product for an update of these."""
    return (
        x_ND.dtype == torch.bfloat16
        and x_ND.is_cuda
        and torch.cuda.get_device_capability(x_ND.device) >= _HOPPER
        and x_ND.shape[1] % _ALIGNED == 0
        and y_NO.shape[1] % _ALIGNED == 0
    )


@dataclass(frozen=True)
class Groups:
    """The groups of a row of tokens, each of which ends where the next one begins."""

    stop_K: Tensor
    """Where each of them ends, int32, on the device."""
    scale_N1: Tensor
    """What the update of each token is multiplied by."""

    @classmethod
    def of(cls, stops: Sequence[int], scales: Sequence[float], device: torch.device) -> "Groups":
        """Groups by where they end, with a scale each."""
        sizes = torch.tensor([stop - start for start, stop in zip((0, *stops), stops, strict=False)])
        scale_N1 = torch.tensor(scales).repeat_interleave(sizes)[:, None]
        return cls(torch.tensor(stops, dtype=torch.int32).to(device), scale_N1.to(device))


def grouped_update(
    x_ND: Tensor, y_NO: Tensor, groups: Groups, weights: Sequence[tuple[Tensor, Tensor] | None]
) -> Tensor:
    """y + scale · B·A·x, each group of tokens with an A (rank, D) and a B (O, rank) of its own.

    Ranks are padded with zeros to the highest of them.

    Args:
        x_ND: inputs of the tokens, those of a group side by side.
        y_NO: what the update is added to.
        groups: the tokens of each group.
        weights: A and B of the groups; None where a group has no update.
    """
    given = [pair for pair in weights if pair is not None]
    places = [at for at, pair in enumerate(weights) if pair is not None]
    updated_NO: Tensor = _GroupedUpdate.apply(  # type: ignore[no-untyped-call]  # torch does not type it
        x_ND, y_NO, groups.stop_K, groups.scale_N1, places, *(A for A, _ in given), *(B for _, B in given)
    )
    return updated_NO


def _stacks(
    like_NX: Tensor, groups: int, places: Sequence[int], weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """A (K, R, D) and transposed B (K, R, O) of all groups, in the type of the tokens."""
    half = len(places)
    A, B = weights[:half], [weight.t() for weight in weights[half:]]
    rank = -(-max(len(weight) for weight in A) // _ALIGNED) * _ALIGNED
    A_KRD = like_NX.new_zeros(groups, rank, A[0].shape[1])
    B_KRO = like_NX.new_zeros(groups, rank, B[0].shape[1])
    for stack_KRx, given in ((A_KRD, A), (B_KRO, B)):
        torch._foreach_copy_(
            [stack_KRx[at, : len(weight)] for at, weight in zip(places, given, strict=True)], list(given)
        )
    return A_KRD, B_KRO


class _GroupedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        y_NO: Tensor,
        stop_K: Tensor,
        scale_N1: Tensor,
        places: Sequence[int],
        *weights: Tensor,
    ) -> Tensor:
        A_KRD, B_KRO = _stacks(x_ND, len(stop_K), places, weights)
        low_NR = (grouped_mm(x_ND, A_KRD.mT, offs=stop_K) * scale_N1).to(x_ND.dtype)
        # Not the stacks, which are as high as the highest rank: those of all layers would stand together.
        ctx.save_for_backward(x_ND, low_NR, stop_K, scale_N1, *weights)
        ctx.places = places
        return y_NO + grouped_mm(low_NR, B_KRO, offs=stop_K)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, low_NR, stop_K, scale_N1, *weights = ctx.saved_tensors
        A_KRD, B_KRO = _stacks(x_ND, len(stop_K), ctx.places, weights)
        ranks = [(at, len(A)) for at, A in zip(ctx.places, weights, strict=False)]
        gradient_NO = gradients[0].contiguous()
        of_low_NR = (grouped_mm(gradient_NO, B_KRO.mT, offs=stop_K) * scale_N1).to(x_ND.dtype)
        of_x_ND = grouped_mm(of_low_NR, A_KRD, offs=stop_K) if ctx.needs_input_grad[0] else None
        of_A_KRD = grouped_mm(of_low_NR.t(), x_ND, offs=stop_K)
        of_B_KRO = grouped_mm(low_NR.t(), gradient_NO, offs=stop_K)
        return (
            of_x_ND,
            gradient_NO,
            None,
            None,
            None,
            *(of_A_KRD[at, :rank].float() for at, rank in ranks),
            *(of_B_KRO[at, :rank].t().float() for at, rank in ranks),
        )
