"""What a method names of its base is looked for in the base's config, before any weight is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from raytune_ft.errors import ModelError
from raytune_ft.methods.lora import linear_modules
from raytune_ft.models import load_base, outline
from raytune_ft.spec import JobSpec, ModelSpec, parse_job
from raytune_ft.train.parts import missing_parts

BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "t5": tiny.t5,
    "bert": tiny.bert,
}


def save(name: str, folder: Path, weight_bits: int = 32) -> ModelSpec:
    tiny.save_base(folder / name, BASES[name]())
    labels = {"labels": ["no", "maybe", "yes"]} if name == "bert" else {}
    return ModelSpec(path=str(folder / name), **labels, weight_bits=weight_bits)


def job(model: ModelSpec, name: str = "one", **method: Any) -> JobSpec:
    return parse_job(
        {
            "name": name,
            "model": model.model_dump(),
            "data": {"sources": [{"uri": "data.jsonl"}], "max_tokens": 64},
            "method": method,
            "publish": {"catalog": "catalog"},
        }
    )


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", BASES)
def test_an_outline_has_the_layers_and_the_names_of_the_loaded_base(
    name: str, bits: int, tmp_path: Path
) -> None:
    spec = save(name, tmp_path, weight_bits=bits)
    drawn, loaded = outline(spec), load_base(spec, device=torch.device("cpu"))
    assert [path for path, _ in drawn.named_parameters()] == [path for path, _ in loaded.named_parameters()]
    assert list(linear_modules(drawn)) == list(linear_modules(loaded))
    assert {parameter.device.type for parameter in drawn.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        (
            "llama",
            {"targets": ["q_proj", "query"]},
            "method.targets: no linear layer is called 'query'; the base has down_proj, gate_proj, ",
        ),
        (
            "bert",
            {"targets": ["q_proj"]},
            "method.targets: no linear layer is called 'q_proj'; the base has ",
        ),
        (
            "llama",
            {"kind": "full", "train_only": {"layers": "last-9"}},
            "method.train_only.layers = last-9: the base has 2 layers; use last-2 or fewer",
        ),
        (
            "llama",
            {"kind": "full", "train_only": {"biases": True}},
            "method.train_only.biases: the base has no biases; use layers or patterns; its weights are ",
        ),
        (
            "t5",
            {"kind": "full", "train_only": {"patterns": ["decodr"]}},
            "method.train_only.patterns: 'decodr' is found in no weight's name; the base has ",
        ),
    ],
)
def test_what_the_base_does_not_have(name: str, method: dict[str, Any], message: str, tmp_path: Path) -> None:
    spec = save(name, tmp_path)
    for weights in (tmp_path / name).glob("*.safetensors"):
        # It is there, and nobody reads it.
        weights.write_bytes(b"")
    wrong = missing_parts([job(spec, "right"), job(spec, "wrong", **method)])
    assert wrong.keys() == {"wrong"}
    assert str(wrong["wrong"]).startswith(message)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", {"targets": ["q_proj", "self_attn.o_proj"]}),
        ("gpt2", {"targets": "attention"}),
        ("t5", {"kind": "full", "train_only": {"patterns": [r"decoder\.block"]}}),
        ("bert", {"kind": "full", "train_only": {"biases": True}}),
    ],
)
def test_what_the_base_has(name: str, method: dict[str, Any], tmp_path: Path) -> None:
    assert missing_parts([job(save(name, tmp_path), **method)]) == {}


def test_a_base_that_transformers_does_not_know(tmp_path: Path) -> None:
    spec = save("llama", tmp_path)
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "unheard-of"}')
    (wrong,) = missing_parts([job(spec, targets=["q_proj"])]).values()
    assert isinstance(wrong, ModelError)
    assert str(wrong).startswith(f"model.path = {spec.path}: the model does not load: ")


def test_a_job_that_names_nothing_is_not_looked_at(tmp_path: Path) -> None:
    nowhere = ModelSpec(path=str(tmp_path / "none"), weight_bits=32)
    assert missing_parts([job(nowhere), job(nowhere, kind="full")]) == {}
