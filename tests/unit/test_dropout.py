"""Dropout: a pure function of job, module, step, example, position and feature."""

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from raytune_ft.methods import METHODS
from raytune_ft.methods.dropout import dropped, feature_keys, module_seed, token_keys
from raytune_ft.methods.lora import Adapter
from raytune_ft.spec import LoraSpec, OptimizerSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Arrangement, Classes, Continuations, Layout, Pairs, Step, Tokens
from raytune_ft.train.loop import fit

CPU = torch.device("cpu")
FEATURES = 512


def mask(
    *,
    seed: int = 0,
    module: str = "q",
    step: int = 0,
    examples: int = 40,
    tokens: int = 50,
    rate: float = 0.1,
) -> Tensor:
    """(examples · tokens, FEATURES): True where dropped."""
    own = module_seed(seed, module)
    example_N = torch.arange(examples).repeat_interleave(tokens)
    position_N = torch.arange(tokens).repeat(examples)
    return dropped(own, token_keys(step, example_N, position_N), feature_keys(own, FEATURES, CPU), rate)


def sigmas(share: float, expected: float, count: int) -> float:
    """How far a share of `count` draws is from what is expected, in standard deviations."""
    return abs(share - expected) / math.sqrt(expected * (1 - expected) / count)


class TestMask:
    @pytest.mark.parametrize("rate", [0.001, 0.05, 0.1, 0.5, 0.9])
    def test_the_rate_is_kept_overall_and_in_every_token_and_feature(self, rate: float) -> None:
        drop_NF = mask(rate=rate)
        assert sigmas(float(drop_NF.float().mean()), rate, drop_NF.numel()) < 4
        for dim in (0, 1):
            shares = drop_NF.float().mean(dim)
            count = drop_NF.shape[dim]
            spread = float(shares.std()) / math.sqrt(rate * (1 - rate) / count)
            assert spread == pytest.approx(1.0, abs=0.15)
            assert sigmas(float(shares.max()), rate, count) < (6 if rate > 0.01 else 20)

    def test_nothing_is_dropped_at_a_rate_of_zero(self) -> None:
        assert not mask(rate=0.0).any()

    @pytest.mark.parametrize(
        "other",
        [
            {"seed": 1},
            {"module": "k"},
            {"step": 1},
            {"step": 1 << 20},
            {"step": 1, "seed": 1},
        ],
        ids=str,
    )
    def test_another_seed_module_or_step_draws_independently(self, other: dict[str, int]) -> None:
        one, two = mask(rate=0.5), mask(rate=0.5, **other)  # type: ignore[arg-type]
        assert sigmas(float((one == two).float().mean()), 0.5, one.numel()) < 4

    @pytest.mark.parametrize("apart", [1, 2, 3, 8, 50, 64, 100, 511])
    def test_neighbours_are_independent(self, apart: int) -> None:
        drop_NF = mask(rate=0.5)
        tokens = (drop_NF[apart:] == drop_NF[:-apart]).float()
        assert sigmas(float(tokens.mean()), 0.5, tokens.numel()) < 4
        features = (drop_NF[:, apart:] == drop_NF[:, :-apart]).float()
        assert sigmas(float(features.mean()), 0.5, features.numel()) < 4

    def test_four_elements_are_independent(self) -> None:
        # A key of the token plus a key of the feature would make the fourth corner of a rectangle follow
        # from three, were they not hashed well.
        drop_NF = mask(rate=0.5)
        for tokens in (1, 50):
            for features in (1, 16):
                a, b = drop_NF[:-tokens, :-features], drop_NF[tokens:, :-features]
                c, d = drop_NF[:-tokens, features:], drop_NF[tokens:, features:]
                odd = (a ^ b ^ c ^ d).float()
                assert sigmas(float(odd.mean()), 0.5, odd.numel()) < 4

    def test_a_mask_is_what_it_was(self) -> None:
        # A change here changes every adapter that is trained with dropout from now on.
        drop_NF = mask(seed=7, module="model.layers.0.mlp.down_proj", step=3, examples=2, tokens=2, rate=0.25)
        assert drop_NF.sum(1).tolist() == [140, 132, 134, 126]

    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**40), st.data())
    def test_an_element_does_not_depend_on_those_beside_it(
        self, examples: int, tokens: int, step: int, data: st.DataObject
    ) -> None:
        own = module_seed(data.draw(st.integers(0, 2**63 - 1)), "m")
        keys_F = feature_keys(own, 96, CPU)
        example_N = torch.arange(examples).repeat_interleave(tokens)
        position_N = torch.arange(tokens).repeat(examples)
        whole = dropped(own, token_keys(step, example_N, position_N), keys_F, 0.3)
        chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=20)))
        part = dropped(own, token_keys(step, example_N[chosen], position_N[chosen]), keys_F[:40], 0.3)
        assert torch.equal(part, whole[chosen][:, :40])


ARRANGEMENTS: dict[str, Arrangement] = {
    "llama": Continuations(),
    "gpt2": Continuations(),
    "t5": Pairs(eos_id=1, start_id=2),
    "bert": Classes(3, lambda ids: int(ids[0]) % 3),
}
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "t5": tiny.t5, "bert": tiny.bert}


def trained(family: str, layouts: list[Layout], *, checkpointing: bool = False) -> BankEngine:
    """After some steps, each of which is laid out by the next of the layouts."""
    model: PreTrainedModel = MODELS[family]()
    model.requires_grad_(False)
    method = LoraSpec(rank=4, alpha=8, dropout=0.3)
    # Adam divides by the gradient's own size, so a small epsilon would blow up the rounding of tiny ones.
    optimizer = OptimizerSpec(learning_rate=1e-3, epsilon=1e-4)
    parameters = METHODS[LoraSpec].add(model, method, 0, 0)
    engine = BankEngine(Bank(model, gradient_checkpointing=checkpointing), parameters, optimizer)
    steps = []
    for number, layout in enumerate(layouts):
        random = np.random.default_rng(number)
        examples = [
            Tokens(random.integers(6, 60, n), np.arange(n) >= n - 3, number=at)
            for at, n in enumerate((9, 14, 5, 22, 7))
        ]
        steps.append(Step(layout.batches(examples), len(examples), "", 1))
    fit(engine, steps, start=0, learning_rate=lambda _: 1e-3, report=lambda _: None)
    return engine


@pytest.mark.parametrize("family", MODELS)
def test_a_layout_changes_no_mask(family: str) -> None:
    arrangement = ARRANGEMENTS[family]
    whole = Layout(True, 64, 2, None, 4096, arrangement)
    others = [
        Layout(False, 64, 2, None, 4096, arrangement),
        Layout(True, 64, 2, 2, 4096, arrangement),
        Layout(False, 64, 2, 1, 4096, arrangement),
        Layout(True, 32, 2, None, 64, arrangement),
    ]
    one = trained(family, [whole] * 3)
    for other in (trained(family, [layout] * 3) for layout in others):
        for name, parameter in one.parameters.items():
            torch.testing.assert_close(parameter, other.parameters[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradient_checkpointing_draws_the_same_masks(family: str) -> None:
    layout = Layout(True, 64, 2, None, 4096, ARRANGEMENTS[family])
    one, other = trained(family, [layout] * 3), trained(family, [layout] * 3, checkpointing=True)
    assert all(torch.equal(p, other.parameters[name]) for name, p in one.parameters.items())


def test_what_is_kept_makes_up_for_what_is_dropped() -> None:
    adapter = Adapter(torch.nn.Linear(8, 8), LoraSpec(rank=2, alpha=6, dropout=0.25), 0, "m")
    assert adapter.train().scale == pytest.approx(3 / 0.75)
    assert adapter.eval().scale == 3
