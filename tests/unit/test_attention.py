"""Attention of short rows on CPU, against torch's own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raytune_ft.train.attention import attention

T, D = 9, 4


def tensors(heads: int, groups: int, dtype: torch.dtype, keys: int = T) -> list[Tensor]:
    """Queries, keys and values of two rows, as a model makes them: heads beside each other."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, T, heads, D), (2, keys, groups, D), (2, keys, groups, D))
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def mask(kind: str, dtype: torch.dtype) -> Tensor | None:
    """Two examples in a row, which do not see each other; or what a row's padding hides."""
    if kind == "none":
        return None
    example_T = torch.tensor([0] * 5 + [1] * 4)
    sees = (example_T[:, None] == example_T) & torch.ones(T, T, dtype=torch.bool).tril()
    sees_B1TT = sees.expand(2, 1, T, T).clone()
    if kind == "a row that sees nothing":
        sees_B1TT[1, 0, 3] = False
    if kind == "added":
        return torch.zeros(2, 1, T, T, dtype=dtype).masked_fill_(~sees_B1TT, -math.inf)
    return sees_B1TT


def results(
    function: Any, heads: int, groups: int, dtype: torch.dtype, kind: str, **settings: Any
) -> list[Tensor]:
    """Output and gradients."""
    module = nn.Module()
    module.num_key_value_groups = heads // groups
    given = tensors(heads, groups, dtype)
    found, _ = function(module, *given, mask(kind, dtype), **settings)
    assert found.is_contiguous()
    found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    return [found.detach(), *(tensor.grad for tensor in given)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["none", "seen", "added", "a row that sees nothing"])
def test_output_and_gradients_are_torchs(heads: int, groups: int, dtype: torch.dtype, kind: str) -> None:
    exact = results(sdpa_attention_forward, heads, groups, torch.float32, kind)
    found = results(attention, heads, groups, dtype, kind)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(
            one.float(), other, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.02
        )


@pytest.mark.parametrize(
    "settings", [{"is_causal": False}, {"scaling": 0.3}, {"dropout": 0.0, "softcap": None}]
)
def test_settings_mean_what_they_mean_to_torch(settings: dict[str, Any]) -> None:
    for one, other in zip(
        results(attention, 4, 2, torch.float32, "none", **settings),
        results(sdpa_attention_forward, 4, 2, torch.float32, "none", **settings),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_more_keys_than_queries() -> None:
    query, key, value = tensors(2, 2, torch.float32, keys=T + 3)
    for causal in (True, False):
        found = attention(nn.Module(), query, key, value, None, is_causal=causal)[0]
        exact = sdpa_attention_forward(nn.Module(), query, key, value, None, is_causal=causal)[0]
        torch.testing.assert_close(found, exact)


def test_a_row_has_the_same_bits_beside_others() -> None:
    given = tensors(4, 2, torch.bfloat16)
    both = attention(nn.Module(), *given, None)[0]
    one = attention(nn.Module(), *(tensor[1:] for tensor in given), None)[0]
    assert torch.equal(both[1:], one)


def test_nobody_keeps_the_scores() -> None:
    given = tensors(4, 2, torch.float32)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(nn.Module(), *given, None)
    assert max(kept) < 2 * 4 * T * T


def test_numbers_that_are_not_finite_stay_in_their_row() -> None:
    query, key, value = (tensor.detach().clone() for tensor in tensors(2, 2, torch.float32))
    query[0, 0, 0, 0] = math.nan
    found = attention(nn.Module(), query, key, value, None)[0]
    assert found[0].isnan().any()
    assert found[1].isfinite().all()
