"""Attention as this project computes it on CPU where rows are short: all scores of a row fit the caches."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NARROW = 128
"""Up to this width plain products are faster on CPU than torch's own kernel: at 20 tokens four times."""


def attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask: Tensor | None,
    *,
    none_blind: bool = False,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Softmax attention; arguments and result are those of transformers' functions.

    By the kernel that suits the width of its rows: alone and beside others a row has the same.

    Args:
        module: as `settings`, as transformers gives them.
        query_BHTD: of H heads.
        key_BGSD: G divides H; so many heads share keys and values.
        value_BGSD: as the keys.
        mask: (B, 1, T, S), which places each place sees, or what is added to their scores.
        none_blind: the mask leaves each place something to see.
        settings: of the model.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    width = query_BHTD.shape[2]
    causal = settings.get("is_causal")
    causal = mask is None and width > 1 and (getattr(module, "is_causal", True) if causal is None else causal)
    if not _serves(query_BHTD, key_BGSD, causal=causal, settings=settings):
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHTD, key_BGSD, value_BGSD, mask, **settings
        )
        return usual
    scaling = settings.get("scaling")
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    bias = _hidden(torch.ones(width, width, dtype=torch.bool).tril_()) if causal else mask
    if bias is not None and bias.dtype == torch.bool:
        bias = _hidden(bias)
    none_blind |= bias is None or causal
    found: Tensor = _Narrow.apply(query_BHTD, key_BGSD, value_BGSD, bias, none_blind, scale)  # type: ignore[no-untyped-call]  # torch does not type it
    return found, None


def _serves(query_BHTD: Tensor, key_BGSD: Tensor, *, causal: bool, settings: Mapping[str, Any]) -> bool:
    """Whether plain products do what is asked, and are faster."""
    width, seen = query_BHTD.shape[2], key_BGSD.shape[2]
    unusual = any(settings.get(name) for name in ("dropout", "softcap", "cache"))
    return (
        query_BHTD.device.type == "cpu"
        and max(width, seen) <= _NARROW
        and not (causal and seen != width)
        and not unusual
        and settings.get("position_bias") is None
        and not torch.compiler.is_compiling()
    )


def _hidden(sees: Tensor) -> Tensor:
    """What is added to scores: nothing to those that count, float32."""
    return torch.zeros(sees.shape).masked_fill_(~sees, -math.inf)


class _Narrow(torch.autograd.Function):
    """In float32 whatever comes. The backward pass makes the scores again: nobody keeps them."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: Tensor,
        key_BGSD: Tensor,
        value_BGSD: Tensor,
        bias: Tensor | None,
        none_blind: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query_BHTD, key_BGSD, value_BGSD, bias)
        ctx.none_blind, ctx.scale = none_blind, scale
        q, k, v = (_by_group(tensor, key_BGSD) for tensor in (query_BHTD, key_BGSD, value_BGSD))
        p = _probabilities(q * scale, k, bias, query_BHTD, none_blind)
        found_BHTD = torch.bmm(p, v).view(*query_BHTD.shape[:3], value_BGSD.shape[-1])
        return _laid_out(found_BHTD.transpose(1, 2), query_BHTD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_BHTD, key_BGSD, value_BGSD, bias = ctx.saved_tensors
        given = (gradients[0].transpose(1, 2), query_BHTD, key_BGSD, value_BGSD)
        g, q, k, v = (_by_group(tensor, key_BGSD) for tensor in given)
        q = q * ctx.scale
        p = _probabilities(q, k, bias, query_BHTD, ctx.none_blind)
        of_v = torch.bmm(p.mT, g)
        # Of a softmax: p · (g - Σ g·p), here of the products with the values.
        of_p = torch.bmm(g, v.mT)
        of_scores = of_p.sub_((of_p * p).sum(-1, keepdim=True)).mul_(p)
        of_q, of_k = torch.bmm(of_scores, k).mul_(ctx.scale), torch.bmm(of_scores.mT, q)
        pairs = ((of_q, query_BHTD), (of_k, key_BGSD), (of_v, value_BGSD))
        return (*(found.view(tensor.shape).to(tensor.dtype) for found, tensor in pairs), None, None, None)


def _laid_out(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In one copy where it takes one; a tensor that has the type keeps its order in memory."""
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _by_group(tensor: Tensor, key_BGSD: Tensor) -> Tensor:
    """(B·G, rows, D) float32: heads that share keys stand among each other's rows."""
    return _laid_out(tensor, torch.float32).view(key_BGSD.shape[0] * key_BGSD.shape[1], -1, tensor.shape[-1])


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, query_BHTD: Tensor, none_blind: bool) -> Tensor:
    """What each row takes of each value, in the shape of the scores."""
    scores = torch.bmm(q, k.mT)
    scores_BHTS = scores.view(*query_BHTD.shape[:3], -1)
    if bias is not None:
        scores_BHTS += bias
    # Who sees nothing takes nothing.
    softmax = torch.softmax if none_blind else torch._safe_softmax
    found: Tensor = softmax(scores_BHTS, -1)
    return found.view_as(scores)
