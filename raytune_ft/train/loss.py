"""Cross-entropy of the learned positions only, in chunks, without keeping any logits."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Project = Callable[[Tensor], Tensor]
"""Hidden states (N, D) → logits (N, V)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradient of each chunk are computed together, so that its logits (chunk, V) can go at once."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_ND: Tensor,
        labels_N: Tensor,
        project: Project,
        chunk_tokens: int,
        *parameters: Tensor,
    ) -> Tensor:
        wanted = [p for p in parameters if p.requires_grad]
        gradient_ND = torch.empty_like(hidden_ND)
        gradients = [torch.zeros_like(p) for p in wanted]
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            with torch.enable_grad():
                piece = hidden_ND[chunk].detach().requires_grad_()
                loss = F.cross_entropy(project(piece).float(), labels_N[chunk], reduction="sum")
                piece_gradient, *head_gradients = torch.autograd.grad(loss, [piece, *wanted])
            gradient_ND[chunk] = piece_gradient
            for total, part in zip(gradients, head_gradients, strict=True):
                total += part
            loss_sum += loss.detach()
        ctx.save_for_backward(gradient_ND, *gradients)
        ctx.wanted = [p.requires_grad for p in parameters]  # type: ignore[attr-defined]  # ctx is a free namespace
        return loss_sum

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient_ND, *gradients = ctx.saved_tensors  # type: ignore[attr-defined]  # set by save_for_backward
        scaled = iter(gradients)
        heads = [
            next(scaled) * outputs[0] if wanted else None
            for wanted in ctx.wanted  # type: ignore[attr-defined]
        ]
        return (gradient_ND * outputs[0], None, None, None, *heads)


def cross_entropy_sum(
    hidden_ND: Tensor, labels_N: Tensor, project: Project, parameters: Sequence[Tensor], chunk_tokens: int
) -> Tensor:
    """Sum of the cross-entropies of N positions, float32.

    Args:
        hidden_ND: hidden states of the learned positions.
        labels_N: the token that each of them must predict.
        project: the language-model head, with whatever the architecture does to its logits.
        parameters: tensors of the head; those that require a gradient get one.
        chunk_tokens: positions whose logits exist at the same time.
    """
    if not torch.is_grad_enabled():
        pieces = zip(torch.split(hidden_ND, chunk_tokens), torch.split(labels_N, chunk_tokens), strict=True)
        sums = [F.cross_entropy(project(piece).float(), labels, reduction="sum") for piece, labels in pieces]
        return torch.stack(sums).sum()
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, labels_N, project, chunk_tokens, *parameters)  # type: ignore[no-untyped-call]  # torch does not type it
    return loss
