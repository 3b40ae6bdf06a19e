"""Training some of the weights, or more and more of them, against plain torch that does the same."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from raytune_ft.errors import ModelError, SpecError
from raytune_ft.methods import METHODS
from raytune_ft.methods.selective import Unfreezing, layer_groups, layer_of, selected, unfreezing
from raytune_ft.spec import FullSpec, OptimizerSpec, TrainOnlySpec, parse_job
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Layout, Step, Tokens
from raytune_ft.train.loop import StepReport, fit

LLAMA = ["embed.weight", *(f"layers.{n}.{part}" for n in range(4) for part in ("q.weight", "q.bias")), "norm"]
STEPS = 7
EVERY = 2
OPTIMIZER = OptimizerSpec(epsilon=1e-4, weight_decay=0.1, max_grad_norm=0.5)
"""Adam divides by the gradient's own size, so a small epsilon would blow up the rounding of tiny ones."""
RATE = 1e-2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def full(**fields: Any) -> FullSpec:
    return FullSpec.model_validate(fields)


def untied_llama() -> PreTrainedModel:
    model = tiny.llama()
    config = model.config
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    return type(model)(config).eval()


def examples(step: int) -> list[Tokens]:
    random = np.random.default_rng(step)
    return [Tokens(random.integers(3, 320, n), np.arange(n) >= n // 2) for n in (9, 14, 5)]


def step_of(number: int) -> Step:
    return Step(Layout(False, 64, 2, 2, 4096).batches(examples(number)), 3, "", 1)


def engine(model: PreTrainedModel, spec: FullSpec, **settings: Any) -> BankEngine:
    model.requires_grad_(False)
    method = METHODS[FullSpec]
    parameters = method.add(model, spec, 0)
    bank = Bank(model, **settings)
    return BankEngine(bank, parameters, OPTIMIZER, unfreezing=method.unfreezing(model, spec))


def train(bank: BankEngine, start: int = 0, end: int = STEPS) -> list[StepReport]:
    reports: list[StepReport] = []
    steps = map(step_of, range(start, end))
    fit(bank, steps, start=start, learning_rate=lambda _: RATE, report=reports.append)
    return reports


def plain_torch(model: PreTrainedModel, trained: Callable[[int, str], bool]) -> list[float]:
    """The textbook's way: freeze what is not trained in a step, one example at a time, no engine."""
    named = dict(model.named_parameters())
    decay = {True: OPTIMIZER.weight_decay, False: 0.0}
    groups = [{"params": [p], "weight_decay": decay[p.ndim >= 2]} for p in named.values()]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.epsilon)
    losses = []
    for step in range(STEPS):
        for name, parameter in named.items():
            parameter.requires_grad_(trained(step, name))
        sums = []
        for example in examples(step):
            ids = torch.from_numpy(example.input_ids)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            learned = torch.from_numpy(example.learned[1:])
            sums.append(F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum"))
        loss = torch.stack(sums).sum() / sum(int(e.learned[1:].sum()) for e in examples(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), OPTIMIZER.max_grad_norm or 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


class TestNames:
    def test_layers_of_real_models(self) -> None:
        t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
        for model, last, count in (
            (tiny.llama(), "model.layers.1", 2),
            (tiny.gpt2(), "transformer.h.1", 2),
            (t5, "decoder.block.1", 4),
        ):
            names = [name for name, _ in model.named_parameters()]
            top, *between, bottom = layer_groups(names)
            assert len(between) + 1 == count
            assert {layer_of(name) for name in top} == {last, None}
            assert {layer_of(name) for name in bottom} == {None}
            assert sorted(name for group in (top, *between, bottom) for name in group) == sorted(names)

    def test_what_follows_the_layers_belongs_to_the_last(self) -> None:
        top, *_, bottom = layer_groups(LLAMA)
        assert top == ["layers.3.q.weight", "layers.3.q.bias", "norm"]
        assert bottom == ["embed.weight"]

    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ({"layers": "last-1"}, ["layers.3.q.weight", "layers.3.q.bias", "norm"]),
            ({"layers": "last-4"}, LLAMA[1:]),
            ({"biases": True}, [f"layers.{n}.q.bias" for n in range(4)]),
            ({"patterns": [r"\.0\.", "^norm$"]}, ["layers.0.q.weight", "layers.0.q.bias", "norm"]),
            ({"patterns": ["weight", "q"]}, LLAMA[:-1]),
        ],
    )
    def test_what_is_selected(self, spec: dict[str, Any], expected: list[str]) -> None:
        assert selected(LLAMA, TrainOnlySpec.model_validate(spec)) == expected

    @pytest.mark.parametrize(
        ("spec", "names", "message"),
        [
            (
                {"layers": "last-5"},
                LLAMA,
                "method.train_only.layers = last-5: the base has 4 layers; use last-4 or fewer",
            ),
            (
                {"layers": "last-2"},
                ["a", "b"],
                "method.train_only.layers = last-2: the base has no numbered layers; use patterns; "
                "its weights are a, b",
            ),
            (
                {"biases": True},
                ["embed.weight", "layers.0.q.weight"],
                "method.train_only.biases: the base has no biases; use layers or patterns; "
                "its weights are embed.weight, layers.0.q.weight",
            ),
            (
                {"patterns": ["norm", "k_proj"]},
                LLAMA,
                "method.train_only.patterns: 'k_proj' is found in no weight's name; the base has "
                "embed.weight, layers.0.q.weight, layers.0.q.bias, norm and 4 more",
            ),
        ],
    )
    def test_what_the_base_does_not_have(self, spec: dict[str, Any], names: list[str], message: str) -> None:
        with pytest.raises(ModelError) as caught:
            selected(names, TrainOnlySpec.model_validate(spec))
        assert str(caught.value) == message


class TestSchedule:
    @given(
        st.lists(st.integers(0, 9), min_size=1, max_size=30),
        st.integers(1, 10),
        st.integers(0, 400),
        st.data(),
    )
    def test_layers_join_from_the_last_one_down_and_stay(
        self, layers: list[int], every: int, step: int, data: st.DataObject
    ) -> None:
        names = ["embed", *(f"layers.{at}.{n}" for n, at in enumerate(sorted(layers)))]
        trained = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        schedule = unfreezing(names, trained, every)
        now, later = schedule.trained(step), schedule.trained(step + every)
        assert now
        assert now <= later <= set(trained)
        # In each interval exactly one more layer joins, until all have.
        joined = {layer_of(name) for name in later} - {layer_of(name) for name in now}
        assert len(joined) == (now != set(trained))
        frozen = [layer_of(name) or "" for name in set(trained) - now]
        assert max(frozen, default="") < min(layer_of(name) or "" for name in now) or not frozen
        assert schedule.trained(every * len(names)) == set(trained)

    def test_by_hand(self) -> None:
        schedule = unfreezing(["e", "l.0.w", "l.1.w", "l.2.w", "n"], ["l.0.w", "l.2.w", "n", "e"], 3)
        assert schedule == Unfreezing(
            (frozenset({"l.2.w", "n"}), frozenset({"l.0.w"}), frozenset({"e"})), every_steps=3
        )
        assert [len(schedule.trained(step)) for step in range(8)] == [2, 2, 2, 3, 3, 3, 4, 4]


SELECTIONS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], str]] = {
    "layers": (tiny.llama, {"layers": "last-1"}, r"layers\.1\.|\.norm\."),
    "layers-own-head": (untied_llama, {"layers": "last-1"}, r"layers\.1\.|\.norm\.|lm_head"),
    "head-alone": (untied_llama, {"patterns": ["lm_head"]}, "lm_head"),
    "embeddings-alone": (tiny.llama, {"patterns": ["embed_tokens"]}, "embed_tokens"),
    "patterns": (tiny.gpt2, {"patterns": [r"h\.0\.mlp", "wpe"]}, r"h\.0\.mlp|wpe"),
    "biases": (tiny.gpt2, {"biases": True}, "bias$"),
}


class TestTraining:
    @pytest.mark.parametrize("name", SELECTIONS)
    def test_train_only_is_plain_torch_with_frozen_weights(self, name: str, tmp_path: Path) -> None:
        build, spec, expected = SELECTIONS[name]
        bank, other = engine(build(), full(train_only=spec)), build()
        losses = plain_torch(other, lambda _, name: re.search(expected, name) is not None)
        assert [r.loss for r in train(bank)] == pytest.approx(losses, abs=1e-5)
        base = build().state_dict()
        # What is published is the whole model.
        METHODS[FullSpec].save(bank.model, full(), tmp_path, "")
        published = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        for key, weight in other.state_dict().items():
            torch.testing.assert_close(published[key], weight, rtol=0, atol=1e-4)
            untouched = torch.equal(published[key], base[key])
            tied_head = key == "lm_head.weight" and other.config.tie_word_embeddings
            assert untouched != bool(re.search(expected, "embed_tokens" if tied_head else key))

    @pytest.mark.parametrize("only", [None, {"layers": "last-2"}], ids=["all", "layers"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_unfreezing_is_plain_torch_that_thaws(
        self, only: dict[str, Any] | None, checkpointing: bool
    ) -> None:
        spec = full(train_only=only, unfreeze={"every_steps": EVERY})
        bank, other = engine(tiny.llama(), spec, gradient_checkpointing=checkpointing), tiny.llama()
        order = [r"layers\.1\.|\.norm\.", r"layers\.0\.", *([] if only else ["embed_tokens"])]

        def trained(step: int, name: str) -> bool:
            return any(re.search(part, name) for part in order[: 1 + step // EVERY])

        losses = plain_torch(other, trained)
        reports = train(bank)
        assert [report.loss for report in reports] == pytest.approx(losses, abs=1e-5)
        for key, weight in other.state_dict().items():
            torch.testing.assert_close(bank.model.state_dict()[key], weight, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
    @pytest.mark.parametrize("stop", [1, EVERY, 2 * EVERY + 1])
    def test_goes_on_bit_for_bit(self, kind: Any, stop: int, tmp_path: Path) -> None:
        spec = full(unfreeze={"every_steps": EVERY})
        optimizer = OPTIMIZER.model_copy(update={"kind": kind})

        def new() -> BankEngine:
            model = tiny.llama().requires_grad_(False)
            method = METHODS[FullSpec]
            parameters = method.add(model, spec, 0)
            return BankEngine(Bank(model), parameters, optimizer, unfreezing=method.unfreezing(model, spec))

        whole, first, second = new(), new(), new()
        train(whole)
        train(first, end=stop)
        tiny.keep(first, tmp_path)
        second.load(tmp_path)
        train(second, start=stop)
        for name, parameter in whole.parameters.items():
            assert torch.equal(parameter, second.parameters[name])

    def test_bfloat16_weights_stay_until_they_join(self) -> None:
        bank = engine(tiny.llama().to(torch.bfloat16), full(unfreeze={"every_steps": STEPS}))
        before = {name: p.detach().clone() for name, p in bank.parameters.items()}
        train(bank)
        moved = {name for name, p in bank.parameters.items() if not torch.equal(p, before[name])}
        assert moved
        assert {layer_of(name) for name in moved} == {"model.layers.1", None}
        assert "model.embed_tokens.weight" not in moved

    def test_a_new_head_is_always_trained(self) -> None:
        config = BertConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=50
        )
        model = BertForSequenceClassification(config).requires_grad_(False)
        names = METHODS[FullSpec].add(model, full(train_only={"biases": True}), 0)
        assert "classifier.weight" in names
        assert all(name.endswith("bias") for name in names if name != "classifier.weight")


class TestSpec:
    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (
                {"train_only": {"layers": "first-2"}},
                "method.train_only.layers = 'first-2': must be last- and a number of layers from 1 to 9999, "
                "such as last-4",
            ),
            (
                {"train_only": {"patterns": ["(", "norm"]}},
                "method.train_only.patterns[0] = '(': is no regular expression: "
                "missing ), unterminated subpattern at position 0",
            ),
            (
                {"train_only": {"biases": True, "layers": "last-1"}},
                "method.train_only: give one of layers: last-4, patterns: [...] and biases: true",
            ),
            (
                {"train_only": {}},
                "method.train_only: give one of layers: last-4, patterns: [...] and biases: true",
            ),
            ({"unfreeze": {"every_steps": 0}}, "method.unfreeze.every_steps = 0: must be greater than 0"),
            ({"unfreeze": {}}, "method.unfreeze.every_steps: required, but not given"),
        ],
    )
    def test_bad_fields(self, method: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError) as caught:
            parse_job(self.values(method))
        assert str(caught.value) == f"job has 1 problem:\n  {message}"

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_unfreezing_is_refused_where_weights_are_divided(self, stage: int) -> None:
        values = self.values({"unfreeze": {"every_steps": 5}})
        parse_job(values)
        with pytest.raises(SpecError) as caught:
            parse_job({**values, "cluster": {"workers": 2, "zero_stage": stage}})
        assert str(caught.value) == (
            "job has 1 problem:\n  method.unfreeze adds weights while it trains, and cluster.zero_stage = "
            f"{stage} divides them once; use zero_stage: 0, or remove unfreeze"
        )

    def values(self, method: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": "selective",
            "model": {"path": "org/base", "weight_bits": 32},
            "data": {"sources": [{"uri": "data.jsonl"}]},
            "publish": {"catalog": "catalog"},
            "method": {"kind": "full", **method},
        }
