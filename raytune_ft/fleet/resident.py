"""A base that a lane holds, and what a job needs to be trained on it."""

import gc
import time
from dataclasses import replace
from pathlib import Path

import torch

from raytune_ft.errors import ModelError
from raytune_ft.fleet.placement import Group
from raytune_ft.models import base_digest, base_identity, load_base, load_tokenizer, model_folder
from raytune_ft.planner import Choice, Lane, choose, choose_lane, lane_memory
from raytune_ft.spec import JobSpec
from raytune_ft.train.bank import Bank, BankEngine
from raytune_ft.train.checkpoint import Position, read_position
from raytune_ft.train.placement import Placement
from raytune_ft.train.probe import can_share_passes, check_isolation
from raytune_ft.train.workbench import Workbench, compute_alike, device_of, layout_of, memory_bytes


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
        shared = 1 if placement.use_gpu else placement.workers_per_node
        self._device_bytes = memory_bytes(device) // shared
        self.plan = _plan(group, self._device_bytes)
        spec = group.jobs[0].spec.model
        self.tokenizer = load_tokenizer(spec)
        self.model = load_base(spec, device=device, dequantised=self.plan.resident == "dequantised")
        folder = model_folder(spec.path)
        self.identity = base_identity(spec.path)
        """What the base was when it was loaded; see `base_identity`."""
        self._digest = base_digest(folder)
        self._refusals = {
            packed: _refusal(self, packed) for packed in {job.spec.data.packing for job in group.jobs}
        }
        self.bank = Bank(self.model, gradient_checkpointing=spec.gradient_checkpointing)
        self._shares = can_share_passes(self.model)
        self.set_slots(self.plan.slots)
        self.load_seconds = time.perf_counter() - began

    def set_slots(self, slots: int) -> None:
        """Let the lane train so many jobs at once."""
        self.slots = slots
        longest = max(job.spec.data.max_tokens for job in self.group.jobs)
        # What the plan of a lane's memory rests on: a pass has a row of each job.
        self.bank.tokens_per_pass = slots * longest if slots > 1 and self._shares else 0

    def bench(self, job: JobSpec, data_fingerprint: str, checkpoint: Path | None) -> Workbench:
        """Put a job into a free slot, where it stands at `checkpoint`; `Recipe.begin` then restores it.

        Raises:
            ModelError: the base does not fit the device, the job or the checkpoint.
            DataError: the checkpoint was trained on other data.
        """
        if refusal := self._refusals[job.data.packing]:
            raise refusal
        position = self._position(job, data_fingerprint, checkpoint)
        engine = self.bank.enter(job.method, job.optimizer, seed=job.data.seed)
        layout = layout_of(job, position.choice, self.model, self.tokenizer)
        return Workbench(self.model, self.tokenizer, engine, layout, position)

    def leave(self, bench: Workbench) -> None:
        """Free the slot of a job."""
        if isinstance(bench.engine, BankEngine):
            self.bank.leave(bench.engine)

    def _position(self, job: JobSpec, data_fingerprint: str, checkpoint: Path | None) -> Position:
        if checkpoint is None:
            return Position(0, data_fingerprint, self._digest, self._choice(job), self._threads, 1)
        kept = read_position(checkpoint, data_fingerprint=data_fingerprint, base_digest=self._digest)
        choice = replace(kept.choice, resident=self.plan.resident)
        return replace(kept, choice=choice, threads=self._threads, workers=1)

    def _choice(self, job: JobSpec) -> Choice:
        """What `auto` becomes for a job, with all other slots taken by those that need most."""
        own = job
        if job.model.weight_bits == 4:
            held = job.model.model_copy(update={"resident": self.plan.resident})
            own = job.model_copy(update={"model": held})
        others = self.plan.memory.total - lane_memory(self.group.facts, [own], self.plan.resident).total
        return choose(own, self.group.facts, self._device_bytes - max(0, others))


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
