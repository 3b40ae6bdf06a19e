"""The updates of several jobs in a few products, where the device has a grouped one."""

from collections.abc import Sequence
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


def grouped_update(
    x_ND: Tensor,
    y_NO: Tensor,
    stops: Sequence[int],
    scales: Sequence[float],
    weights: Sequence[tuple[Tensor, Tensor] | None],
) -> Tensor:
    """y + scale · B·A·x, each group of tokens with an A (rank, D) and a B (O, rank) of its own.

    Ranks are padded with zeros to the highest of them.

    Args:
        x_ND: inputs of the tokens, those of a group side by side.
        y_NO: what the update is added to.
        stops: where each group ends, which is where the next one begins.
        scales: of the groups.
        weights: A and B of the groups; None where a group has no update.
    """
    given = [pair for pair in weights if pair is not None]
    places = [at for at, pair in enumerate(weights) if pair is not None]
    sizes = torch.tensor([stop - start for start, stop in zip((0, *stops), stops, strict=False)])
    scale_N1 = torch.tensor(scales).repeat_interleave(sizes)[:, None].to(x_ND.device, non_blocking=True)
    stop_K = torch.tensor(stops, dtype=torch.int32).to(x_ND.device, non_blocking=True)
    updated_NO: Tensor = _GroupedUpdate.apply(  # type: ignore[no-untyped-call]  # torch does not type it
        x_ND, y_NO, stop_K, scale_N1, places, *(A for A, _ in given), *(B for _, B in given)
    )
    return updated_NO


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
        half = len(places)
        A, B = weights[:half], [weight.t() for weight in weights[half:]]
        rank = -(-max(len(weight) for weight in A) // _ALIGNED) * _ALIGNED
        A_KRD = x_ND.new_zeros(len(stop_K), rank, x_ND.shape[1])
        B_KRO = x_ND.new_zeros(len(stop_K), rank, y_NO.shape[1])
        for stack_KRx, given in ((A_KRD, A), (B_KRO, B)):
            torch._foreach_copy_(
                [stack_KRx[at, : len(weight)] for at, weight in zip(places, given, strict=True)], list(given)
            )
        low_NR = (grouped_mm(x_ND, A_KRD.mT, offs=stop_K) * scale_N1).to(x_ND.dtype)
        ctx.save_for_backward(x_ND, low_NR, A_KRD, B_KRO, stop_K, scale_N1)
        ctx.ranks = [(at, len(weight)) for at, weight in zip(places, A, strict=True)]
        return y_NO + grouped_mm(low_NR, B_KRO, offs=stop_K)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, low_NR, A_KRD, B_KRO, stop_K, scale_N1 = ctx.saved_tensors
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
            *(of_A_KRD[at, :rank].float() for at, rank in ctx.ranks),
            *(of_B_KRO[at, :rank].t().float() for at, rank in ctx.ranks),
        )
