"""The updates of several jobs, one after another, as one operation: small ones cost more than they do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Weights = tuple[Tensor, Tensor]
"""A (rank, D) and B (O, rank) of an update."""


def sliced_update(
    x_ND: Tensor,
    y_NO: Tensor,
    stops: Sequence[int],
    scales: Sequence[float],
    weights: Sequence[Weights | None],
) -> Tensor:
    """y + scale · B·A·x, each slice of the tokens with an A and a B of its own.

    A slice gives the same bits, here and in its gradients, alone and beside others.

    Args:
        x_ND: inputs of the tokens.
        y_NO: what the updates are added to.
        stops: where each slice ends, and the next one begins.
        scales: of each slice.
        weights: of each slice; None where it has no update.
    """
    pairs = (pair or (None, None) for pair in weights)
    updated_NO: Tensor = _SlicedUpdate.apply(  # type: ignore[no-untyped-call]  # torch does not type it
        x_ND, y_NO, stops, scales, *(weight for pair in pairs for weight in pair)
    )
    return updated_NO


def _dtype_of_products(x_ND: Tensor) -> torch.dtype:
    """On CPU float32, as the weights are: there torch builds a kernel for each new shape of a product in
    bfloat16, and each step has new shapes. That takes 3 ms, a small product in float32 0.03 ms.
    """
    return torch.float32 if x_ND.device.type == "cpu" else x_ND.dtype


class _SlicedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        y_NO: Tensor,
        stops: Sequence[int],
        scales: Sequence[float],
        *weights: Tensor | None,
    ) -> Tensor:
        dtype = _dtype_of_products(x_ND)
        exact_ND, updated_NO = x_ND.to(dtype), y_NO.to(dtype, copy=True)
        lows: list[Tensor | None] = []
        cast = [None if weight is None else weight.to(dtype) for weight in weights]
        start = 0
        for at, (stop, scale) in enumerate(zip(stops, scales, strict=True)):
            A, B = cast[2 * at], cast[2 * at + 1]
            if A is None or B is None:
                lows.append(None)
            else:
                low_NR = torch.mm(exact_ND[start:stop], A.t()).mul_(scale)
                updated_NO[start:stop].addmm_(low_NR, B.t())
                lows.append(low_NR)
            start = stop
        ctx.save_for_backward(x_ND, *lows, *cast)
        ctx.stops, ctx.scales = stops, scales
        ctx.dtypes = [None if weight is None else weight.dtype for weight in weights]
        return updated_NO.to(y_NO.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, *saved = ctx.saved_tensors
        dtype = _dtype_of_products(x_ND)
        exact_ND, gradient_NO = x_ND.to(dtype), gradients[0].to(dtype)
        count = len(ctx.stops)
        lows, cast = saved[:count], saved[count:]
        of_x_ND = torch.empty_like(exact_ND) if ctx.needs_input_grad[0] else None
        of_weights: list[Tensor | None] = []
        start = 0
        for at, (stop, scale, low_NR) in enumerate(zip(ctx.stops, ctx.scales, lows, strict=True)):
            A, B = cast[2 * at], cast[2 * at + 1]
            if low_NR is None:
                of_weights += [None, None]
                if of_x_ND is not None:
                    of_x_ND[start:stop] = 0.0
            else:
                own_NO = gradient_NO[start:stop]
                of_low_NR = torch.mm(own_NO, B).mul_(scale)
                if of_x_ND is not None:
                    torch.mm(of_low_NR, A, out=of_x_ND[start:stop])
                of_A = torch.mm(of_low_NR.t(), exact_ND[start:stop])
                of_B = torch.mm(own_NO.t(), low_NR)
                of_weights += [of_A.to(ctx.dtypes[2 * at]), of_B.to(ctx.dtypes[2 * at + 1])]
            start = stop
        of_y_NO = gradients[0] if ctx.needs_input_grad[1] else None
        of_x_ND = None if of_x_ND is None else of_x_ND.to(x_ND.dtype)
        return (of_x_ND, of_y_NO, None, None, *of_weights)
