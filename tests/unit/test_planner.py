"""The planner's arithmetic, against models that are really built and plans that can be checked by hand."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from raytune_ft.errors import ModelError
from raytune_ft.methods.lora import add_lora
from raytune_ft.models import read_facts
from raytune_ft.planner import (
    LOGITS_CHUNK_TOKENS,
    ModelFacts,
    check_max_tokens,
    choose,
    memory_plan,
    trainable_parameters,
    weight_bytes,
)
from raytune_ft.spec import JobSpec, LoraSpec, parse_job

GIB = 2**30
USABLE = 0.85
"""Share of a device that a plan may fill."""

SHAPES: dict[str, transformers.PreTrainedConfig] = {
    "llama-3.2-1b": transformers.LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "llama-untied": transformers.LlamaConfig(num_hidden_layers=4),
    "mistral-grouped-heads": transformers.MistralConfig(num_hidden_layers=4),
    "gpt2": transformers.GPT2Config(),
    "gpt-neox": transformers.GPTNeoXConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "opt": transformers.OPTConfig(),
    "falcon-one-key-head": transformers.FalconConfig(num_hidden_layers=2),
    "qwen3-wide-heads": transformers.Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
    ),
    "phi-two-matrices": transformers.PhiConfig(num_hidden_layers=4),
    "mixtral-experts": transformers.MixtralConfig(num_hidden_layers=2),
    "qwen3-small-experts": transformers.Qwen3MoeConfig(num_hidden_layers=2),
}


def job(**changes: Any) -> JobSpec:
    return parse_job(
        {
            "name": "plan",
            "model": {"path": "org/base"},
            "data": {"sources": [{"uri": "data.jsonl"}]},
            "publish": {"catalog": "catalog"},
            **changes,
        }
    )


def with_model(**model: Any) -> JobSpec:
    return job(model={"path": "org/base", **model})


def facts(**changes: Any) -> ModelFacts:
    config = {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        **changes,
    }
    return ModelFacts.from_config(config)


class TestFacts:
    @pytest.mark.parametrize("name", SHAPES)
    def test_parameters_of_a_model_that_is_built(self, name: str, tmp_path: Path) -> None:
        config = SHAPES[name]
        config.save_pretrained(tmp_path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        true = sum(parameter.numel() for parameter in model.parameters())
        found = read_facts(tmp_path)
        assert found.parameters == pytest.approx(true, rel=0.03)
        embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        assert found.embedding_parameters == sum(weight.numel() for weight in embeddings)

    def test_the_text_part_of_a_larger_config(self) -> None:
        text = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "vocab_size": 320,
        }
        assert ModelFacts.from_config({"text_config": text}) == ModelFacts.from_config(text)
        assert ModelFacts.from_config({"text_config": None, **text}) == ModelFacts.from_config(text)

    @pytest.mark.parametrize(
        ("left_out", "names"),
        [
            ("hidden_size", "hidden_size, n_embd, d_model"),
            ("num_hidden_layers", "num_hidden_layers, n_layer, num_layers, n_layers"),
            ("vocab_size", "vocab_size"),
        ],
    )
    def test_a_dimension_that_is_missing(self, left_out: str, names: str, tmp_path: Path) -> None:
        config = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320}
        del config[left_out]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError) as caught:
            read_facts(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path / 'config.json'} has none of {names}; so this is no causal language model"
        )


class TestMemory:
    def test_trainable_parameters_are_those_that_lora_adds(self) -> None:
        base = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                vocab_size=320,
            )
        )
        added = add_lora(base, LoraSpec(rank=6), seed=0)
        assert trainable_parameters(
            ModelFacts.from_config(base.config.to_dict()), job(method={"rank": 6})
        ) == sum(parameter.numel() for parameter in added.values())

    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2], ids=["grouped-heads", "gpt2"])
    def test_trainable_parameters_are_an_upper_estimate(self, build: Any) -> None:
        base = build()
        estimate = trainable_parameters(ModelFacts.from_config(base.config.to_dict()), job())
        added = sum(parameter.numel() for parameter in add_lora(base, LoraSpec(), seed=0).values())
        assert added <= estimate <= 1.5 * added

    def test_full_training_trains_everything(self) -> None:
        spec = job(model={"path": "x", "weight_bits": 32}, method={"kind": "full"})
        plan = memory_plan(facts(), spec, resident="packed", tokens_per_forward=512)
        assert plan.weights == plan.gradients == 4 * facts().parameters
        assert plan.optimizer == 8 * facts().parameters

    @pytest.mark.parametrize(("bits", "bytes_each"), [(4, 4.127 / 8), (8, 1), (16, 2), (32, 4)])
    @pytest.mark.parametrize("tied", [True, False])
    def test_weights_by_hand(self, bits: int, bytes_each: float, tied: bool) -> None:
        found = facts(tie_word_embeddings=tied)
        embeddings = 32000 * 1024 * (1 if tied else 2)
        linear = 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
        assert found.parameters == embeddings + linear
        held = weight_bytes(found, with_model(weight_bits=bits).model, "packed")
        assert held == pytest.approx(linear * bytes_each + embeddings * (4 if bits == 32 else 2), abs=1)

    def test_four_bits_count_only_while_they_are_packed(self) -> None:
        packed, dequantised = (
            weight_bytes(facts(), with_model().model, resident) for resident in ("packed", "dequantised")
        )
        assert dequantised == 2 * facts().parameters > 2 * packed

    def test_checkpointing_keeps_less(self) -> None:
        kept, recomputed = (
            memory_plan(
                facts(),
                with_model(gradient_checkpointing=on),
                resident="packed",
                tokens_per_forward=512,
            )
            for on in (False, True)
        )
        assert recomputed.activations < kept.activations / 4
        assert (recomputed.weights, recomputed.optimizer) == (kept.weights, kept.optimizer)

    dimensions = st.fixed_dictionaries(
        {
            "hidden_size": st.integers(1, 64).map(lambda n: 64 * n),
            "num_hidden_layers": st.integers(1, 100),
            "num_attention_heads": st.just(4),
            "intermediate_size": st.integers(1, 20_000),
            "vocab_size": st.integers(1, 300_000),
            "tie_word_embeddings": st.booleans(),
        }
    )

    @given(
        dimensions,
        st.sampled_from(["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"]),
        st.sampled_from([4, 8, 16, 32]),
        st.booleans(),
        st.sampled_from(["packed", "dequantised"]),
        st.integers(8, 10_000),
    )
    def test_no_term_shrinks_when_a_dimension_grows(
        self, config: dict[str, Any], grown: str, bits: int, full: bool, resident: str, tokens: int
    ) -> None:
        assume(not full or bits >= 16)
        spec = job(
            model={"path": "x", "weight_bits": bits}, method={"kind": "full"} if full else {"kind": "lora"}
        )
        small, large = (
            asdict(
                memory_plan(ModelFacts.from_config(shape), spec, resident=resident, tokens_per_forward=tokens)
            )
            for shape in (config, {**config, grown: 2 * config[grown]})
        )
        assert all(large[term] >= small[term] >= 0 for term in small)
        assert sum(large.values()) > sum(small.values())

    @given(st.integers(8, 100_000), st.integers(1, 512), st.booleans())
    def test_tokens_cost_activations_and_rank_costs_training(
        self, tokens: int, rank: int, checkpointing: bool
    ) -> None:
        def plan(tokens: int, rank: int) -> dict[str, int]:
            spec = job(model={"path": "x", "gradient_checkpointing": checkpointing}, method={"rank": rank})
            return asdict(memory_plan(facts(), spec, resident="packed", tokens_per_forward=tokens))

        base, longer, wider = plan(tokens, rank), plan(2 * tokens, rank), plan(tokens, 2 * rank)
        more = {term for term in base if longer[term] > base[term]}
        assert more == {"activations"} | ({"logits"} if tokens < LOGITS_CHUNK_TOKENS else set())
        assert {term for term in base if wider[term] > base[term]} == {"weights", "gradients", "optimizer"}
        assert all(longer[term] >= base[term] <= wider[term] for term in base)

    def test_eight_bit_moments_are_a_quarter(self) -> None:
        plain, small = (
            memory_plan(
                facts(), job(optimizer={"kind": kind}), resident="packed", tokens_per_forward=512
            ).optimizer
            for kind in ("adamw", "paged_adamw_8bit")
        )
        assert plain == 4 * small == 8 * trainable_parameters(facts(), job())


class TestChoice:
    def bytes_for(self, spec: JobSpec, resident: str, tokens: int, share: float = 1.0) -> int:
        """A device of which a plan may fill exactly what this one needs, divided by `share`."""
        needed = memory_plan(facts(), spec, resident=resident, tokens_per_forward=tokens).total
        return int(needed / share / USABLE) + 2

    def test_a_large_device_holds_the_dequantised_base_and_the_whole_batch(self) -> None:
        chosen = choose(job(), facts(), 1000 * GIB)
        assert chosen.resident == "dequantised"
        assert chosen.tokens_per_forward == 32 * 512
        assert chosen.memory == memory_plan(
            facts(), job(), resident="dequantised", tokens_per_forward=32 * 512
        )

    def test_dequantised_only_where_half_of_the_memory_stays(self) -> None:
        enough = self.bytes_for(job(), "dequantised", 512, share=0.5)
        assert choose(job(), facts(), enough).resident == "dequantised"
        assert choose(job(), facts(), enough - 100).resident == "packed"

    @pytest.mark.parametrize("resident", ["packed", "dequantised"])
    def test_what_the_job_says_counts(self, resident: str) -> None:
        spec = with_model(resident=resident)
        device = self.bytes_for(spec, "dequantised", 512) if resident == "dequantised" else 1000 * GIB
        assert choose(spec, facts(), device).resident == resident

    @pytest.mark.parametrize("bits", [8, 16, 32])
    def test_only_four_bits_are_dequantised(self, bits: int) -> None:
        spec = with_model(weight_bits=bits, resident="dequantised")
        assert choose(spec, facts(), 1000 * GIB).resident == "packed"

    @given(st.integers(1, 40), st.integers(8, 1024), st.floats(0.3, 300))
    def test_tokens_stay_within_batch_and_memory(
        self, sequences: int, max_tokens: int, device_gib: float
    ) -> None:
        data = {"sources": [{"uri": "data.jsonl"}], "max_tokens": max_tokens}
        spec = job(batch={"sequences": sequences}, data=data)
        usable = int(device_gib * GIB) * USABLE
        try:
            chosen = choose(spec, facts(), int(device_gib * GIB))
        except ModelError:
            least = memory_plan(facts(), spec, resident="packed", tokens_per_forward=max_tokens)
            assert least.total > int(usable)
            return
        assert max_tokens <= chosen.tokens_per_forward <= sequences * max_tokens
        assert chosen.memory == memory_plan(
            facts(), spec, resident=chosen.resident, tokens_per_forward=chosen.tokens_per_forward
        )
        assert chosen.memory.total <= usable
        if chosen.tokens_per_forward > max_tokens:
            assert chosen.memory.total <= usable / 2

    def test_one_row_may_fill_the_device(self) -> None:
        spec = with_model(resident="packed")
        assert choose(spec, facts(), self.bytes_for(spec, "packed", 512)).tokens_per_forward == 512

    def test_the_refusal_names_terms_and_remedy(self) -> None:
        with pytest.raises(ModelError) as caught:
            choose(with_model(weight_bits=16), facts(), GIB // 4)
        plan = memory_plan(facts(), with_model(weight_bits=16), resident="packed", tokens_per_forward=512)
        weights, gradients, optimizer, activations, logits = (
            f"{value / GIB:.2f}" for value in asdict(plan).values()
        )
        assert str(caught.value) == (
            f"org/base needs {plan.total / GIB:.2f} GiB to train on one row of 512 tokens "
            f"(GiB: weights {weights}, gradients {gradients}, optimizer {optimizer}, "
            f"activations {activations}, logits {logits}), and the device can give 0.21; "
            "use model.weight_bits: 4"
        )

    @pytest.mark.parametrize(
        ("sections", "shape", "largest", "remedy"),
        [
            ({"model": {"weight_bits": 16}}, {}, "weights", "use model.weight_bits: 4"),
            ({"model": {"resident": "dequantised"}}, {}, "weights", "use model.resident: packed"),
            ({}, {"num_hidden_layers": 1}, "logits", "use a smaller data.max_tokens"),
            (
                {"method": {"rank": 4096}, "optimizer": {"kind": "adamw_8bit"}},
                {},
                "weights",
                "use a larger device, or a smaller base",
            ),
            ({"method": {"rank": 4096}}, {}, "optimizer", "use optimizer.kind: adamw_8bit"),
            (
                {"model": {"weight_bits": 32}, "method": {"kind": "full"}},
                {},
                "optimizer",
                "use optimizer.kind: adamw_8bit",
            ),
            (
                {
                    "model": {"weight_bits": 16},
                    "method": {"kind": "full"},
                    "optimizer": {"kind": "adamw_8bit"},
                },
                {},
                "gradients",
                "use method.kind: lora",
            ),
            (
                {"data": {"max_tokens": 8192}},
                {},
                "activations",
                "use model.gradient_checkpointing: true, or a smaller data.max_tokens",
            ),
            (
                {"data": {"max_tokens": 65536}, "model": {"gradient_checkpointing": True}},
                {},
                "activations",
                "use a smaller data.max_tokens",
            ),
        ],
    )
    def test_the_remedy_makes_the_largest_term_smaller(
        self, sections: dict[str, Any], shape: dict[str, Any], largest: str, remedy: str
    ) -> None:
        model = {"path": "org/base", **sections.pop("model", {})}
        data = {"sources": [{"uri": "data.jsonl"}], **sections.pop("data", {})}
        with pytest.raises(ModelError) as caught:
            choose(job(model=model, data=data, **sections), facts(**shape), GIB // 16)
        message = str(caught.value)
        assert message.endswith(f"; {remedy}")
        listed = {name: float(size) for name, size in re.findall(r"(\w+) (\d+\.\d\d)[,)]", message)}
        assert max(listed, key=lambda name: listed[name]) == largest


def test_max_tokens_above_the_positions() -> None:
    data = {"sources": [{"uri": "data.jsonl"}], "max_tokens": 2049}
    with pytest.raises(ModelError) as caught:
        check_max_tokens(job(data=data), facts())
    assert str(caught.value) == (
        "data.max_tokens = 2049 is above the 2048 positions of org/base; set data.max_tokens: 2048 or less"
    )
    check_max_tokens(job(data={**data, "max_tokens": 2048}), facts())
    check_max_tokens(job(data=data), facts(max_position_embeddings=None))
