"""What two workers under Ray Train record of their steps, also when they fail on the way."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.cloudpickle
import ray.train
import tiny
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raytune_ft.data.pack import share
from raytune_ft.errors import RaytuneError
from raytune_ft.methods.lora import add_lora
from raytune_ft.planner import Choice, MemoryPlan
from raytune_ft.spec import LoraSpec, OptimizerSpec
from raytune_ft.storage import open_storage
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Layout, Step, Tokens
from raytune_ft.train.checkpoint import Position, read_position
from raytune_ft.train.loop import fit
from raytune_ft.train.peers import Peers
from raytune_ft.train.progress import EventReader, EventWriter
from raytune_ft.train.recorder import Recorder
from raytune_ft.train.uploads import Uploads

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

STEPS = 5
EVERY = 2
ESTIMATED = 9
"""Steps that were expected; the end of the data shows how many there are."""
START = Position(
    step=0, data_fingerprint="data", base_digest="base", threads=1, workers=2,
    choice=Choice("dequantised", 4096, MemoryPlan(1, 2, 3, 4, 5)),
)  # fmt: skip


def own_steps(peers: Peers, start: int) -> Iterator[Step]:
    """Three sources, of which the last has its only example in the second step."""
    layout = Layout(True, 64, 2, None, 96)
    for step in range(start, STEPS):
        random = np.random.default_rng(step)
        sources = [0, 1, 0, 2] if step == 1 else [0, 1, 0]
        examples = [Tokens(random.integers(3, 320, 12 + s), np.arange(12 + s) >= 6, s) for s in sources]
        mine = share([len(example.input_ids) for example in examples], peers.count)[peers.rank]
        batches = layout.batches([examples[at] for at in mine])
        yield Step(batches, len(examples), f"step {step}", sources=3)


def train(config: dict[str, Any]) -> list[dict[str, Any]]:
    """One worker; the history that its checkpoints hold."""
    torch.set_num_threads(1)
    peers = Peers.current()
    base = tiny.llama().requires_grad_(False)
    engine = BankEngine(Bank(base), add_lora(base, LoraSpec(rank=4), 0), OptimizerSpec(), peers=peers)
    position, checkpoint = START, ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            position = read_position(Path(folder), data_fingerprint="data", base_digest="base")
            engine.load(Path(folder))

    def steps() -> Iterator[Step]:
        for number, step in enumerate(own_steps(peers, position.step), position.step):
            if number == config["fails_at"] and checkpoint is None:
                raise RuntimeError("as the test wants it")
            yield step

    def validate() -> dict[str, float]:
        return {"validation_loss": 1.5} if peers.rank == 0 else {}

    failures: list[RaytuneError] = []
    events = EventWriter(config["channel"])
    uploads = Uploads(
        open_storage(config["folder"]), peers.rank, may_write=lambda: None, on_failure=failures.append
    )
    recorder = Recorder(
        engine, position, ESTIMATED, EVERY, events, validate, peers, lambda: {"of": "the data"}, uploads
    )
    fit(engine, steps(), start=position.step, learning_rate=lambda _: 1e-3, report=recorder, peers=peers)
    end = recorder.finish()
    assert (end.step, end.data) == (STEPS, {"of": "the data"})
    assert recorder.finish() == end
    assert not failures
    return end.history


def run(folder: Path, fails_at: int | None) -> tuple[list[dict[str, Any]], Position, list[dict[str, Any]]]:
    """The history, the last checkpoint, and the events of a run."""
    for module in (tiny, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)  # the workers cannot import tests
    reader = EventReader(folder.name)
    result = DataParallelTrainer(
        train,
        train_loop_config={
            "channel": folder.name,
            "fails_at": fails_at,
            "folder": str(folder / folder.name),
        },
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        backend_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name=folder.name, storage_path=str(folder), failure_config=FailureConfig(max_failures=1)
        ),
    ).fit()
    with result.checkpoint.as_directory() as kept:
        position = read_position(Path(kept), data_fingerprint="data", base_digest="base")
    events = list(reader.read())
    reader.close()
    return result.return_value, position, events


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if not key.endswith("seconds")} for entry in history]


@pytest.mark.usefixtures("cluster")
def test_two_workers_leave_one_record_bit_for_bit_also_after_a_failure(tmp_path: Path) -> None:
    history, position, events = run(tmp_path / "whole", fails_at=None)
    assert position.step == STEPS
    assert without_times(position.history) == without_times(history)
    assert all(history[step - 1]["upload_seconds"] > 0 for step in (2, 4, 5))
    due = [entry["step"] for entry in history if "source_losses" in entry]
    assert due == [entry["step"] for entry in history if entry.get("validation_loss") == 1.5] == [2, 4, 5]
    assert history[1]["source_losses"][2] > 0
    assert [history[at]["source_losses"][2] for at in (3, 4)] == [None, None]
    assert [entry["batch"] for entry in history] == [f"step {step}" for step in range(STEPS)]
    assert not {"source_loss_sums", "source_learned_tokens"} & history[0].keys()
    sent = {entry["step"]: entry for event in events for entry in event["history"]}
    assert without_times(list(sent.values())) == without_times(history)

    resumed, position, _ = run(tmp_path / "failed", fails_at=3)
    assert without_times(resumed) == without_times(history)
    assert without_times(position.history) == without_times(resumed)
