"""The published model is the trained one, and no rank held it. Real DeepSpeed engines over gloo."""

import importlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sharding import computed, differences, join, new_engine, run_group, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from raytune_ft.train.export import _write_configs, export_full

LAYERS = 6
SHARD_BYTES = 20_000
WORLD = 2


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made under it, at the most that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._seen: set[int] = set()

    def _count(self, tensors: Any, *, made: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                storage = tensor.untyped_storage()
                size = storage.nbytes() if made else 0
                self._seen.add(storage._cdata)
                self.now += size
                weakref.finalize(storage, self._gone, storage._cdata, size)
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count((args, kwargs), made=False)
        results = func(*args, **(kwargs or {}))
        self._count(results, made=True)
        return results


def mixtral() -> PreTrainedModel:
    """Experts are one tensor in memory and many in files."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=24,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            vocab_size=97,
        )
    )


def t5() -> PreTrainedModel:
    """Layers of two stacks, and an embedding that three modules share."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(d_model=24, d_kv=6, d_ff=16, num_layers=2, num_heads=2, vocab_size=97)
    )


PUBLISHED: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny.llama(hidden=24, layers=LAYERS, vocabulary=97),
    "mixtral": mixtral,
    "t5": t5,
}
EXPORTS = [("llama", 2, "fp32"), ("llama", 3, "bf16"), ("mixtral", 3, "fp32"), ("t5", 3, "bf16")]


def publish(kind: str, stage: int, dtype: str, rank: int, folder: Path) -> int:
    """Exports a model that was trained where it is a Llama; returns the bytes that this took at most."""
    engine, names = new_engine(stage, dtype, model=PUBLISHED[kind]())
    if kind == "llama":
        train(engine, range(2))
    target = folder / f"{kind}-{stage}-{dtype}"
    target.mkdir(exist_ok=True)
    with Live() as live:
        export_full(engine.module, target, rank, max_shard_bytes=SHARD_BYTES)
    expected = computed(names)
    if rank == 0:
        torch.save(expected, folder / f"{target.name}.pt")
    if kind == "llama":
        train(engine, [2])  # It can go on.
    return live.peak


def work(rank: int, world: int, name: str) -> None:
    folder = Path(name)
    join(rank, world, name)
    torch.save([publish(*export, rank, folder) for export in EXPORTS], folder / f"peaks-{rank}.pt")
    (folder / "one-file").mkdir(exist_ok=True)
    export_full(new_engine(1)[0].module, folder / "one-file", rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    run_group(work, WORLD, folder)
    return folder


@pytest.mark.parametrize(("kind", "stage", "dtype"), EXPORTS)
def test_the_published_model_is_the_trained_one(kind: str, stage: int, dtype: str, folder: Path) -> None:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    target = folder / f"{kind}-{stage}-{dtype}"
    model, loading = auto.from_pretrained(target, output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    weights = dict(model.named_parameters())
    expected = torch.load(folder / f"{target.name}.pt")
    assert weights.keys() == expected.keys()
    assert differences(weights, expected) == []


def test_the_published_files_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    for kind, stage, dtype in EXPORTS:
        target = folder / f"{kind}-{stage}-{dtype}"
        model = (AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM).from_pretrained(target)
        model.save_pretrained(tmp_path / kind)
        index = json.loads((target / "model.safetensors.index.json").read_text())
        written: dict[str, Tensor] = {}
        for file in sorted(target.glob("*.safetensors")):
            tensors = load_file(file)
            assert {index["weight_map"][name] for name in tensors} == {file.name}
            assert sum(t.nbytes for t in tensors.values()) <= SHARD_BYTES or len(tensors) == 1
            written |= tensors
        theirs = load_file(tmp_path / kind / "model.safetensors")
        assert written.keys() == theirs.keys() == index["weight_map"].keys()
        assert differences(written, theirs) == []
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in theirs.values())
        ours, config = (
            json.loads((place / "config.json").read_text()) for place in (target, tmp_path / kind)
        )
        assert ours == config


def test_a_model_that_fits_one_file_has_no_index(folder: Path) -> None:
    assert sorted(file.name for file in (folder / "one-file").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_code_of_its_own_is_published_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("modeling_own").Own
    own.register_for_auto_class("AutoModelForCausalLM")
    published = tmp_path / "published"
    published.mkdir()
    _write_configs(own(tiny.llama().config), published)
    assert (published / "modeling_own.py").read_text() == (tmp_path / "modeling_own.py").read_text()
    config = json.loads((published / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_own.Own"}


def test_no_rank_holds_the_model_to_publish_it(folder: Path) -> None:
    at = EXPORTS.index(("llama", 3, "bf16"))
    weights = torch.load(folder / "llama-3-bf16.pt")
    layer_bytes = sum(tensor.nbytes for name, tensor in weights.items() if ".layers.0." in name)
    first, second = (torch.load(folder / f"peaks-{rank}.pt")[at] for rank in range(WORLD))
    assert 0 < second <= 2 * layer_bytes
    assert first <= 3 * layer_bytes + SHARD_BYTES
    assert sum(tensor.nbytes for tensor in weights.values()) > 6 * layer_bytes
