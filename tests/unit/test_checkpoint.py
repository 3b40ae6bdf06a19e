"""What a checkpoint says of itself, and when it is not the one that is looked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from raytune_ft.errors import DataError, ModelError, OutOfMemory
from raytune_ft.methods.lora import add_lora
from raytune_ft.planner import Choice, MemoryPlan
from raytune_ft.spec import JobSpec, LoraSpec, OptimizerSpec, parse_job
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.checkpoint import (
    SCHEMA_VERSION,
    Position,
    choice_holds,
    memory_settings,
    read_position,
    with_position,
)

POSITION = Position(
    step=3,
    data_fingerprint="data",
    base_digest="base",
    choice=Choice("dequantised", 4096, MemoryPlan(1, 2, 3, 4, 5)),
    threads=2,
    workers=3,
    data={"train_counts": [[0, 17]], "sources": [], "bad": []},
    history=[{"step": 1, "loss": 2.5}, {"step": 2, "loss": 0.1 + 0.2}, {"step": 3, "loss": 1e-17}],
    before={"scores": {"exact_match": 0.5}, "answers": ["é", ""]},
)


def engine(rank: int = 4, seed: int = 0) -> BankEngine:
    base = tiny.llama()
    base.requires_grad_(False)
    return BankEngine(Bank(base), add_lora(base, LoraSpec(rank=rank), seed), OptimizerSpec())


def write(folder: Path, position: Position) -> None:
    snapshot = engine().snapshot()
    assert snapshot
    with_position(snapshot, position)(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write(tmp_path, POSITION)
    return tmp_path


def test_what_is_written_is_read(checkpoint: Path) -> None:
    assert read_position(checkpoint, data_fingerprint="data", base_digest="base") == POSITION
    other = engine(seed=1)
    other.load(checkpoint)
    for name, parameter in engine().parameters.items():
        assert torch.equal(parameter, other.parameters[name])


def test_the_bare_start_is_a_position_too(tmp_path: Path) -> None:
    start = replace(POSITION, step=0, history=[], before=None)
    write(tmp_path, start)
    assert read_position(tmp_path, data_fingerprint="data", base_digest="base") == start


@pytest.mark.parametrize(
    ("data", "base", "error", "message"),
    [
        (
            "new",
            "base",
            DataError,
            "the data changed since the checkpoint was written; --restart starts over",
        ),
        (
            "data",
            "new",
            ModelError,
            "the base model changed since the checkpoint was written; --restart starts over",
        ),
    ],
)
def test_other_inputs(checkpoint: Path, data: str, base: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        read_position(checkpoint, data_fingerprint=data, base_digest=base)
    assert str(caught.value) == message


@pytest.mark.parametrize("version", [None, SCHEMA_VERSION + 1, str(SCHEMA_VERSION)])
def test_another_version_is_refused_whatever_else_stands_there(checkpoint: Path, version: object) -> None:
    path = checkpoint / "position.json"
    path.write_text(json.dumps({"schema_version": version, "a field of its own": 1}))
    with pytest.raises(ModelError) as caught:
        read_position(checkpoint, data_fingerprint="data", base_digest="base")
    assert str(caught.value) == (
        f"the checkpoint has schema version {version}, and this program reads {SCHEMA_VERSION}; "
        "--restart starts over"
    )


def test_another_method(checkpoint: Path) -> None:
    with pytest.raises(ModelError) as caught:
        engine(rank=8).load(checkpoint)
    assert str(caught.value) == "the checkpoint is of another model or method; --restart starts over"


def job(**sections: Any) -> JobSpec:
    return parse_job(
        {
            "name": "j",
            "model": {"path": "base", "weight_bits": 32},
            "data": {"sources": [{"uri": "d.jsonl"}]},
            "publish": {"catalog": "c"},
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("sections", "workers", "device_bytes", "holds"),
    [
        ({}, 3, 100, True),
        ({"optimizer": {"learning_rate": 1.0}}, 3, 100, True),
        ({}, 2, 100, False),
        ({}, 3, 17, False),
        ({"cluster": {"zero_stage": 2}}, 3, 100, False),
        ({"cluster": {"zero_stage": 3, "offload": "optimizer"}}, 3, 100, False),
        ({"batch": {"sequences_per_worker": 1}}, 3, 100, False),
        ({"model": {"path": "base", "weight_bits": 32, "gradient_checkpointing": True}}, 3, 100, False),
        ({"model": {"path": "base", "weight_bits": 32, "resident": "packed"}}, 3, 100, False),
    ],
)
def test_a_choice_holds_where_it_fits_and_the_job_says_the_same(
    checkpoint: Path, sections: dict[str, Any], workers: int, device_bytes: int, holds: bool
) -> None:
    written = replace(POSITION, chosen_for=memory_settings(job()))
    write(checkpoint, written)
    kept = read_position(checkpoint, data_fingerprint="data", base_digest="base")
    assert choice_holds(kept, job(**sections), workers=workers, device_bytes=device_bytes) is holds


def test_a_full_device_is_not_taken_for_a_damaged_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(OutOfMemory):
        engine().load(checkpoint)
