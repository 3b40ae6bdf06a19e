"""The bank: one resident base on one device, and the jobs that are trained on it, one or many."""

import warnings
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from raytune_ft.errors import ModelError, OutOfMemory
from raytune_ft.methods import METHODS, Method
from raytune_ft.methods.routing import Route, Share, set_route
from raytune_ft.models import head_paths
from raytune_ft.spec import OptimizerSpec, Section
from raytune_ft.train.bank_engine import BankEngine
from raytune_ft.train.batch import Batch
from raytune_ft.train.engine import Block, pass_number, pass_seed
from raytune_ft.train.faults import fault_of_device
from raytune_ft.train.forward import forward_of
from raytune_ft.train.loss import chunk_tokens, chunked_cross_entropy, cross_entropy_sum, sums_by_group
from raytune_ft.train.peers import Peers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Bank:
    """A base that stays on its device while jobs come and go, each in a slot of its own."""

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        tokens_per_pass: int = 0,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        paged: bool = True,
    ) -> None:
        """Take over a base.

        Args:
            model: frozen, on its device.
            tokens_per_pass: most padded tokens of a pass that several jobs share, of a base for which
                `can_share_passes` holds; 0: each job has passes of its own.
            gradient_checkpointing: recompute activations in the backward pass.
            compiled: see `forward_of`; each job has passes of its own.
            paged: let optimizers page their states, where a job asks for it; what they page is never freed.
        """
        self.model = model
        self.device = next(model.parameters()).device
        self.tokens_per_pass = tokens_per_pass
        self._forward = forward_of(model, compiled=compiled)
        embeddings: Tensor = model.get_input_embeddings().weight
        self._vocabulary = len(embeddings)
        self._jobs: dict[int, Method] = {}
        self._paged = paged
        self._spent = False
        self._head_of: BankEngine | None = None
        # A classifier's head is trained whole: each job begins with that of the base, and keeps its own.
        paths = tuple(f"{path}." for path in head_paths(model))
        self.head = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if name.startswith(paths)
        }
        """A classifier's head as the base brought it, by name; of another model nothing."""
        if gradient_checkpointing:
            model.activation_checkpointing_enable()

    def enter(
        self, method: Section, optimizer: OptimizerSpec, *, seed: int = 0, peers: Peers = Peers()
    ) -> "BankEngine":
        """Put a new job into a free slot. No other job's state changes.

        Args:
            method: what is trained, of the base or beside it.
            optimizer: of this job alone.
            seed: where its adapters begin, and what dropout takes.
            peers: the workers that train it.

        Raises:
            ModelError: the base does not fit the method, or one of the jobs changes the base itself.
        """
        kind = METHODS[type(method)]
        if self._spent or (kind.remove is None and self._jobs):
            raise ModelError(
                "a job that trains weights of the base itself shares it with no other: load the base again"
            )
        slot = next(number for number in count() if number not in self._jobs)
        for name, tensor in self.head.items():
            self._install(name, nn.Parameter(tensor.clone(), requires_grad=False))
        self._head_of = None
        # A base that is trained itself is another one from here on.
        self._spent = kind.remove is None
        try:
            engine = BankEngine(
                self,
                kind.add(self.model, method, seed, slot),
                optimizer,
                slot=slot,
                seed=seed,
                shares_passes=kind.shares_passes,
                unfreezing=kind.unfreezing(self.model, method),
                peers=peers,
                paged=self._paged,
            )
        except BaseException:
            # What is left of its adapters would be taken for those of the next job in the slot.
            if kind.remove is not None:
                kind.remove(self.model, slot)
            raise
        self._jobs[slot] = kind
        return engine

    def leave(self, engine: "BankEngine") -> None:
        """Free the slot of a job that has entered. No other job's state changes."""
        if self._head_of is engine:
            self._head_of = None
        remove = self._jobs.pop(engine.slot).remove
        if remove is not None:
            remove(self.model, engine.slot)

    def accumulate(self, blocks: Sequence[Block]) -> list[list[float] | Exception]:
        """See `Base.accumulate`.

        Raises:
            OutOfMemory: the device's memory does not hold the pass.
            DeviceFailed: the device does not work any more.
            Exception: of the backward pass of several blocks, whose gradients are then partly added.
        """
        failures = [block.batch.unknown_token(self._vocabulary) for block in blocks]
        sound = [block for block, failure in zip(blocks, failures, strict=True) if failure is None]
        found = iter(self._pass(sound) if sound else ())
        return [failure or next(found) for failure in failures]

    def _pass(self, blocks: Sequence[Block]) -> list[list[float] | Exception]:
        failure: Exception | None = None
        try:
            objective, losses = self._objective(blocks)
        except Exception as error:  # noqa: BLE001  it ends the job that it comes from, and no other
            _raise_fault(blocks, error)
            if len(blocks) == 1:
                return [error]
            # Its frames hold the memory of the pass.
            failure = error.with_traceback(None)
        if failure is not None:
            return self._one_by_one(blocks, failure)
        try:
            return self._learn(blocks, objective, losses)
        except Exception as error:
            _raise_fault(blocks, error)
            if len(blocks) > 1:
                raise
            return [error]

    def _one_by_one(self, blocks: Sequence[Block], failure: Exception) -> list[list[float] | Exception]:
        """Blocks that cannot be computed together: those that are to blame fail alone as well."""
        found = [sums for block in blocks for sums in self._pass([block])]
        if not any(isinstance(sums, Exception) for sums in found):
            # Nobody is to blame, so the next pass of several would fail like this one.
            self.tokens_per_pass = 0
            warnings.warn(
                f"{type(self.model).__name__} does not compute several jobs in a pass "
                f"({type(failure).__name__}: {failure}); they take turns from now on",
                RuntimeWarning,
                stacklevel=2,
            )
        return found

    def _learn(
        self, blocks: Sequence[Block], objective: Tensor, losses: Sequence[Tensor]
    ) -> list[list[float] | Exception]:
        """Add the gradients; the sums of cross-entropies of each block by source."""
        objective.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        for block in blocks:
            _own(block).collect()
        sums = [
            sums_by_group(loss_N, block.batch.group_N.to(self.device), block.sources)
            for loss_N, block in zip(losses, blocks, strict=True)
        ]
        values = iter(torch.cat(sums).tolist())
        return [[next(values) for _ in range(block.sources)] for block in blocks]

    def _objective(self, blocks: Sequence[Block]) -> tuple[Tensor, Sequence[Tensor]]:
        """What to learn from, and the cross-entropies of each block."""
        for block in blocks:
            _own(block).begin(block.step)
            self._take_head(_own(block))
        # A base may have dropout of its own; such a base has one block in a pass. Its masks become a function
        # of the pass, so that a resumed run draws those that an uninterrupted one drew.
        first = blocks[0]
        torch.manual_seed(pass_seed(_own(first).seed, pass_number(first.step, first.forward)))
        self.model.train()
        batches = [block.batch.to(self.device) for block in blocks]
        set_route(
            self.model,
            Route(
                [
                    Share(_own(block).slot, block.step, batch.example_BX, batch.position_ids_BT)
                    for block, batch in zip(blocks, batches, strict=True)
                ]
            ),
        )
        counts = [batch.learned_tokens for batch in batches]
        scale_K = 1.0 / torch.tensor([block.divisor for block in blocks], dtype=torch.float32)
        hidden_ND = self._forward.learned(*batches)
        objective, loss_N = chunked_cross_entropy(
            hidden_ND,
            torch.cat([batch.labels_N for batch in batches]),
            scale_K.repeat_interleave(torch.tensor(counts)).to(self.device),
            self._forward.project,
            self._forward.head,
            chunk_tokens(hidden_ND, self._forward.head),
        )
        return objective, torch.split(loss_N, counts)

    def idle(self) -> None:
        """See `Base.idle`. Each worker holds all weights, so nobody needs another within a pass."""

    @torch.no_grad()
    def evaluate(self, engine: "BankEngine", batch: Batch) -> float:
        """Sum of cross-entropies of a batch by the weights of one job.

        Raises:
            DataError: it has tokens that the base does not know.
        """
        if (failure := batch.unknown_token(self._vocabulary)) is not None:
            raise failure
        self.select(engine)
        self.model.eval()
        batch = batch.to(self.device)
        hidden_ND = self._forward.learned(batch)
        size = chunk_tokens(hidden_ND, self._forward.head)
        return float(cross_entropy_sum(hidden_ND, batch.labels_N, self._forward.project, size))

    def select(self, engine: "BankEngine") -> None:
        """Compute with the weights of one job alone, whatever comes, until the next pass."""
        set_route(self.model, Route.whole(engine.slot))
        self._take_head(engine)

    def _take_head(self, engine: "BankEngine") -> None:
        if self._head_of is not engine:
            for name in self.head.keys() & engine.parameters.keys():
                self._install(name, engine.parameters[name])
            self._head_of = engine

    def _install(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(path), leaf, parameter)


def _own(block: Block) -> BankEngine:
    """The engine of a block that is computed on a bank."""
    return cast(BankEngine, block.engine)


def _raise_fault(blocks: Sequence[Block], error: Exception) -> None:
    """Raise what an error of a pass says of the device, if it says anything."""
    fault = fault_of_device(error)
    if isinstance(fault, OutOfMemory):
        tokens = sum(block.batch.input_ids_BT.numel() for block in blocks)
        raise OutOfMemory(
            f"step {blocks[0].step}: {tokens} tokens in a forward pass do not fit the device; use a smaller "
            f"batch.sequences_per_worker or model.gradient_checkpointing: true ({error})"
        ) from None
    if fault is not None:
        raise fault from None
