"""What several jobs' adapters add to the output of a layer, each job by itself and in grouped products."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raytune_ft.methods.grouped import Groups, grouped_update
from raytune_ft.methods.sliced import Weights

Update = Callable[[Tensor, Tensor, Sequence[int], Sequence[float], Sequence[Weights | None]], Tensor]
"""(x_ND, y_NO, where each slice ends, scales, an A and a B of each) → y_NO with all updates."""


def one_by_one(
    x_ND: Tensor,
    y_NO: Tensor,
    stops: Sequence[int],
    scales: Sequence[float],
    weights: Sequence[Weights | None],
) -> Tensor:
    pieces = []
    for start, stop, scale, pair in zip((0, *stops), stops, scales, weights, strict=False):
        update = 0 if pair is None else x_ND[start:stop] @ pair[0].t() * scale @ pair[1].t()
        pieces.append(y_NO[start:stop] + update)
    return torch.cat(pieces)


def grouped(
    x_ND: Tensor,
    y_NO: Tensor,
    stops: Sequence[int],
    scales: Sequence[float],
    weights: Sequence[Weights | None],
) -> Tensor:
    return grouped_update(x_ND, y_NO, Groups.of(stops, scales, x_ND.device), weights)
