"""A run's identity and its folder in the bucket: what makes the same command go on where it stopped."""

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from raytune_ft.errors import DataError, ModelError, StorageError
from raytune_ft.spec import JobSpec
from raytune_ft.spec.selection import VALIDATION_LOSS
from raytune_ft.storage import Storage, disk_errors, open_storage
from raytune_ft.train.lease import LEASE

_TRAINING_SECTIONS = ("model", "data", "method", "optimizer", "schedule", "batch")
_HOW_IT_FITS = {"model": ("resident", "gradient_checkpointing"), "batch": ("sequences_per_worker",)}
"""Fields that make a run fit its device: one that did not must be able to go on with others."""
_HOW_LONG_IT_LASTS = {"cluster": ("max_restarts", "max_preemptions"), "checkpoint": ("every_steps", "keep")}
"""Fields that are no part of what a job asks for: done stays done with others."""
_LATER: dict[str, dict[str, Any]] = {
    "schedule": {"early_stopping": None},
    "checkpoint": {"best_by": VALIDATION_LOSS},
    "data": {"turns": "all", "thoughts": "keep", "max_too_long_fraction": 0.9},
}
_LATER_OF_SOURCES: dict[str, Any] = {"ignore": [], "on_lost": "refuse"}
"""Fields that older jobs do not have, with what those said by it: where they say so, they do not count."""
_STATE_FILE = "run.json"
_RESULT_FILE = "result.json"
_CHECKPOINTS = "checkpoint_"
_LOOK_EVERY = 16
"""Deletions, which take a moment each."""
_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Written by Ray Train. What it does not name is no checkpoint."""


def digest(value: Any) -> str:
    """sha256 of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def asked_of(job: JobSpec) -> str:
    """Names what a job asks for: jobs that have it equal, on equal inputs, have one result."""
    asked = _as_older(job.resolved())
    for section, fields in _HOW_LONG_IT_LASTS.items():
        asked[section] = {name: v for name, v in asked[section].items() if name not in fields}
    if not job.checkpoint.keep_best:
        del asked["checkpoint"]["keep_best"]
    return digest(asked)


def _as_older(resolved: dict[str, Any]) -> dict[str, Any]:
    """A resolved job as it was before `_LATER`: what was done under its name then keeps it."""
    found = {**resolved, **{section: _without(resolved[section], _LATER[section]) for section in _LATER}}
    found["data"]["sources"] = [_without(source, _LATER_OF_SOURCES) for source in found["data"]["sources"]]
    forgetting = found["evaluate"]["forgetting"]
    if forgetting is not None:
        sources = [_without(source, _LATER_OF_SOURCES) for source in forgetting["sources"]]
        found["evaluate"] = {**found["evaluate"], "forgetting": {**forgetting, "sources": sources}}
    return found


def _without(section: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A section without the fields that have these values."""
    return {name: v for name, v in section.items() if name not in values or v != values[name]}


def name_inputs(data_fingerprint: str, base: str, others_fingerprint: str | None) -> str:
    """Names what a job reads: its data, its base, and the examples of `evaluate.forgetting` if it has any."""
    others = [] if others_fingerprint is None else [others_fingerprint]
    return digest([data_fingerprint, base, *others])


@dataclass(frozen=True)
class RunState:
    """What a run that goes on must share with its start."""

    schema_version: int
    attempt: str
    """Names this attempt: `--restart` begins another, whose result is another version."""
    data_fingerprint: str
    base_identity: str

    def publish_id(self, job: JobSpec) -> str:
        """The same for every retry of this attempt with this job, so that it is published once."""
        return f"{self.attempt}-{asked_of(job)[:12]}"


class Run:
    """The folder `<catalog>/runs/<job>/<id>`; the id covers what changes the result by more than rounding."""

    def __init__(self, job: JobSpec) -> None:
        resolved = _as_older(job.resolved())
        covered = {section: resolved[section] for section in _TRAINING_SECTIONS}
        for section, names in _HOW_IT_FITS.items():
            covered[section] = {name: v for name, v in covered[section].items() if name not in names}
        self.job = job
        self.id = digest(covered)[:16]
        self.parent_uri = f"{job.publish.catalog.rstrip('/')}/runs/{job.name}"
        self.storage: Storage = open_storage(f"{self.parent_uri}/{self.id}")

    def clear(self) -> None:
        """Forget all that the run left: result, state, then checkpoints. The lease stays.

        Interrupted anywhere it is still forgotten: `begin` clears what stands there without a state.
        """
        self.storage.delete(_RESULT_FILE)
        self.storage.delete(_STATE_FILE)
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        for at, found in enumerate(list(self.storage.list())):
            # Who was away meanwhile, and comes late, must not touch what another has begun.
            if at % _LOOK_EVERY == 0 and self.storage.info(_STATE_FILE) is not None:
                return
            # The state may be that of somebody who began in this moment.
            if found.key != _STATE_FILE and not found.key.startswith(LEASE):
                self.storage.delete(found.key)

    def _clear_cut_off_checkpoints(self) -> None:
        """Remove what a kill left of checkpoints that were never complete.

        Raises:
            StorageError: the list of those that are complete is damaged; nothing is removed.
        """
        complete = self._complete_checkpoints()
        for found in list(self.storage.list(_CHECKPOINTS)):
            if found.key != _CHECKPOINT_LIST and found.key.partition("/")[0] not in complete:
                self.storage.delete(found.key)

    def kept_steps(self) -> dict[int, str]:
        """Where the complete checkpoints of Ray Train stand in the run's folder, by step.

        Raises:
            StorageError: the list of them is damaged, or the store failed.
        """
        found = self._complete_checkpoints()
        return {step: name for name, step in found.items() if isinstance(step, int)}

    def fetch(self, place: str, folder: Path) -> None:
        """Copy the files of a checkpoint into a folder.

        Args:
            place: where it stands in the run's folder.
            folder: exists.

        Raises:
            StorageError: the store failed.
        """
        for found in list(self.storage.list(f"{place}/")):
            file = folder / found.key.removeprefix(f"{place}/")
            with disk_errors(str(folder)):
                file.parent.mkdir(parents=True, exist_ok=True)
            self.storage.download(found.key, file)

    def _complete_checkpoints(self) -> dict[str, Any]:
        """The folders that Ray Train lists, with their steps."""
        text = self.storage.read_or_none(_CHECKPOINT_LIST)
        if text is None:
            return {}
        try:
            kept = json.loads(text)
            listed = [*kept["checkpoint_results"], kept.get("latest_checkpoint_result")]
            return {
                result["checkpoint_dir_name"]: result.get("metrics", {}).get("step")
                for result in listed
                if result
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise StorageError(
                f"{self.storage.uri}/{_CHECKPOINT_LIST}: cut off, or not Ray Train's list of checkpoints "
                f"({len(text)} bytes); nothing was removed; put the file back, or start over with --restart"
            ) from None

    def finished(self, inputs: str) -> dict[str, Any] | None:
        """The result, where this very job has been done on these very inputs.

        Args:
            inputs: fingerprint of the data's objects and the base.

        Raises:
            StorageError: the store failed, or what stands there is no result.
        """
        text = self.storage.read_or_none(_RESULT_FILE)
        if text is None:
            return None
        try:
            kept = json.loads(text)
            result: dict[str, Any] = kept["result"]
            # Older results name all of the job.
            same = kept["job"] in (asked_of(self.job), digest(_as_older(self.job.resolved())))
            return result if same and kept["inputs"] == inputs else None
        except (ValueError, KeyError, TypeError):
            raise StorageError(
                f"{self.storage.uri}/{_RESULT_FILE}: not the result of a run; remove it, and run again"
            ) from None

    def finish(self, result: dict[str, Any], inputs: str) -> None:
        """Remember the result, so that the same command need not train again."""
        kept = {"job": asked_of(self.job), "inputs": inputs, "result": result}
        self.storage.write(_RESULT_FILE, json.dumps(kept).encode())

    def begin(self, data_fingerprint: str, base_identity: str, *, anew: bool = False) -> RunState:
        """The state of the run that is under way, or of a new one. Who calls it holds the lease.

        A finished run on other inputs is no obstacle: a new one begins.

        Args:
            data_fingerprint: of the data as it is.
            base_identity: of the base as it is.
            anew: if the run that is under way is on other inputs, forget it.

        Raises:
            DataError: the data changed under a run that is not finished.
            ModelError: the base did.
            StorageError: Ray Train's list of checkpoints is damaged, or the store failed.
        """
        kept = self.storage.read_or_none(_STATE_FILE)
        if kept is not None:
            state = RunState(**json.loads(kept))
            if (state.data_fingerprint, state.base_identity) == (data_fingerprint, base_identity):
                self._clear_cut_off_checkpoints()
                return state
            if not anew and self.storage.info(_RESULT_FILE) is None:
                self._refuse(state, data_fingerprint, base_identity)
            self.clear()
        else:
            self._clear_leftovers()
        state = RunState(1, uuid.uuid4().hex[:16], data_fingerprint, base_identity)
        if self.storage.write_once(_STATE_FILE, json.dumps(asdict(state)).encode()):
            return state
        # Somebody else began at the same moment: theirs is the attempt that both publish, once.
        return RunState(**json.loads(self.storage.read(_STATE_FILE)))

    def go_back(self, data_fingerprint: str, base_identity: str) -> RunState:
        """The state of a run that has begun, to publish what it keeps; nothing of it changes.

        Raises:
            DataError: the data changed since.
            ModelError: the base did.
            StorageError: the run has no state, or the store failed.
        """
        state = RunState(**json.loads(self.storage.read(_STATE_FILE)))
        if (state.data_fingerprint, state.base_identity) != (data_fingerprint, base_identity):
            self._refuse(state, data_fingerprint, base_identity)
        return state

    def _refuse(self, state: RunState, data_fingerprint: str, base_identity: str) -> NoReturn:
        if state.data_fingerprint != data_fingerprint:
            raise DataError(
                f"{self.job.name}: the data changed since this run began "
                f"(fingerprint {state.data_fingerprint[:12]} then, {data_fingerprint[:12]} now); "
                "put the old data back, or start over with --restart"
            )
        raise ModelError(
            f"{self.job.name}: {self.job.model.path} changed since this run began "
            f"({state.base_identity[:12]} then, {base_identity[:12]} now); "
            "put the old base back, or start over with --restart"
        )
