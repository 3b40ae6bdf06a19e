"""What happens beside the loop: events for whoever watches, validation, checkpoints."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from raytune_ft.train.checkpoint import Position, with_position
from raytune_ft.train.engine import Engine, Snapshot
from raytune_ft.train.loop import StepReport, source_losses
from raytune_ft.train.peers import Peers
from raytune_ft.train.preemption import Notices
from raytune_ft.train.progress import Event
from raytune_ft.train.uploads import Upload

_EVENT_INTERVAL_S = 0.2


class Events(Protocol):
    """Where events go."""

    def write(self, event: Event) -> None:
        """Append one event."""
        ...


class Keeping(Protocol):
    """Where checkpoints go."""

    def send(self, take: Callable[[], Snapshot | None], metrics: dict[str, Any], *, wait: bool) -> None:
        """Keep the snapshot that `take` makes; `wait`: something depends on that it is kept."""
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
        validate: Callable[[], float | None],
        peers: Peers,
        data: Callable[[], dict[str, Any]],
        uploads: Keeping,
        warnings: Warnings | None = None,
    ) -> None:
        """Go on from `position`.

        Args:
            engine: what is trained.
            position: where the run stands.
            total_steps: steps of the run; an estimate where the examples are not counted.
            every_steps: steps from checkpoint to checkpoint.
            events: to the driver.
            validate: mean loss of the validation split, None without one, or where others measure it.
            peers: the workers of the run.
            data: what a checkpoint has to keep of the data; see `Position.data`.
            uploads: where checkpoints go.
            warnings: of the loss of a node; None: Ray Train is asked.
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
        elif last or report.step % self._every_steps == 0:
            self._keep(wait=last)
        if last or time.monotonic() - self._sent_at > _EVENT_INTERVAL_S:
            self._send()

    def finish(self) -> Position:
        """Keep a checkpoint of the last step, if that is still to be done; where the run stands then.

        Only the end of the data shows which step is the last where their number was estimated.
        """
        if self._since_due:
            newest = self._history[-1]
            # It may have been sent before it was known to be the last.
            self._unsent = [*(entry for entry in self._unsent if entry is not newest), newest]
            self._keep(wait=True)
        if self._unsent:
            self._send()
        return self._here()

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
        newest["source_losses"] = source_losses(self._since_due)
        self._since_due = []
        if validated and (loss := self._validate()) is not None:
            newest["validation_loss"] = loss
        here = self._here()

        def take() -> Snapshot | None:
            snapshot = self._engine.snapshot()
            return with_position(snapshot, here) if snapshot and self._peers.rank == 0 else snapshot

        metrics: dict[str, Any] = {
            name: newest[name] for name in ("step", "validation_loss") if name in newest
        }
        began = time.monotonic()
        self._uploads.send(take, metrics, wait=wait)
        newest["checkpoint_seconds"] = time.monotonic() - began
        for upload in self._uploads.finished():
            self._history[upload.step - 1]["upload_seconds"] = upload.seconds

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
