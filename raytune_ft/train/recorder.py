"""What happens beside the loop: events for whoever watches, validation, checkpoints."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from raytune_ft.catalog.record import selection_texts
from raytune_ft.spec import EarlyStoppingSpec
from raytune_ft.spec.selection import VALIDATION_LOSS
from raytune_ft.train.batch import Step
from raytune_ft.train.checkpoint import Position, with_position
from raytune_ft.train.engine import Engine, Snapshot
from raytune_ft.train.loop import StepReport, source_losses
from raytune_ft.train.peers import Peers
from raytune_ft.train.preemption import Notices
from raytune_ft.train.progress import Event
from raytune_ft.train.selection import (
    SCORES,
    EarlyStop,
    best_of,
    decided_by,
    ranking_value,
    stopped_early,
    value_of,
)
from raytune_ft.train.uploads import Upload

_EVENT_INTERVAL_S = 0.2


class Events(Protocol):
    """Where events go."""

    def write(self, event: Event) -> None:
        """Append one event."""
        ...


class Keeping(Protocol):
    """Where checkpoints go."""

    def send(
        self, take: Callable[[], Snapshot | None], metrics: dict[str, Any], *, wait: bool, needed: bool
    ) -> None:
        """Keep the snapshot that `take` makes.

        Args:
            take: makes it; None where this worker has no part of it.
            metrics: `step`, and what the checkpoints that stay are chosen by.
            wait: the run cannot go on before it is kept.
            needed: it must not be left out, because it is the best so far and may be published.
        """
        ...

    def kept(self) -> Collection[int]:
        """Steps of the checkpoints that are kept, once all that were sent are."""
        ...

    def fetch(self, step: int) -> AbstractContextManager[Path]:
        """Within, a folder with the files of a kept checkpoint.

        Raises:
            StorageError: it is not there, or cannot be had.
        """
        ...

    def finished(self) -> Sequence[Upload]:
        """What was kept since the last call."""
        ...


class Warnings(Protocol):
    """Whether the node of a run is about to go."""

    def new(self, step: int) -> bool:
        """Whether a notice came that was not there before; asked after each step."""
        ...


class Recorder:
    """Turns the reports of steps into events and checkpoints.

    Every worker has one and keeps the position; the first worker's alone tells the driver.
    """

    def __init__(
        self,
        engine: Engine,
        position: Position,
        total_steps: int,
        every_steps: int,
        events: Events,
        validate: Callable[[], Mapping[str, float]],
        peers: Peers,
        data: Callable[[], dict[str, Any]],
        uploads: Keeping,
        warnings: Warnings | None = None,
        *,
        best_by: str | None = None,
        stopping: EarlyStoppingSpec | None = None,
    ) -> None:
        """Go on from `position`.

        Args:
            engine: what is trained.
            position: where the run stands.
            total_steps: steps of the run; an estimate where the examples are not counted.
            every_steps: steps from checkpoint to checkpoint.
            events: to the driver.
            validate: measures the validation split, by name; empty without one, or where others measure it.
            peers: the workers of the run.
            data: what a checkpoint has to keep of the data; see `Position.data`.
            uploads: where checkpoints go.
            warnings: of the loss of a node; None: Ray Train is asked.
            best_by: what the best checkpoint is chosen by; None: the last one is published.
            stopping: when training stops early; None: never.
        """
        self._position = position
        self._history = list(position.history)
        self._engine = engine
        self._total_steps = total_steps
        self._every_steps = every_steps
        self._events = events
        self._validate = validate
        self._peers = peers
        self._data = data
        self._uploads = uploads
        self._warnings = warnings or Notices(peers, position.step)
        self._best_by = best_by
        self._stopping = stopping
        self._decided_by = decided_by(best_by, stopping)
        self.stopped: EarlyStop | None = stopped_early(self._history, stopping)
        """Where training stopped early, once it has."""
        self._since_due: list[StepReport] = []
        """Reports of the steps since the last checkpoint. A run goes on from one, where this is empty."""
        self._unsent: list[dict[str, Any]] = []
        self._sent_at = 0.0

    def __call__(self, report: StepReport) -> None:
        """Record one step; every so often, after the last and before a node goes, keep a checkpoint."""
        entry = report.to_json()
        self._since_due.append(report)
        self._history.append(entry)
        self._unsent.append(entry)
        last = report.step == self._total_steps
        # All workers ask at the same step, also where a checkpoint is due.
        noticed = self._warnings.new(report.step)
        if noticed and not last:
            self._keep_before_loss()
        elif self._is_due(report.step):
            self._keep(wait=last)
        if last or time.monotonic() - self._sent_at > _EVENT_INTERVAL_S:
            self._send()

    def until_stopped(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The steps, for as long as training does not stop early; all workers come to the same end.

        What has to be measured before the next step changes the weights is measured here: a checkpoint that
        was kept in a hurry was not, and the result must not depend on whether a node was about to go.
        """
        source = iter(steps)
        while True:
            if self._history and self._is_due(len(self._history)):
                self._measure_newest()
            if self.stopped is not None or (step := next(source, None)) is None:
                return
            yield step

    def finish(self) -> Position:
        """Keep a checkpoint of the last step, if that is still to be done; where the run stands then.

        Only the end of the data shows which step is the last where their number was estimated.
        """
        if self._since_due:
            self._keep_newest()
        elif self._history:
            self._measure_newest()
        if self._unsent:
            self._send()
        return self._here()

    def _is_due(self, step: int) -> bool:
        return step == self._total_steps or step % self._every_steps == 0

    def _measure_newest(self) -> None:
        """Measure the newest step if the run depends on that and it was not done; keep a checkpoint of it."""
        if any(value_of(self._history[-1], name) is None for name in self._decided_by):
            self._keep_newest()

    def _keep_newest(self) -> None:
        newest = self._history[-1]
        # It may have been sent before it was complete.
        self._unsent = [*(entry for entry in self._unsent if entry is not newest), newest]
        self._keep(wait=True)

    def _here(self) -> Position:
        return replace(self._position, step=len(self._history), history=self._history, data=self._data())

    def _keep_before_loss(self) -> None:
        """Keep a checkpoint at once, for a node of the run goes away soon; validating would take time."""
        if self._peers.rank == 0:
            step = len(self._history)
            self._events.write({"phase": f"A node will be taken away: keeping a checkpoint of step {step}"})
        self._keep(wait=True, validated=False)

    def _keep(self, *, wait: bool, validated: bool = True) -> None:
        """Complete the newest entry and keep a checkpoint. All workers do so at the same step."""
        newest = self._history[-1]
        if self._since_due:
            newest["source_losses"] = source_losses(self._since_due)
        self._since_due = []
        if validated:
            self._measure(newest)
        here = self._here()

        def take() -> Snapshot | None:
            snapshot = self._engine.snapshot()
            return with_position(snapshot, here) if snapshot and self._peers.rank == 0 else snapshot

        metrics: dict[str, Any] = {name: newest[name] for name in ("step", VALIDATION_LOSS) if name in newest}
        if self._best_by is not None:
            metrics[self._best_by] = ranking_value(self._history, self._best_by)
        began = time.monotonic()
        stops = self.stopped is not None
        self._uploads.send(take, metrics, wait=wait or stops, needed=self._newest_is_best())
        newest["checkpoint_seconds"] = time.monotonic() - began
        for upload in self._uploads.finished():
            self._history[upload.step - 1]["upload_seconds"] = upload.seconds

    def _measure(self, newest: dict[str, Any]) -> None:
        """Measure the validation split; what decides about the run is the same on all workers."""
        measured = dict(self._validate())
        if self._decided_by:
            first = self._peers.rank == 0
            mine = [measured[name] if first else 0.0 for name in self._decided_by]
            measured |= zip(self._decided_by, self._peers.sum(mine), strict=True)
        if (loss := measured.pop(VALIDATION_LOSS, None)) is not None:
            newest[VALIDATION_LOSS] = loss
        if measured:
            newest[SCORES] = measured
        self.stopped = stopped_early(self._history, self._stopping)
        if self.stopped is not None and newest["step"] < self._total_steps and self._peers.rank == 0:
            texts = selection_texts({"stopped_early": asdict(self.stopped)})
            self._events.write({"phase": f"Stopping early {texts['Stopped early']}"})

    def _newest_is_best(self) -> bool:
        if self._best_by is None:
            return False
        best = best_of(self._history, self._best_by)
        return best is not None and best.step == len(self._history)

    def _send(self) -> None:
        if self._peers.rank == 0:
            memory = self._engine.peak_memory_bytes()
            event = {
                "phase": "train",
                "steps": self._total_steps,
                "memory_bytes": memory,
                "history": self._unsent,
            }
            self._events.write(event)
        self._unsent = []
        self._sent_at = time.monotonic()
