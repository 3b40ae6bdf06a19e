"""Cross-entropy of the learned positions only, in chunks, without keeping any logits."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raytune_ft.planner import LOGITS_CHUNK_TOKENS
from raytune_ft.quantise import whole_shape
from raytune_ft.train.batch import LEAST_ROWS

_CACHED_BYTES = 16 << 20
"""Logits of a chunk on CPU: more of them leave its caches, and fresh memory costs more than they do."""

Project = Callable[[Tensor], Tensor]
"""Hidden states (N, D) → logits (N, V)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradient of each chunk are computed together, so that its logits (chunk, V) can go at once."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_ND: Tensor,
        labels_N: Tensor,
        scale_N: Tensor,
        project: Project,
        chunk_tokens: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = [p for p in parameters if p.requires_grad]
        gradient_ND = torch.empty_like(hidden_ND)
        gradients: list[Tensor] = []
        loss_N = scale_N.new_empty(scale_N.shape)
        # Scales are multiplied in at the end, so that they change no bit before. The head's gradient adds
        # positions up: there only what they have in common can wait.
        largest = scale_N.max() if len(scale_N) else scale_N.new_ones(())
        outer_N = largest.expand_as(scale_N) if wanted else scale_N
        inner_N = scale_N / outer_N
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            loss_N[chunk], gradient_ND[chunk], *head_gradients = _chunk(
                hidden_ND[chunk], labels_N[chunk], inner_N[chunk], project, wanted
            )
            gradients = _sums(gradients, head_gradients)
        gradients = gradients or [torch.zeros_like(p) for p in wanted]
        ctx.save_for_backward(largest, outer_N, gradient_ND, *gradients)
        ctx.dtypes = [p.dtype if p.requires_grad else None for p in parameters]  # type: ignore[attr-defined]  # ctx is a free namespace
        ctx.mark_non_differentiable(loss_N)
        return (loss_N * scale_N).sum(), loss_N

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        largest, outer_N, gradient_ND, *gradients = ctx.saved_tensors  # type: ignore[attr-defined]  # set by save_for_backward
        unscaled = iter(gradients)
        heads = [
            _scaled(next(unscaled), largest * outputs[0], dtype) if dtype else None
            for dtype in ctx.dtypes  # type: ignore[attr-defined]
        ]
        # Rounded once to its own type.
        scaled_ND = (gradient_ND * (outer_N * outputs[0])[:, None]).to(gradient_ND.dtype)
        return (scaled_ND, None, None, None, None, *heads)


def _sums(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """In float32 at least: in bfloat16 each chunk would round the sum again."""
    if not totals:
        # A head is large, and what is float32 already is not copied.
        return [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    return [total.add_(part) for total, part in zip(totals, parts, strict=True)]


def _scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In place where that is possible, and else without a copy between."""
    if tensor.dtype == dtype:
        return tensor.mul_(scale)
    return torch.mul(tensor, scale, out=torch.empty_like(tensor, dtype=dtype))


def _chunk(
    hidden_ND: Tensor, labels_N: Tensor, weight_N: Tensor, project: Project, wanted: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Losses, and the gradients of the hidden states and of the `wanted` tensors of the head."""
    with torch.enable_grad():
        piece = hidden_ND.detach().requires_grad_()
        rows = len(piece)
        # A multiple, because threads divide the rows among themselves.
        padded = F.pad(piece, (0, 0, 0, -rows % LEAST_ROWS)) if rows % LEAST_ROWS else piece
        logits_NV = project(padded)[:rows]
    gradient_NV = F.softmax(logits_NV.detach(), dim=1, dtype=torch.float32)
    # The label's log softmax by way of the largest logit, since its own probability may be too small for a
    # logarithm. torch's `log_softmax` of bfloat16 takes five times as long on CPU.
    largest_N1, at_N1 = logits_NV.detach().max(dim=1, keepdim=True)
    own_N1 = logits_NV.detach().gather(1, labels_N[:, None])
    loss_N = (largest_N1.float() - own_N1.float() - gradient_NV.gather(1, at_N1).log()).squeeze(1)
    # The gradient of the cross-entropies: softmax - one-hot.
    gradient_NV[torch.arange(rows, device=labels_N.device), labels_N] -= 1.0
    gradient_NV.mul_(weight_N[:, None])
    gradients = torch.autograd.grad(logits_NV, [piece, *wanted], grad_outputs=gradient_NV.to(logits_NV.dtype))
    return loss_N, *gradients


def chunk_tokens(hidden_ND: Tensor, head: Sequence[Tensor]) -> int:
    """Positions whose logits should exist at the same time; their number changes no bit, but for rounding in
    the gradient of a head that is trained.

    Args:
        hidden_ND: hidden states of the learned positions.
        head: tensors of the head; the first is (V, D).
    """
    if hidden_ND.device.type != "cpu" or not head or any(tensor.requires_grad for tensor in head):
        # Each chunk of a head that is trained passes over its whole gradient.
        return LOGITS_CHUNK_TOKENS
    fitting = _CACHED_BYTES // (4 * whole_shape(head[0])[0])
    return max(LEAST_ROWS, min(LOGITS_CHUNK_TOKENS, fitting) // LEAST_ROWS * LEAST_ROWS)


def chunked_cross_entropy(
    hidden_ND: Tensor,
    labels_N: Tensor,
    scale_N: Tensor,
    project: Project,
    parameters: Sequence[Tensor],
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of N positions: what to learn from, and each by itself.

    Args:
        hidden_ND: hidden states of the learned positions.
        labels_N: the token that each of them must predict.
        scale_N: what each of them counts in the objective, above 0, float32.
        project: the language-model head, with whatever the architecture does to its logits.
        parameters: tensors of the head; those that require a gradient get one.
        chunk_tokens: positions whose logits exist at the same time.

    Returns:
        The objective, which is the sum of the losses times their scales, with a gradient; and the losses (N,)
        without one. Both float32. The gradient of a position depends on nothing but its own hidden state,
        label and scale, also where those of others are not finite.
    """
    objective, loss_N = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch does not type it
        hidden_ND, labels_N, scale_N, project, chunk_tokens, *parameters
    )
    return objective, loss_N


def sums_by_group(loss_N: Tensor, group_N: Tensor, groups: int) -> Tensor:
    """Sum of the losses of each group (groups,), float64."""
    exact_N = loss_N.double()
    return torch.stack([exact_N[group_N == group].sum() for group in range(groups)])


@torch.no_grad()
def cross_entropy_sum(hidden_ND: Tensor, labels_N: Tensor, project: Project, chunk_tokens: int) -> Tensor:
    """Sum of the cross-entropies of N positions without a gradient, float32; arguments as above."""
    pieces = zip(torch.split(hidden_ND, chunk_tokens), torch.split(labels_N, chunk_tokens), strict=True)
    sums = [F.cross_entropy(project(piece).float(), labels, reduction="sum") for piece, labels in pieces]
    return torch.stack(sums).sum()
