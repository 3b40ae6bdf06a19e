"""Publishing what was trained: a disk that fails is no fault of training."""

from pathlib import Path

import pytest
import tiny
from safetensors.torch import save_file

from raytune_ft.catalog import BaseModelRef
from raytune_ft.errors import StorageFull
from raytune_ft.methods.lora import add_lora
from raytune_ft.planner import Choice, MemoryPlan
from raytune_ft.spec import LoraSpec, parse_job
from raytune_ft.train.checkpoint import Position
from raytune_ft.train.publish import publish
from raytune_ft.train.run import RunState
from raytune_ft.train.selection import Selection


def test_the_record_names_the_tokenizer(tmp_path: Path) -> None:
    job = parse_job(
        {
            "name": "sums",
            "model": {"path": "base"},
            "data": {"sources": [{"uri": "data.jsonl"}]},
            "publish": {"catalog": str(tmp_path / "catalog")},
        }
    )
    (folder := tmp_path / "files").mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    choice = Choice("dequantised", 4096, MemoryPlan(1, 2, 3, 4, 5))
    history = [{"tokens": 1, "learned_tokens": 1, "loss": 1.0}]
    position = Position(1, "d", "b", choice, threads=1, workers=1, history=history, tokenizer_digest="a" * 64)
    state = RunState(1, "attempt", "d", "b")
    record = publish(job, state, position, {}, None, folder, "causal", None, Selection(1))
    assert record.base == BaseModelRef(path="base", digest="b", tokenizer_digest="a" * 64)


def test_a_disk_that_is_full_when_the_job_is_written(small_disk: Path, tmp_path: Path) -> None:
    job = parse_job(
        {
            "name": "sums",
            "model": {"path": "base"},
            # Its weights fit the disk, and the job does not.
            "data": {"sources": [{"uri": "x" * (2 << 20)}]},
            "publish": {"catalog": str(tmp_path / "catalog")},
        }
    )
    parameters = add_lora(tiny.llama(), LoraSpec(rank=1), seed=0)
    choice = Choice("dequantised", 4096, MemoryPlan(1, 2, 3, 4, 5))
    history = [{"tokens": 1, "learned_tokens": 1, "loss": 1.0}]
    position = Position(1, "d", "b", choice, threads=1, workers=1, history=history)
    state = RunState(1, "attempt", "d", "b")
    save_file({name: p.detach() for name, p in parameters.items()}, small_disk / "adapter_model.safetensors")
    with pytest.raises(StorageFull, match="the disk is full"):
        publish(job, state, position, {}, None, small_disk, "causal", None, Selection(1))
    assert not (tmp_path / "catalog").exists()
