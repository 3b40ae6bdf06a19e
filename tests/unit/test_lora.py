"""Adapters against PEFT: same layout, same logits, same training."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import PreTrainedModel

from raytune_ft.errors import ModelError
from raytune_ft.methods.lora import (
    add_lora,
    linear_modules,
    load_lora,
    save_lora,
    shortest_suffixes,
    target_paths,
)
from raytune_ft.spec import LoraSpec, OptimizerSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Layout, Step, Tokens
from raytune_ft.train.loop import fit

BUILDERS = {"llama": tiny.llama, "gpt2": tiny.gpt2}
TARGETS = ["all-linear", "attention", ("q_proj", "mlp.down_proj")]


def examples(step: int) -> list[Tokens]:
    random = np.random.default_rng(step)
    return [Tokens(random.integers(3, 320, n), np.arange(n) >= n // 2) for n in (9, 14, 5, 22)]


def trained(model: PreTrainedModel, spec: LoraSpec, steps: int) -> BankEngine:
    model.requires_grad_(False)
    bank = BankEngine(Bank(model), add_lora(model, spec, seed=0), OptimizerSpec(learning_rate=5e-3))
    layout = Layout(True, 64, 2, None, 4096)
    batches = (Step(layout.batches(examples(step)), 4, "", 1) for step in range(steps))
    fit(bank, batches, start=0, learning_rate=lambda _: 5e-3, report=lambda _: None)
    return bank


@pytest.mark.parametrize(
    ("build", "targets"),
    [("llama", t) for t in TARGETS]
    + [("gpt2", "all-linear"), ("gpt2", "attention"), ("gpt2", ("mlp.c_proj",))],
)
def test_a_trained_adapter_loads_in_peft_with_the_same_logits(
    tmp_path: Path, build: str, targets: str | tuple[str, ...]
) -> None:
    spec = LoraSpec(rank=4, alpha=12, targets=targets)  # type: ignore[arg-type]  # pydantic checks it
    bank = trained(BUILDERS[build](), spec, steps=3)
    save_lora(bank.model, spec, tmp_path, "some/base")
    ids = torch.arange(3, 40)[None]
    bank.model.eval()
    with torch.no_grad():
        ours = bank.model(ids).logits
        loaded = peft.PeftModel.from_pretrained(BUILDERS[build](), tmp_path).eval()
        theirs = loaded(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - BUILDERS[build]()(ids).logits).abs().max() > 1e-3
    wrapped = {
        name for name, module in loaded.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert len(wrapped) == len(bank.parameters) // 2


def test_training_equals_peft_and_adamw(tmp_path: Path) -> None:
    """Ten steps from the same start on the same batches, unpacked and one by one on PEFT's side."""
    spec = LoraSpec(rank=4, alpha=8)
    start = tiny.llama()
    start.requires_grad_(False)
    add_lora(start, spec, seed=0)
    save_lora(start, spec, tmp_path, "base")
    model = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    for step in range(10):
        chosen = examples(step)
        learned = sum(int(e.learned[1:].sum()) for e in chosen)
        for example in chosen:
            ids = torch.from_numpy(example.input_ids)[None]
            labels = torch.from_numpy(np.where(example.learned, example.input_ids, -100))
            logits = model(input_ids=ids).logits[0, :-1]
            (F.cross_entropy(logits, labels[1:], reduction="sum") / learned).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    theirs = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    bank = trained(tiny.llama(), spec, steps=10)
    assert {f"base_model.model.{name}" for name in bank.parameters} == set(theirs)
    for name, parameter in bank.parameters.items():
        torch.testing.assert_close(parameter, theirs[f"base_model.model.{name}"], rtol=0, atol=1e-4)


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    spec = LoraSpec(rank=4)
    bank = trained(tiny.llama(), spec, steps=2)
    save_lora(bank.model, spec, tmp_path, "base")
    other = tiny.llama()
    parameters = add_lora(other, spec, seed=5)
    load_lora(parameters, tmp_path)
    assert all(torch.equal(p, parameters[name]) for name, p in bank.parameters.items())
    with pytest.raises(ModelError, match="not an adapter of this base and method"):
        load_lora(add_lora(tiny.llama(), LoraSpec(rank=8), seed=0), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not an adapter of this base and method"):
        load_lora(parameters, tmp_path)


def test_the_config_has_what_servers_read(tmp_path: Path) -> None:
    spec = LoraSpec(rank=4, alpha=6, targets="attention")
    bank = trained(tiny.gpt2(), spec, steps=1)
    save_lora(bank.model, spec, tmp_path, "s3://models/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "s3://models/base"
    assert config["target_modules"] == ["attn.c_proj", "c_attn"]
    assert config["fan_in_fan_out"] is True
    read = peft.LoraConfig.from_pretrained(tmp_path)
    assert (read.r, read.lora_alpha, read.task_type) == (4, 6, "CAUSAL_LM")


def test_the_start_of_a_module_depends_on_its_name_and_the_seed_alone() -> None:
    few = add_lora(tiny.llama(), LoraSpec(rank=4, targets=("q_proj",)), seed=3)
    many = add_lora(tiny.llama(), LoraSpec(rank=4), seed=3)
    other = add_lora(tiny.llama(), LoraSpec(rank=4), seed=4)
    assert all(torch.equal(parameter, many[name]) for name, parameter in few.items())
    assert not any(torch.equal(p, other[n]) for n, p in many.items() if "lora_A" in n)


def test_a_target_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(ModelError) as caught:
        add_lora(tiny.llama(), LoraSpec(targets=("q_proj", "query")), seed=0)
    assert str(caught.value) == (
        "method.targets: no linear layer is called 'query'; the base has "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_the_head_is_never_wrapped() -> None:
    assert all("lm_head" not in path for path in linear_modules(tiny.llama()))
    assert len(target_paths(linear_modules(tiny.llama()), "attention")) == 2 * 4


def test_suffixes_fit_the_chosen_and_nothing_else() -> None:
    paths = [f"h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    for chosen in (paths[:1], paths[1:3], [p for p in paths if "mlp" in p], paths):
        others = [path for path in paths if path not in chosen]
        found = shortest_suffixes(chosen, others)
        assert {p for p in paths if any(p == s or p.endswith(f".{s}") for s in found)} == set(chosen)
