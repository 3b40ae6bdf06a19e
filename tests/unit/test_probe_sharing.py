"""Which bases can compute several jobs in a pass: a neighbour must not be felt, whatever becomes of it."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from raytune_ft.train.batch import Tokens, assemble
from raytune_ft.train.probe import can_share_passes

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "pad_token_id": 2,
}


def trickling() -> PreTrainedModel:
    """Each token takes a millionth of the one before it, as a recurrent layer that forgets fast."""
    model = tiny.llama()

    def mix(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        return output + 1e-6 * output.roll(1, dims=1)

    model.model.layers[0].mlp.register_forward_hook(mix)
    return model


def reordering() -> PreTrainedModel:
    """A layer sees all tokens, but in another order, as experts do."""
    model = tiny.llama()
    layer = model.model.layers[1].mlp
    layer.register_forward_pre_hook(lambda _, given: (given[0].flip(1), *given[1:]))
    layer.register_forward_hook(lambda *passed: passed[-1].flip(1))
    return model


def falcon() -> PreTrainedModel:
    torch.manual_seed(0)
    return FalconForCausalLM(
        FalconConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    ).eval()


def convolving() -> PreTrainedModel:
    torch.manual_seed(0)
    return Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"], **SIZES)).eval()


def experts() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES)).eval()


def windows() -> PreTrainedModel:
    """Of fewer tokens than the examples have."""
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(head_dim=16, sliding_window=4, **SIZES)).eval()


def longrope() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=320,
            max_position_embeddings=128,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 32,
            },
        )
    ).eval()


@pytest.mark.parametrize("build", [trickling, reordering, falcon, convolving])
def test_a_base_through_which_a_neighbour_is_felt_is_not_shared(build: Any) -> None:
    assert not can_share_passes(build(), max_tokens=64)


@pytest.mark.parametrize("build", [experts, windows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_through_which_no_neighbour_is_felt_is_shared(build: Any, dtype: torch.dtype) -> None:
    assert can_share_passes(build().to(dtype), max_tokens=64)


def test_positions_that_depend_on_the_longest_row_of_a_pass() -> None:
    assert can_share_passes(longrope(), max_tokens=32)
    assert not can_share_passes(longrope(), max_tokens=33)


@pytest.mark.parametrize("build", [tiny.llama, trickling])
def test_the_base_is_left_as_it_was(build: Any) -> None:
    model = build().requires_grad_(False)
    before, config = dict(model.named_modules()), model.config.to_dict()
    can_share_passes(model, max_tokens=64)
    assert dict(model.named_modules()) == before
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in model.parameters())


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4))
def test_plain_batches_are_those_whose_rows_are_one_example(rows: list[list[int]]) -> None:
    batch = assemble(
        [[Tokens(np.arange(length), np.ones(length, dtype=np.bool_)) for length in row] for row in rows], 0
    )
    assert batch.plain == bool((batch.position_ids_BT.diff(dim=1) == 1).all())
