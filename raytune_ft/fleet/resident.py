"""A base that a lane holds, and what a job needs to be trained on it."""

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raytune_ft.errors import ModelError
from raytune_ft.fleet.blame import DoesNotFit, reading_checkpoint
from raytune_ft.fleet.placement import Group
from raytune_ft.model_files import base_digest, base_identity, model_folder, tokenizer_digest
from raytune_ft.models import load_base, load_tokenizer
from raytune_ft.planner import Choice, Lane, choose, choose_lane, lane_memory
from raytune_ft.spec import JobSpec
from raytune_ft.train.bank import Bank
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.checkpoint import Position, choice_holds, memory_settings, read_position
from raytune_ft.train.placement import Placement
from raytune_ft.train.probe import can_share_passes, check_isolation
from raytune_ft.train.process import compute_alike, keep_freed_memory
from raytune_ft.train.workbench import Workbench, device_of, layout_of, memory_bytes


class Resident:
    """A base on a lane's device, and the bank that jobs are trained on."""

    def __init__(self, group: Group, placement: Placement) -> None:
        """Load the base.

        Args:
            group: the base with all of its jobs, whichever of them will come.
            placement: what the lane has of its machine.

        Raises:
            ModelError: the base cannot be loaded.
        """
        began = time.perf_counter()
        self.group = group
        self._threads = placement.threads
        device = device_of(placement.use_gpu)
        compute_alike(placement.threads, device)
        keep_freed_memory(device)
        shared = 1 if placement.use_gpu else placement.workers_per_node
        self._device_bytes = memory_bytes(device) // shared
        self.plan = _plan(group, self._device_bytes)
        spec = group.jobs[0].spec.model
        self.tokenizer = load_tokenizer(spec)
        self.model = load_base(spec, device=device, dequantised=self.plan.resident == "dequantised")
        folder = model_folder(spec.path)
        self.identity = base_identity(spec.path)
        """What the base was when it was loaded; see `base_identity`."""
        self._digest, self._tokenizer_digest = base_digest(folder), tokenizer_digest(folder)
        self._refusals = {
            packed: _refusal(self, packed) for packed in {job.spec.data.packing for job in group.jobs}
        }
        self.bank = Bank(self.model, gradient_checkpointing=spec.gradient_checkpointing, paged=False)
        longest = max(job.spec.data.max_tokens for job in group.jobs)
        self._shares = can_share_passes(self.model, max_tokens=longest)
        self.set_slots(self.plan.slots)
        self.load_seconds = time.perf_counter() - began

    def set_slots(self, slots: int) -> None:
        """Let the lane train so many jobs at once."""
        self.slots = slots
        shared = sum(self.plan.row_tokens[:slots]) if slots > 1 and self._shares else 0
        self.bank.tokens_per_pass = shared

    def bench(self, job: JobSpec, data_fingerprint: str, checkpoint: Path | None) -> Workbench:
        """Put a job into a free slot, where it stands at `checkpoint`; `Recipe.begin` then restores it.

        Raises:
            ModelError: the base does not fit the job.
            DoesNotFit: the device does not hold the job.
            UnusableCheckpoint: it is damaged, or of another base, of other data or another program.
        """
        if refusal := self._refusals[job.data.packing]:
            raise refusal
        position = self._position(job, data_fingerprint, checkpoint)
        layout = layout_of(job, position.choice, self.model, self.tokenizer)
        # Last: from here on its slot is taken.
        engine = self.bank.enter(job.method, job.optimizer, seed=job.data.seed)
        return Workbench(self.model, self.tokenizer, engine, layout, position)

    def leave(self, bench: Workbench) -> None:
        """Free the slot of a job."""
        if isinstance(bench.engine, BankEngine):
            self.bank.leave(bench.engine)

    def _position(self, job: JobSpec, data_fingerprint: str, checkpoint: Path | None) -> Position:
        own = self._as_held(job)
        # All other slots may be taken by those that need most.
        others = self.plan.memory.total - lane_memory(self.group.facts, [own], self.plan.resident).total
        left_bytes = self._device_bytes - (max(0, others) if self.plan.slots > 1 else 0)
        made: dict[str, Any] = {
            "threads": self._threads,
            "workers": 1,
            "chosen_for": memory_settings(job),
            "tokenizer_digest": self._tokenizer_digest,
        }
        if checkpoint is None:
            choice = self._choose(own, left_bytes)
            return Position(0, data_fingerprint, self._digest, choice, **made)
        with reading_checkpoint():
            kept = read_position(checkpoint, data_fingerprint=data_fingerprint, base_digest=self._digest)
        if choice_holds(kept, job, workers=1, device_bytes=left_bytes):
            choice = replace(kept.choice, resident=self.plan.resident)
        else:
            choice = self._choose(own, left_bytes)
        return replace(kept, choice=choice, **made)

    def _choose(self, job: JobSpec, left_bytes: int) -> Choice:
        try:
            return choose(job, self.group.facts, left_bytes)
        except ModelError as error:
            raise DoesNotFit(str(error)) from None

    def _as_held(self, job: JobSpec) -> JobSpec:
        """A job whose base is held as the lane holds it."""
        if job.model.weight_bits != 4:
            return job
        held = job.model.model_copy(update={"resident": self.plan.resident})
        return job.model_copy(update={"model": held})


def _plan(group: Group, device_bytes: int) -> Lane:
    """How the lane holds the base, and for how many jobs; one that does not fit is refused when it comes."""
    jobs = [job.spec for job in group.jobs]
    try:
        return choose_lane(group.facts, jobs, device_bytes, group.lane.slots)
    except ModelError:
        fitting = [job for job in jobs if _fits(job, group, device_bytes)]
    return choose_lane(group.facts, fitting or jobs, device_bytes if fitting else None, group.lane.slots)


def _fits(job: JobSpec, group: Group, device_bytes: int) -> bool:
    try:
        choose_lane(group.facts, [job], device_bytes, 1)
    except ModelError:
        return False
    return True


def _refusal(resident: Resident, packed: bool) -> ModelError | None:
    """Why jobs that pack their rows, or that do not, cannot be trained on the base."""
    try:
        check_isolation(resident.model, packed=packed)
    except ModelError as error:
        return error
    return None


def free_device() -> None:
    """Give back what nobody holds any more, before the next base is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
