"""Setting up a worker: the base on its device, what is trained on it, and the state that it goes on from."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from raytune_ft.errors import ModelError
from raytune_ft.methods import METHODS, saving
from raytune_ft.model_files import base_digest, model_folder, read_facts, tokenizer_digest
from raytune_ft.models import load_base, load_tokenizer
from raytune_ft.planner import Choice, choose, trainable_parameters
from raytune_ft.spec import JobSpec
from raytune_ft.train.assignment import Assignment
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Layout
from raytune_ft.train.checkpoint import Position, choice_holds, memory_settings, read_position
from raytune_ft.train.forward import arrangement_of
from raytune_ft.train.peers import Peers
from raytune_ft.train.probe import check_isolation
from raytune_ft.train.process import compute_alike, keep_freed_memory
from raytune_ft.train.sharded import ShardedEngine, divided_while_loading, join_group, zero_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_SHARD_FILES = "rank-*.safetensors"
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""What a container may use, which is less than what its machine has."""


@dataclass(frozen=True)
class Workbench:
    """All that a run works with."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    engine: BankEngine | ShardedEngine
    layout: Layout
    position: Position
    """Where the run goes on: at step 0, or where the checkpoint stands."""

    def write_result(self, job: JobSpec, folder: Path, rank: int) -> None:
        """Write what is published; all workers call it together, and the first one writes.

        Raises:
            StorageError: the disk fails or is full.
        """
        method = METHODS[type(job.method)]
        sharded = self.engine if isinstance(self.engine, ShardedEngine) else None
        if sharded and method.artifact == "model":
            sharded.write_model(folder)
            return
        with sharded.whole_parameters() if sharded else nullcontext(), saving(folder):
            if rank == 0:
                self.engine.select()
                method.save(self.model, job.method, folder, job.model.path, self.engine.slot)


def set_up(assignment: Assignment, checkpoint: Path | None, peers: Peers) -> Workbench:
    """Load the base and add the method; `engine.load` then restores a checkpoint.

    Raises:
        ModelError: the base does not fit the device, the job or the checkpoint.
        DataError: the checkpoint was trained on other data.
    """
    job = assignment.job
    device = device_of(assignment.placement.use_gpu)
    tokenizer = load_tokenizer(job.model)
    position = _position(assignment, checkpoint, model_folder(job.model.path), device, peers)
    compute_alike(position.threads, device)
    keep_freed_memory(device)
    if checkpoint:
        _check_form(checkpoint, job)
    resident = position.choice.resident
    make = _sharded if job.cluster.zero_stage else _bank
    model, engine = make(job, device, resident == "dequantised", peers)
    check_isolation(model, packed=job.data.packing)
    return Workbench(model, tokenizer, engine, layout_of(job, position.choice, model, tokenizer), position)


def _bank(
    job: JobSpec, device: torch.device, dequantised: bool, peers: Peers
) -> tuple["PreTrainedModel", BankEngine]:
    model = load_base(job.model, device=device, dequantised=dequantised)
    bank = Bank(model, gradient_checkpointing=job.model.gradient_checkpointing, compiled=job.model.compile)
    return model, bank.enter(job.method, job.optimizer, seed=job.data.seed, peers=peers)


def _sharded(
    job: JobSpec, device: torch.device, dequantised: bool, peers: Peers
) -> tuple["PreTrainedModel", ShardedEngine]:
    join_group(device)
    facts = read_facts(model_folder(job.model.path, weights=False))
    config = zero_config(
        job.cluster,
        weight_bits=job.model.weight_bits,
        max_grad_norm=job.optimizer.max_grad_norm,
        parameters=trainable_parameters(facts, job),
        hidden=facts.hidden,
    )
    # Quantised weights are divided after they are loaded: bitsandbytes quantises whole layers.
    divided = job.cluster.zero_stage == 3 and job.model.weight_bits >= 16
    with divided_while_loading(config) if divided else nullcontext():
        model = load_base(job.model, device=None if divided else device, dequantised=dequantised)
    parameters = METHODS[type(job.method)].add(model, job.method, job.data.seed, 0)
    engine = ShardedEngine(
        model,
        parameters,
        job.optimizer,
        config,
        device=device,
        seed=job.data.seed,
        gradient_checkpointing=job.model.gradient_checkpointing,
        compiled=job.model.compile,
        peers=peers,
    )
    return model, engine


def _check_form(checkpoint: Path, job: JobSpec) -> None:
    """Refuse a checkpoint of the other engine."""
    divided = any(checkpoint.glob(_SHARD_FILES))
    if divided != bool(job.cluster.zero_stage):
        held, remedy = ("1, 2 or 3", "1, 2 or 3") if divided else ("0", "0")
        raise ModelError(
            f"the checkpoint was written with cluster.zero_stage = {held}, and the job says "
            f"{job.cluster.zero_stage}; set it to {remedy}, or start over with --restart"
        )


def _position(
    assignment: Assignment, checkpoint: Path | None, folder: Path, device: torch.device, peers: Peers
) -> Position:
    fingerprint, digest = assignment.state.data_fingerprint, base_digest(folder)
    kept = checkpoint and read_position(checkpoint, data_fingerprint=fingerprint, base_digest=digest)
    # A run goes on with the same tokenizer alone; see `base_identity`.
    tokenizer = tokenizer_digest(folder)
    kept = kept and replace(kept, tokenizer_digest=tokenizer)
    job, placement = assignment.job, assignment.placement
    shared = 1 if placement.use_gpu else placement.workers_per_node
    # All workers ask together, and so agree on what follows.
    share_bytes = int(peers.smallest(memory_bytes(device) // shared))
    if kept and choice_holds(kept, job, workers=peers.count, device_bytes=share_bytes):
        return kept
    made: dict[str, Any] = {
        "choice": choose(job, read_facts(folder), share_bytes),
        "threads": placement.threads,
        "workers": peers.count,
        "chosen_for": memory_settings(job),
        "tokenizer_digest": tokenizer,
    }
    return replace(kept, **made) if kept else Position(0, fingerprint, digest, **made)


def device_of(use_gpu: bool) -> torch.device:
    """What a worker computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


def memory_bytes(device: torch.device) -> int:
    """All memory of the device, not what is free now: a choice must not depend on the neighbours."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total)
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(total, int(limit)) if limit.isdecimal() else total


def layout_of(
    job: JobSpec, choice: Choice, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> Layout:
    """How the examples of a job's steps share rows and passes."""
    given = job.batch.sequences_per_worker
    return Layout(
        packing=job.data.packing,
        max_tokens=job.data.max_tokens,
        pad_token_id=tokenizer.pad_token_id,
        sequences_per_forward=None if given == "auto" else given,
        tokens_per_forward=choice.tokens_per_forward,
        arrangement=arrangement_of(model, tokenizer),
    )
