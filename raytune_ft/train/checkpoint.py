"""A training checkpoint: the engine's files and where in the run they stand."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raytune_ft.errors import DataError, ModelError
from raytune_ft.planner import Choice, MemoryPlan, usable_bytes
from raytune_ft.spec import JobSpec
from raytune_ft.train.engine import Snapshot

_POSITION_FILE = "position.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Position:
    """Where training stopped, and on what."""

    step: int
    """Optimizer steps done."""
    data_fingerprint: str
    base_digest: str
    choice: Choice
    """What `auto` became: a resumed run computes in the same order, even on another machine."""
    threads: int
    """CPU threads: sums are divided among them, so that their number is part of the result's last bits."""
    workers: int
    """How many trained; the same number goes on with the same bits."""
    chosen_for: dict[str, Any] = field(default_factory=dict)
    """What the job itself said of its memory when `choice` was made; see `memory_settings`."""
    data: dict[str, Any] = field(default_factory=dict)
    """What is known of the windows that were read; see `raytune_ft.data.ledger`."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A report of every step so far: the loss curve survives a kill."""
    tokenizer_digest: str | None = None
    """Of the base's tokenizer, for the record; None where an earlier version wrote the checkpoint."""
    before: dict[str, Any] | None = None
    """How the bare base was evaluated, its scores and answers: kept while the job asks the same."""
    schema_version: int = SCHEMA_VERSION


def memory_settings(job: JobSpec) -> dict[str, Any]:
    """What `Position.choice` depends on in a job, and may change between two starts of a run."""
    return {
        "resident": job.model.resident,
        "gradient_checkpointing": job.model.gradient_checkpointing,
        "sequences_per_worker": job.batch.sequences_per_worker,
        "zero_stage": job.cluster.zero_stage,
        "offload": job.cluster.offload,
    }


def choice_holds(position: Position, job: JobSpec, *, workers: int, device_bytes: int) -> bool:
    """Whether a run goes on as its checkpoint chose, with the same bits.

    Args:
        position: the checkpoint's.
        job: as it is now.
        workers: that there are now.
        device_bytes: memory of a worker's device; the smallest of them.
    """
    same = (position.workers, position.chosen_for) == (workers, memory_settings(job))
    return same and position.choice.memory.total <= usable_bytes(device_bytes)


def with_position(snapshot: Snapshot, position: Position) -> Snapshot:
    """Writes the position, as it is now, beside the engine's files."""
    text = json.dumps(asdict(position))

    def write(folder: Path) -> None:
        snapshot(folder)
        (folder / _POSITION_FILE).write_text(text)

    return write


def read_position(folder: Path, *, data_fingerprint: str, base_digest: str) -> Position:
    """The position that stands beside the engine's files.

    Raises:
        DataError: the checkpoint was trained on other data.
        ModelError: it is of another base, or written by another version.
    """
    kept = json.loads((folder / _POSITION_FILE).read_text())
    if kept.get("schema_version") != SCHEMA_VERSION:
        raise ModelError(
            f"the checkpoint has schema version {kept.get('schema_version')}, and this program reads "
            f"{SCHEMA_VERSION}; --restart starts over"
        )
    choice = kept.pop("choice")
    position = Position(choice=Choice(**{**choice, "memory": MemoryPlan(**choice["memory"])}), **kept)
    if position.data_fingerprint != data_fingerprint:
        raise DataError("the data changed since the checkpoint was written; --restart starts over")
    if position.base_digest != base_digest:
        raise ModelError("the base model changed since the checkpoint was written; --restart starts over")
    return position
