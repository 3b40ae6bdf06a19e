"""Cross-entropy of the learned positions only, in chunks, without keeping any logits."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Project = Callable[[Tensor], Tensor]
"""Hidden states (N, D) → logits (N, V)."""

_IGNORED = -100
"""The label that torch leaves out of a sum."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradient of each chunk are computed together, so that its logits (chunk, V) can go at once."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_ND: Tensor,
        labels_N: Tensor,
        group_N: Tensor,
        scale_G: Tensor,
        project: Project,
        chunk_tokens: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = [p for p in parameters if p.requires_grad]
        gradient_ND = torch.empty_like(hidden_ND)
        # In bfloat16 each chunk would round the sum again.
        gradients = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
        sums_G = torch.zeros(scale_G.shape, dtype=torch.float32, device=hidden_ND.device)
        # The largest scale is taken out and multiplied in at the end: equal scales leave ones, and with them
        # the bits of an unscaled sum.
        largest = scale_G.max()
        relative_N = (scale_G / largest)[group_N]
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            chunk_sums_G, gradient_ND[chunk], *head_gradients = _chunk(
                hidden_ND[chunk],
                labels_N[chunk],
                group_N[chunk],
                relative_N[chunk],
                len(sums_G),
                project,
                wanted,
            )
            for total, part in zip(gradients, head_gradients, strict=True):
                total += part
            sums_G += chunk_sums_G
        ctx.save_for_backward(largest, gradient_ND, *gradients)
        ctx.dtypes = [p.dtype if p.requires_grad else None for p in parameters]  # type: ignore[attr-defined]  # ctx is a free namespace
        ctx.mark_non_differentiable(sums_G)
        return (sums_G * scale_G).sum(), sums_G

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        largest, gradient_ND, *gradients = ctx.saved_tensors  # type: ignore[attr-defined]  # set by save_for_backward
        scale = largest * outputs[0]
        unscaled = iter(gradients)
        heads = [
            _scaled(next(unscaled), scale, dtype) if dtype else None
            for dtype in ctx.dtypes  # type: ignore[attr-defined]
        ]
        return (gradient_ND * scale, None, None, None, None, None, *heads)


def _scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Without a copy between: a head is large."""
    return torch.mul(tensor, scale, out=torch.empty_like(tensor, dtype=dtype))


def _chunk(
    hidden_ND: Tensor,
    labels_N: Tensor,
    group_N: Tensor,
    relative_N: Tensor,
    groups: int,
    project: Project,
    wanted: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Sums of the groups, and the gradients of the hidden states and of the `wanted` tensors of the head."""
    with torch.enable_grad():
        piece = hidden_ND.detach().requires_grad_()
        log_probabilities_NV = F.log_softmax(project(piece).float(), dim=1)
        loss_N = F.nll_loss(log_probabilities_NV, labels_N, reduction="none")
        gradients = torch.autograd.grad(loss_N, [piece, *wanted], grad_outputs=relative_N)
    fixed_NV = log_probabilities_NV.detach()
    sums = [
        F.nll_loss(fixed_NV, labels_N.where(group_N == group, _IGNORED), reduction="sum")
        for group in range(groups)
    ]
    return torch.stack(sums), *gradients


def grouped_cross_entropy(
    hidden_ND: Tensor,
    labels_N: Tensor,
    group_N: Tensor,
    scale_G: Tensor,
    project: Project,
    parameters: Sequence[Tensor],
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of N positions, summed by group: what to learn from, and the sums.

    Args:
        hidden_ND: hidden states of the learned positions.
        labels_N: the token that each of them must predict.
        group_N: the group that each of them belongs to, below G.
        scale_G: what the sum of each group counts in the objective, above 0, float32.
        project: the language-model head, with whatever the architecture does to its logits.
        parameters: tensors of the head; those that require a gradient get one.
        chunk_tokens: positions whose logits exist at the same time.

    Returns:
        The objective, which is the sum of the groups' sums times their scales, with a gradient; and the sums
        (G,) without one. Both float32.
    """
    objective, sums_G = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch does not type it
        hidden_ND, labels_N, group_N, scale_G, project, chunk_tokens, *parameters
    )
    return objective, sums_G


@torch.no_grad()
def cross_entropy_sum(hidden_ND: Tensor, labels_N: Tensor, project: Project, chunk_tokens: int) -> Tensor:
    """Sum of the cross-entropies of N positions without a gradient, float32; arguments as above."""
    pieces = zip(torch.split(hidden_ND, chunk_tokens), torch.split(labels_N, chunk_tokens), strict=True)
    sums = [F.cross_entropy(project(piece).float(), labels, reduction="sum") for piece, labels in pieces]
    return torch.stack(sums).sum()
