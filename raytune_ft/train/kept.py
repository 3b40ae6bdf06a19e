"""Checkpoints of a fleet's job in its run's folder, beside those that Ray Train keeps of a job by itself.

    kept/<step>-<token>/<file>      what the engine wrote, and the position
    kept/<step>-<token>.json        names all files with their sizes; written last

A checkpoint without its list is none, nor is one of which a file is not as the list says: so a lane that was
taken for lost, and writes on, can do no harm to the one that took its place.
"""

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from raytune_ft.errors import SpecError, StorageDenied, StorageMissing
from raytune_ft.spec.selection import VALIDATION_LOSS
from raytune_ft.storage import Storage
from raytune_ft.train.run import Run
from raytune_ft.train.selection import higher_is_better, kept_text
from raytune_ft.train.uploads import send_folder

PREFIX = "kept/"
_SUFFIX = ".json"


@dataclass(frozen=True)
class KeptCheckpoint:
    """A complete checkpoint, as its list describes it."""

    # What is read back, from a bucket that others may write to, is as strict as a job file.
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[0-9]{10}-[0-9a-f]{8}$")]
    """Sorts by step."""
    step: int
    validation_loss: float | None
    size_bytes: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], int]
    """Of each file."""
    scores: dict[str, float] = field(default_factory=dict)
    """Of the validation split, where the checkpoints that stay are chosen by one."""

    def value(self, metric: str) -> float | None:
        """What was measured, by its name; None where it was not."""
        return self.validation_loss if metric == VALIDATION_LOSS else self.scores.get(metric)


_LIST = TypeAdapter(KeptCheckpoint)


def superfluous(kept: Sequence[KeptCheckpoint], keep: int, best_by: str | None) -> list[KeptCheckpoint]:
    """Which checkpoints need not stay: those beyond `keep`, the newest always being one of those that stay.

    Args:
        kept: in any order.
        keep: how many stay.
        best_by: the metric by which the best stay, of equals the earlier; None: the newest stay.
    """
    newest_first = sorted(kept, key=lambda one: one.name, reverse=True)
    if best_by is None:
        return newest_first[keep:]
    sign = -1.0 if higher_is_better(best_by) else 1.0

    def place(one: KeptCheckpoint) -> tuple[float, str]:
        value = one.value(best_by)
        return math.inf if value is None else sign * value, one.name

    best = sorted(newest_first, key=place)[:keep]
    return [one for one in newest_first[1:] if one not in best]


class JobCheckpoints:
    """The checkpoints of a job."""

    def __init__(self, storage: Storage, *, keep: int, best_by: str | None = None) -> None:
        """Nothing is read yet.

        Args:
            storage: the run's folder.
            keep: how many stay.
            best_by: see `superfluous`.
        """
        self._storage = storage
        self._keep = keep
        self._best_by = best_by
        self._restored: KeptCheckpoint | None = None
        self._useless: set[str] = set()

    def restore(self, folder: Path) -> int | None:
        """Fetch the newest one into an empty folder, and remove what was never complete.

        Returns:
            Its step; None where there is none.

        Raises:
            StorageError: the store failed.
        """
        kept, others = self._listed()
        for one in sorted(kept, key=lambda one: one.name, reverse=True):
            if one.name not in self._useless and self._fetch(one, folder):
                self._delete(others)
                self._restored = one
                return one.step
        self._delete(others)
        return None

    def restore_older(self, folder: Path) -> int | None:
        """Remove the one that was restored, from which nobody can go on, and fetch the next one.

        Args:
            folder: where it was restored to.

        Returns:
            The step of the next; None where there is none.

        Raises:
            StorageError: the store failed.
        """
        for file in folder.iterdir():
            file.unlink()
        if self._restored is not None:
            # It may not be allowed to be removed.
            self._useless.add(self._restored.name)
            self._remove(self._restored)
        return self.restore(folder)

    def steps(self) -> dict[int, str]:
        """Where the complete ones stand in the run's folder, by step.

        Raises:
            StorageError: the store failed.
        """
        return {one.step: f"{PREFIX}{one.name}" for one in self._listed()[0]}

    def fetch(self, step: int, folder: Path) -> None:
        """Fetch the one of a step into an empty folder.

        Raises:
            StorageMissing: there is none.
            StorageError: the store failed.
        """
        if not any(self._fetch(one, folder) for one in self._listed()[0] if one.step == step):
            raise StorageMissing(f"{self._storage.uri}: the checkpoint of step {step} is not there")

    def add(
        self, folder: Path, step: int, measured: Mapping[str, float], *, may_write: Callable[[], None]
    ) -> int:
        """Keep the files of a folder, then remove what need not stay; the bytes that were written.

        Args:
            folder: of this machine; flat.
            step: steps done.
            measured: of the validation split, by name.
            may_write: asked before each file; raises where somebody else has taken over.

        Raises:
            StorageError: the store failed for too long; the former checkpoint stays.
        """
        name = f"{step:010d}-{uuid.uuid4().hex[:8]}"
        size_bytes = send_folder(self._storage, folder, f"{PREFIX}{name}", may_write=may_write)
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        scores = {metric: value for metric, value in measured.items() if metric != VALIDATION_LOSS}
        one = KeptCheckpoint(name, step, measured.get(VALIDATION_LOSS), sizes, scores)
        self._storage.write(f"{PREFIX}{name}{_SUFFIX}", _LIST.dump_json(one))
        kept, _ = self._listed()
        for old in superfluous(kept, self._keep, self._best_by):
            self._remove(old)
        return size_bytes

    def _listed(self) -> tuple[list[KeptCheckpoint], list[str]]:
        """Complete checkpoints, and the keys that belong to none."""
        keys = [found.key for found in self._storage.list(PREFIX)]
        there = set(keys)
        # One that another lane was about to remove may have been listed after that.
        kept = [
            one
            for key in keys
            if key.endswith(_SUFFIX)
            and (one := self._read(key)) is not None
            and all(f"{PREFIX}{one.name}/{file}" in there for file in one.size_bytes)
        ]
        own = {f"{PREFIX}{one.name}" for one in kept}
        others = [
            key for key in keys if key.removesuffix(_SUFFIX) not in own and key.rpartition("/")[0] not in own
        ]
        return kept, others

    def _read(self, key: str) -> KeptCheckpoint | None:
        if key.count("/") != 1:
            return None
        content = self._storage.read_or_none(key)
        with suppress(ValidationError):
            return None if content is None else _LIST.validate_json(content)
        return None

    def _fetch(self, one: KeptCheckpoint, folder: Path) -> bool:
        """Whether all of its files could be had."""
        try:
            for name, size_bytes in one.size_bytes.items():
                self._storage.download(f"{PREFIX}{one.name}/{name}", folder / name)
                if (folder / name).stat().st_size != size_bytes:
                    raise StorageMissing(f"{name}: cut off")
        except StorageMissing:
            for file in folder.iterdir():
                file.unlink()
            return False
        return True

    def _remove(self, one: KeptCheckpoint) -> None:
        # The list first: what is left by a kill here is no checkpoint.
        files = [f"{PREFIX}{one.name}/{file}" for file in one.size_bytes]
        self._delete([f"{PREFIX}{one.name}{_SUFFIX}", *files])

    def _delete(self, keys: Sequence[str]) -> None:
        with suppress(StorageDenied):
            for key in keys:
                self._storage.delete(key)


def place_of(run: Run, step: int) -> str:
    """Where the kept checkpoint of a step stands in the run's folder, whoever kept it.

    Raises:
        SpecError: none of that step is kept.
        StorageError: the store failed.
    """
    kept = {**JobCheckpoints(run.storage, keep=1).steps(), **run.kept_steps()}
    if step not in kept:
        remedy = "name one of them" if kept else "train the job first"
        raise SpecError(
            f"--publish-step {step}: {run.storage.uri} keeps no checkpoint of that step; {kept_text(kept)}; "
            f"{remedy}, with the model, data, method, optimizer, schedule and batch of the run"
        )
    return kept[step]
