"""Merged adapters equal PEFT's, a merged model answers as its adapter did, and nothing hostile is merged."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from stores import adapter_files, draft
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import raytune_ft.cli.catalog.merge  # noqa: F401  registers the command
from raytune_ft.catalog import AdapterRecord, BaseModelRef, Catalog, RecordDraft, Trust, lineage_of, verify
from raytune_ft.cli.catalog import app
from raytune_ft.errors import CatalogError, ModelError, RaytuneError
from raytune_ft.evaluate.answer import answer_prompt
from raytune_ft.merge import COMBINATIONS, Combination, combine_adapters, merge_into_folder, publish_merged
from raytune_ft.merge.combination import combine, layer_seed
from raytune_ft.merge.lora_files import LoraAdapter, LoraConfig, Pair
from raytune_ft.methods.lora import add_lora, load_lora, save_lora
from raytune_ft.model_files import base_digest, tokenizer_digest
from raytune_ft.models import load_base
from raytune_ft.spec import JobSpec, LoraSpec

IDS = torch.arange(3, 40)[None]
BUILDERS: Mapping[str, Callable[[], PreTrainedModel]] = {"llama": tiny.llama, "gpt2": tiny.gpt2}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny.save_base(folder / name, build()) for name, build in BUILDERS.items()}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.at(str(tmp_path / "catalog"))


def job(base: Path, catalog: Catalog, name: str, bits: int, method: LoraSpec) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": name,
            "model": {"path": str(base), "weight_bits": bits},
            "data": {"sources": [{"uri": "data.jsonl"}], "max_tokens": 64},
            "method": method.model_dump(),
            "publish": {"catalog": catalog.uri},
        }
    )


def publish(
    catalog: Catalog,
    base: Path,
    folder: Path,
    name: str,
    *,
    rank: int = 4,
    alpha: float = 12,
    targets: Any = "all-linear",
    bits: int = 32,
    tokenizer: str | None = None,
    config: Mapping[str, Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors,
    beside: Mapping[str, str] = MappingProxyType({}),
    **changes: Any,
) -> AdapterRecord:
    """An adapter as training publishes it, with random weights that depend on its name."""
    spec = LoraSpec(rank=rank, alpha=alpha, targets=targets)
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    parameters = add_lora(model, spec, seed=len(name))
    random = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)
    (written := folder / f"files-{name}").mkdir(parents=True)
    save_lora(model, spec, written, str(base))
    if config is not None:
        path = written / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    for file, content in beside.items():
        (written / file).write_text(content)
    weights = written / "adapter_model.safetensors"
    save_file(tensors(load_file(weights)), weights)
    values: dict[str, Any] = {
        "adapter": name,
        "base": BaseModelRef(path=str(base), digest=base_digest(base), tokenizer_digest=tokenizer),
        "method": spec.model_dump(mode="json"),
        "job": job(base, catalog, name, bits, spec).resolved(),
        "data": {"fingerprint": name * 8, "templates": ["instruction"], "end_ids": [1]},
        "seed": 0,
        "steps": 10,
        "tokens": 1000,
        "learned_tokens": 100,
        "loss": 1.5,
        "code_version": "0.1.0",
        "library_versions": {},
        "machine": {},
        "scores_before": None,
        "scores_after": {"exact_match": 0.75},
    }
    files = {file.name: file for file in written.iterdir()}
    return catalog.publish(RecordDraft(**{**values, **changes}), files, publish_id=f"run-{name}")


def with_adapters(base: Path, folders: Sequence[Path]) -> peft.PeftModel:
    """PEFT's own view of pulled adapters, called 0, 1 …"""
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folders[0], adapter_name="0"
    )
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=str(number))
    return model.eval()


def pulled(catalog: Catalog, reference: str, folder: Path) -> Path:
    catalog.pull(reference, folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def combined(catalog: Catalog, *references: str, method: str = "cat", **settings: Any) -> AdapterRecord:
    how = Combination.of(method, len(references), **settings)
    return combine_adapters(catalog, references, how, name="both")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


class TestCombined:
    def test_adapters_of_different_tokenizers(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        for name, tokenizer in (("earlier", None), ("one", "d" * 64), ("two", "e" * 64)):
            publish(catalog, bases["llama"], tmp_path, name, tokenizer=tokenizer)
        assert combined(catalog, "earlier", "one").base.tokenizer_digest == "d" * 64
        with pytest.raises(CatalogError) as caught:
            combined(catalog, "earlier", "one", "two", weights=(1, 1, 1))
        assert str(caught.value) == (
            "one@v1 was trained with the tokenizer dddddddddddd…, and two@v1 (eeeeeeeeeeee…) with another; "
            "only adapters of the same tokenizer can be merged"
        )

    @pytest.mark.parametrize("method", COMBINATIONS)
    @pytest.mark.parametrize("weights", [(0.5, 0.5), (1.5, -0.25)])
    def test_equals_peft(
        self,
        bases: Mapping[str, Path],
        catalog: Catalog,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        method: str,
        weights: tuple[float, ...],
    ) -> None:
        base = bases["llama"]
        publish(catalog, base, tmp_path, "one", alpha=12)
        publish(catalog, base, tmp_path, "two", alpha=3, targets="attention")
        record = combined(catalog, "one", "two", method=method, weights=weights)
        model = with_adapters(base, [pulled(catalog, name, tmp_path / name) for name in ("one", "two")])
        seed_as_we_do(monkeypatch, model)
        settings = {} if method in ("cat", "linear") else {"density": 0.5}
        model.add_weighted_adapter(["0", "1"], list(weights), "theirs", combination_type=method, **settings)
        model.set_adapter("theirs")
        ours = with_adapters(base, [pulled(catalog, record.reference, tmp_path / "both")])
        torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=1e-5)
        for name, theirs in peft.get_peft_model_state_dict(model, adapter_name="theirs").items():
            mine = load_file(tmp_path / "both" / "adapter_model.safetensors")[name]
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)

    def test_cat_is_the_sum_of_the_updates_also_of_mixed_ranks(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        base = bases["gpt2"]
        publish(catalog, base, tmp_path, "one", rank=2, targets=("mlp.c_proj",))
        publish(catalog, base, tmp_path, "two", rank=5, targets="attention")
        record = combined(catalog, "one", "two", weights=(0.7, 0.3))
        assert record.method["rank"] == 7
        expected = AutoModelForCausalLM.from_pretrained(base).state_dict()
        for name, weight in (("one", 0.7), ("two", 0.3)):
            alone = with_adapters(base, [pulled(catalog, name, tmp_path / name)]).merge_and_unload()
            plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
            for key, value in alone.state_dict().items():
                expected[key] = expected[key] + weight * (value - plain[key])
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_state_dict(expected)
        ours = with_adapters(base, [pulled(catalog, record.reference, tmp_path / "both")])
        torch.testing.assert_close(logits(ours), logits(model.eval()), rtol=0, atol=1e-5)

    def test_the_same_command_gives_the_same_version_and_another_seed_other_bits(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        for name in ("one", "two"):
            publish(catalog, bases["llama"], tmp_path, name)
        torch.manual_seed(5)
        first = combined(catalog, "one", "two", method="dare_ties", seed=3)
        state = torch.random.get_rng_state()
        again = combined(catalog, "one", "two", method="dare_ties", seed=3)
        assert torch.equal(state, torch.random.get_rng_state())
        assert again == first
        other = combined(catalog, "one", "two", method="dare_ties", seed=4)
        assert (other.version, digest(other) == digest(first)) == (2, False)
        elsewhere = Catalog.at(str(tmp_path / "elsewhere"))
        for name in ("one", "two"):
            publish(elsewhere, bases["llama"], tmp_path / "elsewhere-files", name)
        assert digest(combined(elsewhere, "one", "two", method="dare_ties", seed=3)) == digest(first)

    def test_generate_train_and_serve_read_the_record(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        base = bases["llama"]
        publish(catalog, base, tmp_path, "one", targets="attention")
        data = {"templates": None, "end_ids": {"odd": 1}}
        publish(catalog, base, tmp_path, "two", targets=("mlp.down_proj",), data=data)
        record = combined(catalog, "one", "two@v1", weights=(1.0, 2.0))
        assert record.merged_from == ("one@v1", "two@v1")
        assert record.method["combination"] == {"method": "cat", "weights": [1.0, 2.0]}
        assert (record.steps, record.tokens, record.loss, record.scores_after) == (0, 0, None, None)
        assert record.job["data"]["max_tokens"] == 64
        assert (record.data["templates"], record.data["end_ids"]) == (["instruction"], [1])
        assert isinstance(answer_prompt(catalog.uri, "both", "Name it.", max_new_tokens=3), str)
        read = JobSpec.model_validate(record.job)
        assert isinstance(read.method, LoraSpec)
        model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False).eval()
        load_lora(add_lora(model, read.method, seed=0), pulled(catalog, "both", tmp_path / "both"))
        theirs = with_adapters(base, [tmp_path / "both"])
        torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
        assert "one@v1, two@v1" in (tmp_path / "both" / "README.md").read_text()
        assert verify(catalog).problems == ()

    def test_an_answer_may_end_where_that_of_any_ends(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        beside = {"generation_config.json": '{"eos_token_id": 7, "temperature": 0.5}'}
        publish(catalog, bases["llama"], tmp_path, "one", data={"end_ids": [9]})
        publish(catalog, bases["llama"], tmp_path, "two", data={"end_ids": [1]}, beside=beside)
        combined(catalog, "one", "two")
        folder = pulled(catalog, "both", tmp_path / "both")
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings == {"eos_token_id": [1, 7, 9], "temperature": 0.5}
        # The second brings no tokenizer along, so there is nothing to load one from.
        assert "AutoTokenizer" not in (folder / "README.md").read_text()

    def test_what_does_not_say_how_to_generate_is_refused(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        beside = {"generation_config.json": '{"eos_token_id": "x"}'}
        for name in ("one", "two"):
            publish(catalog, bases["llama"], tmp_path, name, beside=beside)
        with pytest.raises(CatalogError, match=r"^one@v1: its generation_config.json does not say how to"):
            combined(catalog, "one", "two")

    def test_the_base_is_not_needed(self, catalog: Catalog, tmp_path: Path) -> None:
        base = tiny.save_base(tmp_path / "base")
        for name in ("one", "two"):
            publish(catalog, base, tmp_path, name)
        shutil.rmtree(base)
        assert combined(catalog, "one", "two").base.path == str(base)

    def test_adapters_as_peft_writes_them(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        defaults = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, task_type="CAUSAL_LM").to_dict()
        theirs = {key: value for key, value in defaults.items() if key not in ("target_modules", "peft_type")}
        publish(catalog, bases["llama"], tmp_path, "two", config=theirs)
        publish(catalog, bases["llama"], tmp_path, "one")
        record = combined(catalog, "one", "two", method="linear")
        model = with_adapters(
            bases["llama"], [pulled(catalog, name, tmp_path / name) for name in ("one", "two")]
        )
        model.add_weighted_adapter(["0", "1"], [0.5, 0.5], "theirs", combination_type="linear")
        model.set_adapter("theirs")
        ours = with_adapters(bases["llama"], [pulled(catalog, record.reference, tmp_path / "both")])
        torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=1e-5)


def seed_as_we_do(monkeypatch: pytest.MonkeyPatch, model: peft.PeftModel) -> None:
    """PEFT draws from one stream over all layers, in their order; give each layer its own."""
    names = {id(module): name for name, module in model.base_model.model.named_modules()}
    unseeded = LoraModel._generalized_task_arithmetic_weighted_adapter

    def seeded(self: Any, kind: str, adapters: Any, weights: Any, target: Any, *rest: Any) -> Any:
        torch.manual_seed(layer_seed(0, names[id(target)]))
        return unseeded(self, kind, adapters, weights, target, *rest)

    monkeypatch.setattr(LoraModel, "_generalized_task_arithmetic_weighted_adapter", seeded)


def digest(record: AdapterRecord) -> str:
    return next(entry.sha256 for entry in record.files if entry.name.endswith(".safetensors"))


class TestRules:
    @given(
        weights=st.lists(st.integers(-8, 8).map(lambda number: number / 4), min_size=2, max_size=4),
        density=st.sampled_from([0.3, 1.0]),
        method=st.sampled_from(COMBINATIONS),
        data=st.data(),
    )
    def test_any_settings_give_finite_factors_of_the_right_shape(
        self, weights: list[float], density: float, method: str, data: st.DataObject
    ) -> None:
        ranks = [data.draw(st.integers(1, 3)) if method == "cat" else 3 for _ in weights]
        adapters = [in_memory(number, rank) for number, rank in enumerate(ranks)]
        settings = {} if method in ("cat", "linear") else {"density": density}
        how = Combination.of(method, len(weights), weights=weights, **settings)
        if not any(how.weights):
            with pytest.raises(CatalogError, match="nothing is left"):
                combine(adapters, how)
            return
        pairs = combine(adapters, how)
        rank = sum(ranks) if method == "cat" else 3
        assert set(pairs) == {"shared", *(f"own{number}" for number in range(len(ranks)))}
        assert all((pair.A.shape, pair.B.shape) == ((rank, 6), (5, rank)) for pair in pairs.values())
        if method == "cat":
            expected = sum(
                weight * adapter.config.scale * adapter.pairs["shared"].B @ adapter.pairs["shared"].A
                for weight, adapter in zip(weights, adapters, strict=True)
            )
            torch.testing.assert_close(pairs["shared"].B @ pairs["shared"].A, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("method", "settings", "message"),
        [
            ("svd", {}, "--method 'svd': write one of cat, linear, ties, dare_linear, dare_ties"),
            ("cat", {"weights": [1.0]}, "--weights: 1 for 2 adapters; give one for each"),
            ("cat", {"weights": [1.0, float("nan")]}, "must be numbers from -1000 to 1000"),
            ("cat", {"weights": [1.0, 1e9]}, "must be numbers from -1000 to 1000"),
            ("cat", {"density": 0.5}, "--density 0.5: means nothing to --method cat; leave it out"),
            ("dare_linear", {"majority_sign": "total"}, "--majority-sign total: means nothing"),
            ("ties", {"seed": 1}, "--seed 1: means nothing to --method ties"),
            ("ties", {"density": 0.0}, "--density 0.0: must be above 0 and at most 1"),
            ("ties", {"density": 1.5}, "--density 1.5: must be above 0 and at most 1"),
            ("ties", {"density": float("nan")}, "--density nan: must be above 0 and at most 1"),
            ("ties", {"majority_sign": "most"}, "--majority-sign 'most': write total or frequency"),
            ("dare_ties", {"seed": -1}, "--seed -1: must be from 0"),
        ],
    )
    def test_settings_are_checked(self, method: str, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(CatalogError) as caught:
            Combination.of(method, 2, **settings)
        assert message in str(caught.value)

    def test_nothing_left_is_refused(self) -> None:
        adapter = in_memory(0, 2)
        with pytest.raises(CatalogError, match=r"--method linear .*: nothing is left of the adapters"):
            combine([adapter, adapter], Combination.of("linear", 2, weights=[0.0, 0.0]))


def in_memory(number: int, rank: int) -> LoraAdapter:
    random = torch.Generator().manual_seed(number)
    pairs = {
        module: Pair(
            torch.randn(rank, 6, generator=random),
            torch.randn(5, rank, generator=random),
        )
        for module in ("shared", f"own{number}")
    }
    config = LoraConfig(peft_type="LORA", r=rank, lora_alpha=2.0 * number + 1, target_modules=tuple(pairs))
    return LoraAdapter(AdapterRecord.model_construct(adapter=f"a{number}", version=1), config, pairs)


class TestIntoBase:
    @pytest.mark.parametrize("build", BUILDERS)
    def test_the_model_answers_as_the_adapter_did(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path, build: str
    ) -> None:
        base = bases[build]
        publish(catalog, base, tmp_path, "one")
        catalog.set_alias("one", "candidate", 1)
        merge_into_folder(catalog, "one@candidate", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert merged.dtype == torch.float32
        theirs = with_adapters(base, [pulled(catalog, "one", tmp_path / "one")])
        torch.testing.assert_close(logits(merged), logits(theirs), rtol=0, atol=1e-5)
        bare = AutoModelForCausalLM.from_pretrained(base)
        assert (logits(merged) - logits(bare)).abs().max() > 1e-3
        assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the dog").input_ids
        assert "one@v1" in (tmp_path / "merged" / "README.md").read_text()
        assert not list(tmp_path.glob(".tmp-*"))

    @pytest.mark.parametrize("bits", [4, 8, 16])
    def test_a_base_in_few_bits_is_merged_as_training_saw_it(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path, bits: int
    ) -> None:
        base = bases["llama"]
        record = publish(catalog, base, tmp_path, "one", bits=bits)
        spec = JobSpec.model_validate(record.job).model
        for kind in ("quantised", "original"):
            merge_into_folder(catalog, "one", tmp_path / kind, base_weights=kind)  # type: ignore[arg-type]  # both
            config = json.loads((tmp_path / kind / "config.json").read_text())
            assert "quantization_config" not in config
            assert config["dtype"] == "bfloat16"
        rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
        original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
        expected = load_base(spec, device=torch.device("cpu"), dequantised=True)
        if bits == 8:
            expected = expected.dequantize(dtype=torch.bfloat16)
        exact = AutoModelForCausalLM.from_pretrained(base).state_dict()
        folder = pulled(catalog, "one", tmp_path / "one")
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, weight in expected.state_dict().items():
            path = name.removesuffix(".weight")
            update: Any = 0
            if f"base_model.model.{path}.lora_A.weight" in tensors:
                factors = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "BA")
                update = 3 * torch.linalg.multi_dot(list(factors))
            for model, plain in ((rounded, weight), (original, exact[name].bfloat16())):
                torch.testing.assert_close(
                    model.state_dict()[name], (plain.float() + update).bfloat16(), rtol=2**-7, atol=1e-6
                )
        assert torch.equal(logits(rounded), logits(original)) == (bits == 16)

    def test_published_it_is_a_model_that_generate_and_lineage_know(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        publish(catalog, bases["llama"], tmp_path, "one", bits=4)
        record = publish_merged(catalog, "one", name="whole", alias="candidate")
        assert (record.kind, record.merged_from, record.scores_after) == ("model", ("one@v1",), None)
        assert publish_merged(catalog, "one", name="whole") == record
        assert publish_merged(catalog, "one", name="whole", base_weights="original").version == 2
        reply = answer_prompt(catalog.uri, "whole@candidate", "Name it.", max_new_tokens=3)
        folder = pulled(catalog, "whole@v1", tmp_path / "whole")
        assert isinstance(reply, str)
        assert isinstance(AutoModelForCausalLM.from_pretrained(folder), PreTrainedModel)
        assert JobSpec.model_validate(record.job).model.weight_bits == 16
        (sources,) = lineage_of(catalog, "whole@v1").chain[0].merged_from
        assert sources.reference == "one@v1"

    def test_a_base_that_moved(self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path) -> None:
        gone = tiny.save_base(tmp_path / "gone")
        publish(catalog, gone, tmp_path, "one")
        gone.rename(tmp_path / "here")
        with pytest.raises(
            ModelError, match=r"one@v1: its base is not there: .*; name a copy of it with --base"
        ):
            merge_into_folder(catalog, "one", tmp_path / "merged")
        with pytest.raises(ModelError, match=r"one@v1 was trained on another base than .*gpt2 holds now"):
            merge_into_folder(catalog, "one", tmp_path / "merged", base=str(bases["gpt2"]))
        assert not (tmp_path / "merged").exists()
        merge_into_folder(catalog, "one", tmp_path / "merged", base=str(tmp_path / "here"))
        assert (tmp_path / "merged" / "model.safetensors").is_file()

    def test_a_tokenizer_that_changed(self, catalog: Catalog, tmp_path: Path) -> None:
        base = tiny.save_base(tmp_path / "base")
        publish(catalog, base, tmp_path, "one", tokenizer=tokenizer_digest(base))
        publish(catalog, base, tmp_path, "earlier")
        whole = publish_merged(catalog, "one", name="whole")
        assert whole.base.tokenizer_digest == tokenizer_digest(base)
        (base / "chat_template.jinja").write_text("{{ messages }}")
        with pytest.raises(ModelError, match=r"^one@v1 was trained with another tokenizer than .*base holds"):
            merge_into_folder(catalog, "one", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        merge_into_folder(catalog, "earlier", tmp_path / "merged")

    def test_a_folder_with_something_in_it(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        publish(catalog, bases["llama"], tmp_path, "one")
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "mine").write_text("")
        with pytest.raises(CatalogError, match=r"taken: is there already; name a new or empty folder"):
            merge_into_folder(catalog, "one", tmp_path / "taken")
        assert [file.name for file in (tmp_path / "taken").iterdir()] == ["mine"]
        assert not list(tmp_path.glob(".tmp-*"))

    def test_an_update_that_no_weight_can_hold(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        def large(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.full_like(tensor, 1e30) for name, tensor in tensors.items()}

        publish(catalog, bases["llama"], tmp_path, "one", tensors=large)
        with pytest.raises(
            ModelError, match=r"^one@v1: with its update .*_proj has weights that are no finite"
        ):
            merge_into_folder(catalog, "one", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def test_a_signature_is_asked_for(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        publish(catalog, bases["llama"], tmp_path, "one")
        trust = Trust(frozenset({"0" * 64}), required=True)
        message = "^one@v1: has no signature, and one is required"
        with pytest.raises(CatalogError, match=message):
            merge_into_folder(catalog, "one", tmp_path / "merged", trust=trust)
        with pytest.raises(CatalogError, match=message):
            publish_merged(catalog, "one", name="two", trust=trust)
        with pytest.raises(CatalogError, match=message):
            answer_prompt(catalog.uri, "one", "Why?", max_new_tokens=1, trust=trust)

    def test_an_update_of_a_layer_that_the_base_has_not(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        def head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            sides = {"A": torch.ones(4, 64), "B": torch.ones(320, 4)}
            return {f"base_model.model.lm_head.lora_{side}.weight": sides[side] for side in "AB"}

        publish(
            catalog, bases["llama"], tmp_path, "one", config={"target_modules": ["lm_head"]}, tensors=head
        )
        with pytest.raises(
            ModelError, match=r"one@v1: its update of lm_head .*\[320, 64\].* the base has none"
        ):
            merge_into_folder(catalog, "one", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("lora_A.weight", "lora_E"): tensor for name, tensor in tensors.items()}


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:2].clone() if "lora_A" in name else tensor for name, tensor in tensors.items()}


def infinite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * float("inf") for name, tensor in tensors.items()}


def one_sided(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "lora_A" in name}


class TestRefused:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"peft_type": "LOHA"}, "peft_type: Input should be 'LORA'"),
            ({"r": 10**9}, "r: Input should be less than or equal to 4096"),
            ({"r": 8}, "lora_A has the shape [4, 128], and adapter_config.json says r = 8"),
            ({"lora_alpha": float("inf")}, "lora_alpha: Input should be a finite number"),
            ({"target_modules": ".*"}, "target_modules: "),
            ({"target_modules": ["q_proj|.*"]}, "must be the end of a module's dotted name, not a pattern"),
            ({"target_modules": ["q_proj", "head"]}, "'head' is not in both"),
            ({"target_modules": ["q_proj"]}, "is not in both its tensors and the target_modules"),
            ({"auto_mapping": {"parent_library": "os"}}, "'auto_mapping' = {'parent_library': 'os'} is not"),
            ({"use_dora": True}, "'use_dora' = True is not supported; only plain LoRA is"),
            ({"modules_to_save": ["lm_head"]}, "'modules_to_save' = ['lm_head'] is not supported"),
            ({"rank_pattern": {"q_proj": 2}}, "'rank_pattern'"),
            ({"bias": "all"}, "bias: Input should be 'none'"),
            ({"megatron_core": "evil"}, "'megatron_core' = 'evil' is not supported"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights"),
            ({"\x1b[2J": 1}, "is not supported"),
        ],
    )
    def test_a_hostile_config(
        self,
        bases: Mapping[str, Path],
        catalog: Catalog,
        tmp_path: Path,
        config: dict[str, Any],
        message: str,
    ) -> None:
        publish(catalog, bases["llama"], tmp_path, "one")
        publish(catalog, bases["llama"], tmp_path, "two", config=config)
        for refused in (
            lambda: combined(catalog, "one", "two"),
            lambda: merge_into_folder(catalog, "two", tmp_path / "merged"),
        ):
            with pytest.raises(CatalogError) as caught:
                refused()
            assert "two@v1: adapter_" in str(caught.value)
            assert message in str(caught.value)
            assert str(caught.value).isprintable()
        assert not (tmp_path / "merged").exists()
        assert list(catalog.newest_versions()) == ["one", "two"]

    @pytest.mark.parametrize(
        ("alter", "message"),
        [
            (renamed, "not the A or B of a linear layer"),
            (halved, "lora_A has the shape [2, 128]"),
            (infinite, "has values that are no finite numbers"),
            (one_sided, "has lora_A alone"),
        ],
    )
    def test_hostile_weights(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path, alter: Any, message: str
    ) -> None:
        publish(catalog, bases["llama"], tmp_path, "one")
        publish(catalog, bases["llama"], tmp_path, "two", tensors=alter)
        with pytest.raises(CatalogError) as caught:
            combined(catalog, "one", "two")
        assert "two@v1: adapter_model.safetensors" in str(caught.value)
        assert message in str(caught.value)

    def test_adapters_that_do_not_belong_together(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path
    ) -> None:
        publish(catalog, bases["llama"], tmp_path, "one")
        publish(catalog, bases["gpt2"], tmp_path, "other")
        publish(catalog, bases["llama"], tmp_path, "higher", rank=6)
        publish(catalog, bases["llama"], tmp_path, "model", kind="model")
        publish(catalog, bases["llama"], tmp_path, "odd", method={"kind": "ia3"})
        publish(catalog, bases["llama"], tmp_path, "turned", config={"fan_in_fan_out": True})
        for references, message in [
            (["one"], "catalog merge: 1 adapter; name at least two, or merge one --into-base"),
            (["one", "one@v1"], "one@v1: is named twice; name it once, with a higher weight"),
            (["one", "other"], "only adapters of the same base can be merged"),
            (["one", "model"], "model@v1: a whole model; only adapters can be merged"),
            (["one", "odd"], "odd@v1: method 'ia3'; only lora adapters can be merged"),
            (["one", "turned"], "fan_in_fan_out of its adapter_config.json is not that of the others"),
            (["one", "gone"], "no adapter gone"),
        ]:
            with pytest.raises(CatalogError) as caught:
                combined(catalog, *references)
            assert message in str(caught.value)
        with pytest.raises(CatalogError, match=r"needs equal ranks, and they are one@v1 4, higher@v1 6; use"):
            combined(catalog, "one", "higher", method="linear")
        how = Combination.of("cat", 2)
        for name, alias, message in [("A/B", None, "--as 'A/B': must be"), ("both", "v3", "alias 'v3'")]:
            with pytest.raises(CatalogError, match=message):
                combine_adapters(catalog, ["one", "higher"], how, name=name, alias=alias)
        assert "both" not in catalog.newest_versions()


class TestLineage:
    @pytest.fixture
    def merged(self, catalog: Catalog, tmp_path: Path) -> Callable[..., AdapterRecord]:
        files = adapter_files(tmp_path / "files")

        def publish(adapter: str, *sources: str, parent: str | None = None) -> AdapterRecord:
            values = draft(adapter=adapter, merged_from=sources, parent=parent)
            return catalog.publish(values, files, publish_id=f"run-{adapter}")

        return publish

    def test_of_merges_of_merges_each_version_is_followed_once(
        self, catalog: Catalog, merged: Callable[..., AdapterRecord]
    ) -> None:
        merged("first")
        merged("one", parent="first@v1")
        merged("two", "first@v1", "gone@v1")
        merged("both", "one@v1", "two@v1")
        one, two = lineage_of(catalog, "both").chain[0].merged_from
        assert [ancestor.record.reference for ancestor in one.chain] == ["one@v1", "first@v1"]
        again, gone = two.chain[0].merged_from
        assert (again.reference, again.chain, again.broken) == ("first@v1", (), "stands above")
        assert (gone.broken or "").startswith("gone@v1: is not in ")
        lines = run("lineage", "both", "--catalog", catalog.uri).splitlines()
        assert [line.strip(" │├└─") for line in lines if "merged from" in line or "parent" in line] == [
            "merged from: one@v1",
            "parent: first@v1",
            "merged from: two@v1",
            "merged from: first@v1: stands above",
            f"merged from: gone@v1: {gone.broken}",
        ]
        found = json.loads(run("lineage", "both", "--catalog", catalog.uri, "--json"))
        assert found["chain"][0]["merged_from"][1]["chain"][0]["merged_from"][0]["reference"] == "first@v1"

    def test_records_that_name_each_other_end(
        self, catalog: Catalog, merged: Callable[..., AdapterRecord]
    ) -> None:
        merged("one", "two@v1", "one@v1")
        merged("two", "one@v1", "../../etc")
        two, itself = lineage_of(catalog, "one").chain[0].merged_from
        assert itself.broken == "one@v1: is its own ancestor; a record was altered or damaged"
        assert [source.broken for source in two.chain[0].merged_from] == [
            "one@v1: is its own ancestor; a record was altered or damaged",
            "'../../etc': not a reference; write NAME, NAME@v3 or NAME@ALIAS",
        ]

    def test_a_tower_of_merges_ends(self, catalog: Catalog, merged: Callable[..., AdapterRecord]) -> None:
        merged("m0")
        for number in range(1, 41):
            merged(f"m{number}", f"m{number - 1}@v1")
        found = lineage_of(catalog, "m40")
        while found.chain:
            (found,) = found.chain[0].merged_from
        assert found.broken == "m7@v1: more than 32 versions from the first; look at it by itself"
        run("lineage", "m40", "--catalog", catalog.uri, "--json")


class TestCommand:
    def test_adapters(
        self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        at = ("--catalog", "catalog")
        for name in ("one", "two"):
            publish(catalog, bases["llama"], tmp_path, name)
        assert run("merge", "one", "two@v1", "--as", "both", "--alias", "candidate", *at) == (
            "both@v1 (adapter) was merged from one@v1, two@v1\n"
        )
        options = ("--method", "ties", "--weights", "0.75,0.25", "--density", "0.4", "--majority-sign")
        found = json.loads(run("merge", "one", "two", "--as", "both", *options, "frequency", "--json", *at))
        assert (found["version"], found["merged_from"]) == (2, ["one@v1", "two@v1"])
        assert found["uri"] == f"{catalog.uri}/adapters/both/versions/9999999997.json"
        assert catalog.resolve("both").method["combination"] == {
            "method": "ties",
            "weights": [0.75, 0.25],
            "density": 0.4,
            "majority_sign": "frequency",
        }
        assert catalog.aliases("both") == {"candidate": 1}
        lines = run("lineage", "both@v1", *at).splitlines()
        assert [line.strip(" │├└─") for line in lines if "merged from" in line] == [
            "merged from: one@v1",
            "merged from: two@v1",
        ]

    def test_into_base(self, bases: Mapping[str, Path], catalog: Catalog, tmp_path: Path) -> None:
        at = ("--catalog", catalog.uri)
        publish(catalog, bases["llama"], tmp_path, "one")
        to = str(tmp_path / "merged")
        printed = run("merge", "one", "--into-base", "--to", to, *at)
        assert printed == f"{to} is a model: one@v1 merged into {bases['llama']}\n"
        found = json.loads(run("merge", "one", "--into-base", "--to", f"{to}-2", "--json", *at))
        assert found == {"merged_from": ["one@v1"], "to": f"{to}-2"}
        found = json.loads(run("merge", "one", "--into-base", "--as", "whole", "--json", *at))
        assert (found["adapter"], found["version"], found["kind"]) == ("whole", 1, "model")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("one two", "--as is missing"),
            ("one two --as both --to x", "--to means nothing without --into-base; leave it out"),
            ("one two --as both --trust-remote-code", "--trust-remote-code means nothing without"),
            ("one two --as both --weights 1,a", "--weights '1,a': write numbers such as 0.5,0.5"),
            ("one --into-base --to x --seed 0", "--seed means nothing with --into-base; leave it out"),
            ("one two --into-base --to x", "--into-base: 2 adapters; merge them into one first"),
            ("one --into-base", "give --to FOLDER or --as NAME"),
            ("one --into-base --to x --as y", "give --to FOLDER or --as NAME"),
            ("one --into-base --to x --alias y", "--alias 'y': only what is published with --as"),
            (
                "one --into-base --to x --base-weights all",
                "--base-weights 'all': write quantised or original",
            ),
        ],
    )
    def test_options_that_do_not_belong_together(
        self, catalog: Catalog, arguments: str, message: str
    ) -> None:
        with pytest.raises(RaytuneError) as caught:
            run("merge", *arguments.split(), "--catalog", catalog.uri)
        assert message in str(caught.value)
