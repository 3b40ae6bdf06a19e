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
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from raytune_ft.errors import ModelError
from raytune_ft.methods.lora import add_lora
from raytune_ft.model_files import read_facts
from raytune_ft.planner import (
    LOGITS_CHUNK_TOKENS,
    ModelFacts,
    alternatives,
    bucket_elements,
    check_max_tokens,
    choose,
    memory_plan,
    options,
    settings,
    trainable_parameters,
    weight_bytes,
    zero_states,
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
    "deepseek-shared-experts": transformers.DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=0),
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
        with pytest.raises(ModelError, match=r"config.json: text_config: must be an object"):
            ModelFacts.from_config({"text_config": [1]})
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
            f"{tmp_path / 'config.json'} has none of {names}: not the config of a language model; "
            "name the folder of one in model.path"
        )

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("hidden_size", -2048, "-2048"),
            ("num_hidden_layers", 0, "0"),
            ("vocab_size", True, "true"),
            ("head_dim", 64.5, "64.5"),
            ("num_key_value_heads", "8", '"8"'),
            ("intermediate_size", [4096], "[4096]"),
            ("num_local_experts", 8.0, "8.0"),
            ("max_position_embeddings", float("inf"), "Infinity"),
        ],
    )
    def test_a_dimension_that_is_none(self, field: str, value: Any, said: str) -> None:
        with pytest.raises(ModelError) as caught:
            facts(**{field: value})
        assert str(caught.value) == f"config.json: {field} = {said}: must be a whole number above 0"

    def test_a_dimension_beyond_all_models(self) -> None:
        with pytest.raises(ModelError, match=r"config.json: hidden_size: must be 1,000,000,000,000 or less"):
            facts(hidden_size=10**400)

    def test_a_config_that_is_nested_too_deeply(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("[" * 100_000)
        with pytest.raises(ModelError, match="not JSON"):
            read_facts(tmp_path)

    def test_routed_and_shared_experts(self) -> None:
        dense = facts().parameters
        matrices = 8 * 3 * 1024
        routed = {"n_routed_experts": 64, "moe_intermediate_size": 512}
        assert facts(**routed).parameters - dense == matrices * (64 * 512 - 4096)
        assert facts(**routed, n_shared_experts=2).parameters - dense == matrices * (66 * 512 - 4096)
        assert facts(num_experts=0, n_shared_experts=0, num_experts_per_tok=2).parameters == dense

    @pytest.mark.parametrize("inner", [False, True])
    def test_experts_that_cannot_be_counted(self, inner: bool) -> None:
        experts = {"moe_num_experts": 16, "moe_top_k": 4}
        with pytest.raises(ModelError) as caught:
            facts(**({"ffn_config": experts} if inner else experts))
        assert str(caught.value) == (
            "config.json: moe_num_experts = 16: experts under a name that is not known here, so they "
            "cannot be counted; say it as num_local_experts or num_experts or n_routed_experts or "
            "n_shared_experts too"
        )

    def test_encoders_and_decoders(self, tmp_path: Path) -> None:
        t5 = {"d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 512, "vocab_size": 1000}
        builds: list[tuple[type[transformers.PreTrainedModel], transformers.PreTrainedConfig]] = [
            (
                transformers.T5ForConditionalGeneration,
                transformers.T5Config(**t5, num_layers=3, num_decoder_layers=2),
            ),
            (
                transformers.T5ForConditionalGeneration,
                transformers.T5Config(
                    **t5, num_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False
                ),
            ),
            (transformers.BertForSequenceClassification, transformers.BertConfig()),
        ]
        for kind, config in builds:
            config.save_pretrained(tmp_path)
            with torch.device("meta"):
                true = sum(p.numel() for p in kind(config).parameters())
            assert read_facts(tmp_path).parameters == pytest.approx(true, rel=0.03)


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

    @pytest.mark.parametrize("bits", [16, 32])
    @pytest.mark.parametrize(
        "build", [lambda: tiny.llama(hidden=256, layers=4), tiny.gpt2], ids=["llama", "gpt2"]
    )
    def test_activations_are_what_autograd_keeps(self, build: Any, bits: int) -> None:
        model = build().to(torch.float32 if bits == 32 else torch.bfloat16).train()
        ids_BT = torch.arange(128).view(2, 64)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=ids_BT, use_cache=False)
        found = sum(storage.nbytes() for storage in kept.values())
        spec = full(bits=bits)
        planned = memory_plan(
            ModelFacts.from_config(model.config.to_dict()),
            spec,
            resident="packed",
            tokens_per_forward=ids_BT.numel(),
        ).activations
        assert found <= planned <= 1.3 * found

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

    def test_stage_3_holds_the_head_beside_a_layer(self) -> None:
        wide = {
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "intermediate_size": 28672,
            "tie_word_embeddings": False,
        }

        def workspace(vocabulary: int) -> int:
            shape = facts(num_attention_heads=64, num_key_value_heads=8, vocab_size=vocabulary, **wide)
            spec = job(
                model={"path": "x", "weight_bits": 16},
                method={"kind": "lora"},
                cluster={"workers": 8, "zero_stage": 3},
                batch={"sequences": 8},
            )
            return memory_plan(shape, spec, resident="packed", tokens_per_forward=512).workspace

        # Llama 3's vocabulary: a head of 2.1 GB and a layer of 1.7 GB. A small one takes DeepSpeed's limit.
        assert workspace(128_256) - workspace(1000) == pytest.approx(
            2 * (128_256 * 8192 + 856e6) - 2e9, rel=0.01
        )

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
            f"{size / GIB:.2f}" for size in plan.terms.values() if size
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


def full(*, bits: int = 16, **sections: Any) -> JobSpec:
    model = {"path": "org/base", "weight_bits": bits, **sections.pop("model", {})}
    return job(model=model, method={"kind": "full", **sections.pop("method", {})}, **sections)


def sharded(stage: int, workers: int, offload: str = "none", *, bits: int = 16) -> JobSpec:
    return full(bits=bits, cluster={"zero_stage": stage, "workers": workers, "offload": offload})


class TestSharding:
    """Rajbhandari et al. 2020, section 3 and figure 1."""

    @pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
    def test_the_papers_example(self, stage: int, gigabytes: float) -> None:
        # 7.5 billion parameters in float16, Adam with K = 12, 64 GPUs.
        parameters = 7_500_000_000
        states = zero_states(2 * parameters, 2 * parameters, 12 * parameters, stage=stage, workers=64)
        assert sum(states) / 1e9 == pytest.approx(gigabytes, abs=0.05)

    def test_a_quantised_base_is_whole_before_it_is_divided(self) -> None:
        """Beside it on the device: nothing yet."""
        shape = facts(num_hidden_layers=80, hidden_size=8192, intermediate_size=28672)
        cluster = {"zero_stage": 3, "workers": 8}
        spec = job(model={"path": "org/base", "weight_bits": 4}, cluster=cluster)
        whole = weight_bytes(shape, spec.model, "packed")
        plan = memory_plan(shape, spec, resident="packed", tokens_per_forward=512)
        assert plan.weights < whole / 7
        assert plan.total == whole
        crowded = memory_plan(shape, spec, resident="packed", tokens_per_forward=1 << 20)
        assert crowded.total > whole
        assert crowded.workspace < plan.workspace
        with pytest.raises(ModelError):
            choose(spec, shape, whole)

    @given(st.tuples(*[st.integers(0, 10**13)] * 3), st.integers(1, 4096), st.integers(1, 3))
    def test_all_workers_together_hold_everything(
        self, states: tuple[int, int, int], workers: int, stage: int
    ) -> None:
        held = zero_states(*states, stage=stage, workers=workers)
        before = zero_states(*states, stage=stage - 1, workers=workers)
        for part, larger, whole in zip(held, before, states, strict=True):
            assert part <= larger <= whole <= part * workers
            assert part * workers - whole < workers or part == whole

    @pytest.mark.parametrize("bits", [16, 32])
    def test_states_by_hand(self, bits: int) -> None:
        weights, count = (bits // 8) * facts().parameters, facts().parameters
        held = {
            stage: memory_plan(
                facts(), sharded(stage, 4, bits=bits), resident="packed", tokens_per_forward=512
            )
            for stage in (1, 2, 3)
        }
        # Moments and master copy, also of float32 weights; bfloat16 gradients are added up in float32.
        assert {plan.optimizer for plan in held.values()} == {12 * count // 4}
        assert [held[stage].weights for stage in (1, 2, 3)] == [weights, weights, weights // 4]
        assert [held[stage].gradients for stage in (1, 2, 3)] == [
            (4 if bits == 32 else 6) * count,
            count,
            count,
        ]

    @pytest.mark.parametrize(
        ("stage", "offload", "moved"),
        [
            (2, "optimizer", {"optimizer", "gradients"}),
            (3, "optimizer", {"optimizer", "gradients"}),
            (3, "parameters", {"optimizer", "gradients", "weights"}),
        ],
    )
    def test_what_is_offloaded_stands_in_the_host(self, stage: int, offload: str, moved: set[str]) -> None:
        here, away = (
            memory_plan(facts(), sharded(stage, 4, how), resident="packed", tokens_per_forward=512)
            for how in ("none", offload)
        )
        assert {name for name in here.terms if away.terms[name] != here.terms[name]} == moved
        assert all(away.terms[name] == 0 for name in moved)
        assert away.host == here.total - away.total

    def test_the_smallest_number_of_elastic_workers_counts(self) -> None:
        elastic = full(cluster={"zero_stage": 2, "elastic": [2, 8]})
        plans = [
            memory_plan(facts(), spec, resident="packed", tokens_per_forward=512)
            for spec in (elastic, sharded(2, 2))
        ]
        assert plans[0] == plans[1]

    @given(st.integers(0, 10**12))
    def test_buckets_grow_with_the_model_within_bounds(self, parameters: int) -> None:
        assert 1 << 20 <= bucket_elements(parameters) <= bucket_elements(2 * parameters) <= 1 << 28


class TestSelected:
    @pytest.mark.parametrize(
        ("only", "trained"),
        [
            ({"layers": "last-2"}, 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)),
            ({"layers": "last-99"}, 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096)),
            ({"patterns": ["norm"]}, None),
        ],
    )
    def test_what_is_trained_costs(self, only: dict[str, Any], trained: int | None) -> None:
        spec = full(bits=32, method={"train_only": only})
        count = facts().parameters if trained is None else trained
        assert trainable_parameters(facts(), spec) == count
        plan = memory_plan(facts(), spec, resident="packed", tokens_per_forward=512)
        assert (plan.weights, plan.gradients) == (4 * facts().parameters, 4 * count)
        assert plan.optimizer == 8 * count

    def test_biases_are_an_upper_estimate(self) -> None:
        base = tiny.gpt2()
        spec = full(bits=32, method={"train_only": {"biases": True}})
        estimate = trainable_parameters(ModelFacts.from_config(base.config.to_dict()), spec)
        biases = sum(p.numel() for name, p in base.named_parameters() if name.endswith("bias"))
        assert biases <= estimate <= 1.5 * biases

    def test_nothing_is_kept_of_layers_below(self) -> None:
        whole, half = (
            memory_plan(facts(), spec, resident="packed", tokens_per_forward=512)
            for spec in (full(), full(method={"train_only": {"layers": "last-4"}}))
        )
        assert whole.activations == 2 * half.activations


class TestOptions:
    BIG = facts(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32)

    def test_every_stage_and_offload(self) -> None:
        found = options(sharded(0, 4), self.BIG, None)
        assert [(o.sharding.stage, o.sharding.offload) for o in found] == [
            *((0, "none"), (1, "none"), (2, "none"), (3, "none")),
            *((2, "optimizer"), (3, "optimizer"), (3, "parameters")),
        ]
        assert {(o.sharding.workers, o.auto, o.fits) for o in found} == {(4, None, None)}

    def test_the_given_passes_and_auto(self) -> None:
        spec = full(batch={"sequences": 8, "sequences_per_worker": 4})
        (option, *_) = options(spec, facts(), 1000 * GIB)
        assert option.tokens_given == 4 * 512
        assert option.given == memory_plan(facts(), spec, resident="packed", tokens_per_forward=4 * 512)
        assert option.auto is not None
        assert option.auto.tokens_per_forward == 8 * 512
        assert option.fits

    @pytest.mark.parametrize(
        ("device_gib", "workers", "expected"),
        [
            (150, 4, [""]),
            (90, 4, ["cluster.zero_stage: 1"]),
            (52, 4, ["cluster.zero_stage: 2"]),
            (46, 4, ["cluster.zero_stage: 3"]),
            (
                24,
                4,
                [
                    "cluster.zero_stage: 2, cluster.offload: optimizer "
                    "(24.61 GiB of the host's memory for each worker)",
                    "cluster.workers: 10, cluster.zero_stage: 3",
                ],
            ),
            (
                15,
                1,
                [
                    "cluster.zero_stage: 3, cluster.offload: parameters "
                    "(110.76 GiB of the host's memory for each worker)",
                    "cluster.workers: 29, cluster.zero_stage: 3",
                ],
            ),
        ],
    )
    def test_the_nearest_that_fit(self, device_gib: float, workers: int, expected: list[str]) -> None:
        spec, device = sharded(0, workers), int(device_gib * GIB)
        found = alternatives(spec, self.BIG, device)
        assert [settings(spec, option) for option in found] == expected
        for option in found:
            assert option.given.total <= device * USABLE

    @given(st.floats(8, 200), st.sampled_from([1, 2, 5]), st.sampled_from(["auto", 1, 3]))
    @hypothesis_settings(max_examples=10, deadline=None)
    def test_no_fewer_workers_fit(self, device_gib: float, workers: int, per_worker: Any) -> None:
        device, batch = int(device_gib * GIB), {"sequences": 30, "sequences_per_worker": per_worker}
        spec = full(batch=batch, cluster={"workers": workers})
        found = [option.sharding.workers for option in alternatives(spec, self.BIG, device)]
        more = [count for count in found if count > workers]
        for count in range(workers + 1, more[0] if more else 31):
            if per_worker == "auto" or 30 % (per_worker * count) == 0:
                fewer = options(full(batch=batch, cluster={"workers": count}), self.BIG, device)
                plain = [option for option in fewer if option.sharding.offload == "none" and option.fits]
                assert not plain or found == [workers], (count, found)

    def test_an_elastic_job_has_options_of_its_own(self) -> None:
        batch = {"sequences": 32, "sequences_per_worker": 8}
        spec = full(batch=batch, cluster={"elastic": (2, 4), "zero_stage": 2})
        assert len(options(spec, self.BIG, None)) == 7
        (first, *_) = alternatives(spec, self.BIG, 60 * GIB)
        assert (first.sharding.workers, first.job.cluster.elastic) == (2, (2, 4))

    @given(st.floats(1, 300), st.integers(0, 5).map(lambda n: 2**n), st.sampled_from([0, 1, 2, 3]))
    @hypothesis_settings(max_examples=30, deadline=None)
    def test_what_is_advised_is_not_refused(self, device_gib: float, workers: int, stage: int) -> None:
        spec, device = sharded(stage, workers), int(device_gib * GIB)
        for option in alternatives(spec, self.BIG, device):
            choose(option.job, self.BIG, device)

    def test_the_refusal_names_all_of_them(self) -> None:
        spec = sharded(0, 4)
        with pytest.raises(ModelError) as caught:
            choose(spec, self.BIG, 24 * GIB)
        first, second = alternatives(spec, self.BIG, 24 * GIB)
        assert str(caught.value).endswith(
            f"the device can give 20.40; use {settings(spec, first)} or {settings(spec, second)}"
        )

    def test_nothing_fits(self) -> None:
        assert alternatives(full(), self.BIG, GIB // 2) == []


def test_max_tokens_above_the_positions() -> None:
    data = {"sources": [{"uri": "data.jsonl"}], "max_tokens": 2049}
    with pytest.raises(ModelError) as caught:
        check_max_tokens(job(data=data), facts())
    assert str(caught.value) == (
        "data.max_tokens = 2049 is above the 2048 positions of org/base; set data.max_tokens: 2048 or less"
    )
    check_max_tokens(job(data={**data, "max_tokens": 2048}), facts())
    check_max_tokens(job(data=data), facts(max_position_embeddings=None))


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"n_positions": 1024}, 1024),
        ({"n_positions": 512, "relative_attention_num_buckets": 32}, None),
        ({"max_position_embeddings": 514, "relative_attention_num_buckets": 32}, 514),
    ],
    ids=["gpt2", "t5", "mpnet"],
)
def test_rows_of_a_model_that_sees_distances_alone_have_no_limit(
    config: dict[str, int], positions: int | None
) -> None:
    assert facts(**{"max_position_embeddings": None, **config}).max_positions == positions
