"""Sharded checkpoints: every rank writes what it owns, and any number of ranks reads what it needs.

Rank r writes `rank-<r>.safetensors`. It holds ranges of flattened parameters: the float32 master weights and,
under the optimizer's own names, what it keeps for each element. The file's header says which ranges these
are, of which parameters and how many ranks wrote. A folder counts as a checkpoint where every element of
every parameter stands in it exactly once.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from raytune_ft.errors import ModelError
from raytune_ft.methods import saving
from raytune_ft.quantise import whole_shape
from raytune_ft.train.engine import Snapshot
from raytune_ft.train.fragments import (
    Fragment,
    fragments,
    optimizer_state,
    refresh,
)

if TYPE_CHECKING:
    import deepspeed

SCHEMA_VERSION = 1
_MASTER = "master"
_MANIFEST = "raytune_ft"
_REMEDY = "restore the file, or start over with --restart"


@dataclass(frozen=True)
class Piece:
    """A range of a flattened parameter in a file."""

    name: str
    start: int
    numel: int
    step: int
    """Optimizer steps that the parameter has taken."""
    state: tuple[str, ...]
    """What the optimizer keeps for each element, by its own names."""

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.numel

    def tensor_name(self, kind: str) -> str:
        """Its name in the file; `kind` is `master` or one of `state`."""
        return f"{kind}/{self.name}:{self.start}"


@dataclass(frozen=True)
class Manifest:
    """What a file's header says."""

    schema_version: int
    rank: int
    world: int
    updates: int
    """Optimizer steps of the engine: files of two checkpoints do not make one."""
    stage: int
    shapes: dict[str, list[int]]
    pieces: tuple[Piece, ...]

    @classmethod
    def from_header(cls, metadata: Mapping[str, str] | None) -> "Manifest":
        """Read it back.

        Raises:
            KeyError, TypeError, ValueError: the header is not one of ours.
        """
        kept = json.loads((metadata or {})[_MANIFEST])
        pieces = (Piece(**{**piece, "state": tuple(piece["state"])}) for piece in kept.pop("pieces"))
        return cls(pieces=tuple(pieces), **kept)


@dataclass(frozen=True)
class Overlap:
    """A part of a wanted range, and where it stands."""

    source: int
    """Index among the ranges that were offered."""
    first: int
    """First element, in the source."""
    at: int
    """First element, in the wanted range."""
    numel: int


def overlaps(offered: Sequence[tuple[int, int]], start: int, end: int) -> Iterator[Overlap]:
    """The parts of [start, end) that the half-open ranges `offered` hold, in the order of `offered`."""
    for source, (low, high) in enumerate(offered):
        first, last = max(low, start), min(high, end)
        if first < last:
            yield Overlap(source, first - low, first - start, last - first)


def misfit(offered: Iterable[tuple[int, int]], numel: int) -> str | None:
    """What keeps half-open ranges from covering [0, numel) exactly once; None where nothing does."""
    reached = 0
    for low, high in sorted(offered):
        if low > reached:
            return f"elements {reached} to {low - 1} of {numel} are missing"
        if low < reached:
            return f"elements {low} to {min(high, reached) - 1} of {numel} stand in it twice"
        reached = high
    if reached < numel:
        return f"elements {reached} to {numel - 1} of {numel} are missing"
    return f"elements {numel} to {reached - 1} are more than its {numel}" if reached > numel else None


def copy_shards(
    engine: "deepspeed.DeepSpeedEngine", names: Mapping[str, nn.Parameter], rank: int
) -> Snapshot:
    """Copy this rank's part of the master weights and the optimizer's state. No rank waits for another.

    Args:
        engine: ZeRO stage 1 to 3, with or without offload to the host's memory.
        names: every parameter that the optimizer steps.
        rank: this process among all that write.

    Returns:
        Writes `rank-<r>.safetensors` into a folder, where it appears when it is complete. It raises
        StorageFull where no space is left, and StorageError where the disk fails otherwise; what stood in the
        folder before stands there still.

    Raises:
        SpecError: the optimizer's state cannot be divided.
    """
    tensors: dict[str, Tensor] = {}
    pieces = []
    for fragment in fragments(engine, names):
        step, state = optimizer_state(engine.basic_optimizer, fragment.flat)
        piece = Piece(fragment.name, fragment.start, fragment.numel, step, tuple(sorted(state)))
        pieces.append(piece)
        for kind, tensor in {_MASTER: fragment.flat, **state}.items():
            tensors[piece.tensor_name(kind)] = fragment.of(tensor).to("cpu", copy=True)
    manifest = Manifest(
        SCHEMA_VERSION,
        rank,
        dist.get_world_size(),
        engine.global_steps,
        engine.zero_optimization_stage(),
        _shapes(names),
        tuple(pieces),
    )

    def write(folder: Path) -> None:
        target = folder / _file_name(rank)
        partial = folder / f".{target.name}"
        with saving(folder):
            try:
                save_file(tensors, partial, metadata={_MANIFEST: json.dumps(asdict(manifest))})
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    return write


def load_shards(engine: "deepspeed.DeepSpeedEngine", names: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Read the ranges that this rank holds, whatever number of ranks and stage wrote them; all ranks call it.

    Master weights, moments and step counts are those that were saved, bit for bit; the weights that the model
    computes with are made from the masters again.

    Args:
        engine: the engine that goes on.
        names: every parameter that the optimizer steps.
        folder: the files of all ranks that wrote.

    Raises:
        ModelError: a file is missing, damaged or of another checkpoint, or the checkpoint is of another model
            or method.
    """
    manifests = read_manifests(folder, _shapes(names))
    pieces: dict[str, list[tuple[int, Piece]]] = {name: [] for name in names}
    for manifest in manifests:
        for piece in manifest.pieces:
            pieces[piece.name].append((manifest.rank, piece))
    by_flat: dict[Tensor, list[Fragment]] = {}
    for fragment in fragments(engine, names):
        by_flat.setdefault(fragment.flat, []).append(fragment)
    files = _Files(folder)
    with torch.no_grad():
        for flat, inside in by_flat.items():
            sources = [piece for fragment in inside for _, piece in pieces[fragment.name]]
            state = _prepared_state(engine.basic_optimizer, flat, sources)
            for fragment in inside:
                files.copy(fragment, {_MASTER: flat, **state}, pieces[fragment.name])
    refresh(engine)
    engine.global_steps = manifests[0].updates


def read_manifests(folder: Path, shapes: Mapping[str, Sequence[int]]) -> list[Manifest]:
    """Headers of all files of a checkpoint, in the order of the ranks, once they are known to be whole.

    Args:
        folder: where the files are.
        shapes: of the parameters that are to be found there, by name.

    Raises:
        ModelError: see `load_shards`.
    """
    found = {file.name: _read_manifest(file) for file in sorted(folder.glob("rank-*.safetensors"))}
    if not found:
        raise ModelError(f"{folder}: no rank-*.safetensors: not a sharded checkpoint; --restart starts over")
    first_name, first = next(iter(found.items()))
    for name, manifest in found.items():
        if name != _file_name(manifest.rank) or _origin(manifest) != _origin(first):
            raise ModelError(
                f"{folder}: the checkpoint is mixed: {name} says {_said(manifest)}, "
                f"{first_name} {_said(first)}; {_REMEDY}"
            )
    for rank in range(first.world):
        if _file_name(rank) not in found:
            raise ModelError(
                f"{folder}: the checkpoint is incomplete: {_file_name(rank)} is missing, "
                f"{first.world} ranks wrote it; {_REMEDY}"
            )
    _check_shapes(folder, first.shapes, shapes)
    manifests = [found[_file_name(rank)] for rank in range(first.world)]
    _check_coverage(folder, manifests)
    return manifests


def _read_manifest(file: Path) -> Manifest:
    try:
        with safe_open(file, framework="pt") as opened:
            manifest = Manifest.from_header(opened.metadata())
            lengths = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: cut short, damaged or not ours ({error}); {_REMEDY}") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise ModelError(
            f"{file}: schema version {manifest.schema_version}, and this program reads {SCHEMA_VERSION}; "
            "--restart starts over"
        )
    promised = {p.tensor_name(kind): [p.numel] for p in manifest.pieces for kind in (_MASTER, *p.state)}
    if promised != lengths:
        odd = min(
            name for name in promised.keys() | lengths.keys() if promised.get(name) != lengths.get(name)
        )
        raise ModelError(f"{file}: damaged: {odd} is not what the header says; {_REMEDY}")
    return manifest


def _origin(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.world, manifest.updates, manifest.stage, manifest.shapes


def _said(manifest: Manifest) -> str:
    return (
        f"rank {manifest.rank} of {manifest.world}, step {manifest.updates}, ZeRO stage {manifest.stage}, "
        f"{len(manifest.shapes)} parameters"
    )


def _check_shapes(
    folder: Path, saved: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]
) -> None:
    there = {name: list(shape) for name, shape in saved.items()}
    here = {name: list(shape) for name, shape in wanted.items()}
    odd = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if odd:
        raise ModelError(
            f"{folder}: the checkpoint is of another model or method: {len(odd)} parameters differ, "
            f"the first {odd[0]}: {there.get(odd[0], 'absent')} there, {here.get(odd[0], 'absent')} here; "
            "--restart starts over"
        )


def _check_coverage(folder: Path, manifests: Sequence[Manifest]) -> None:
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in manifests[0].shapes}
    for manifest in manifests:
        for piece in manifest.pieces:
            if piece.name not in ranges:
                raise ModelError(
                    f"{folder / _file_name(manifest.rank)}: damaged: {piece.name} is no parameter; {_REMEDY}"
                )
            ranges[piece.name].append((piece.start, piece.end))
    for name, shape in manifests[0].shapes.items():
        wrong = misfit(ranges[name], torch.Size(shape).numel())
        if wrong:
            raise ModelError(f"{folder}: the checkpoint is incomplete: {name}: {wrong}; {_REMEDY}")


class _Files:
    """The files of a checkpoint, opened when a range of them is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[int, Any] = {}

    def copy(
        self, fragment: Fragment, tensors: Mapping[str, Tensor], pieces: Sequence[tuple[int, Piece]]
    ) -> None:
        """Fill the fragment's range of every tensor from the pieces, given with the ranks that wrote them."""
        ranges = [(piece.start, piece.end) for _, piece in pieces]
        for part in overlaps(ranges, fragment.start, fragment.start + fragment.numel):
            rank, piece = pieces[part.source]
            for kind, tensor in tensors.items():
                target = fragment.of(tensor).narrow(0, part.at, part.numel)
                if kind == _MASTER or kind in piece.state:
                    stored = self._file(rank).get_slice(piece.tensor_name(kind))
                    target.copy_(stored[part.first : part.first + part.numel])
                else:
                    target.zero_()  # A parameter that never had a gradient has no moments yet.

    def _file(self, rank: int) -> Any:
        if rank not in self._opened:
            self._opened[rank] = safe_open(self._folder / _file_name(rank), framework="pt")
        return self._opened[rank]


def _file_name(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _shapes(names: Mapping[str, nn.Parameter]) -> dict[str, list[int]]:
    return {name: whole_shape(parameter) for name, parameter in names.items()}


def _prepared_state(
    optimizer: torch.optim.Optimizer, flat: Tensor, pieces: Sequence[Piece]
) -> dict[str, Tensor]:
    """The tensors of the optimizer's state of `flat`, made where there are none, its step count set."""
    # All parameters are stepped together.
    step = max((piece.step for piece in pieces if piece.state), default=0)
    if not step and not optimizer.state.get(flat):
        return {}
    state = optimizer.state[flat]
    for kind in sorted({kind for piece in pieces for kind in piece.state}):
        if kind not in state:
            state[kind] = torch.zeros_like(flat, requires_grad=False)
    if isinstance(state.get("step"), Tensor):
        state["step"].fill_(step)
    elif isinstance(optimizer, torch.optim.Adam):
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        state["step"] = torch.tensor(float(step), device=flat.device if on_device else "cpu")
    else:
        state["step"] = step
    return optimizer_state(optimizer, flat)[1]
