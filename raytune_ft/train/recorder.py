"""What happens beside the loop: events for the driver, validation, checkpoints for Ray Train."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train

from raytune_ft.train.checkpoint import Position, write_checkpoint
from raytune_ft.train.engine import Engine
from raytune_ft.train.loop import StepReport, source_losses
from raytune_ft.train.peers import Peers
from raytune_ft.train.progress import EventWriter

_EVENT_INTERVAL_S = 0.2


class Recorder:
    """Turns the reports of steps into events for the driver and checkpoints for Ray Train.

    Every worker has one and keeps the position; the first worker's alone validates, and writes.
    """

    def __init__(
        self,
        engine: Engine,
        position: Position,
        total_steps: int,
        every_steps: int,
        events: EventWriter,
        validate: Callable[[], float | None],
        peers: Peers,
        data: Callable[[], dict[str, Any]],
    ) -> None:
        """Go on from `position`.

        Args:
            engine: what is trained.
            position: where the run stands.
            total_steps: steps of the run; an estimate where the examples are not counted.
            every_steps: steps from checkpoint to checkpoint.
            events: to the driver.
            validate: mean loss of the validation split, None without one.
            peers: the workers of the run.
            data: what a checkpoint has to keep of the data; see `Position.data`.
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
        self._since_due: list[StepReport] = []
        """Reports of the steps since the last checkpoint. A run goes on from one, where this is empty."""
        self._unsent: list[dict[str, Any]] = []
        self._sent_at = 0.0

    def __call__(self, report: StepReport) -> None:
        """Record one step; every so often, and after the last, keep a checkpoint."""
        entry = report.to_json()
        self._since_due.append(report)
        self._history.append(entry)
        self._unsent.append(entry)
        last = report.step == self._total_steps
        if last or report.step % self._every_steps == 0:
            self._keep()
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
            self._keep()
        if self._unsent:
            self._send()
        return self._here()

    def _here(self) -> Position:
        return replace(self._position, step=len(self._history), history=self._history, data=self._data())

    def _keep(self) -> None:
        """Complete the newest entry and keep a checkpoint. Ray waits until all workers have reported."""
        self._history[-1]["source_losses"] = source_losses(self._since_due)
        self._since_due = []
        metrics = {"step": len(self._history)}
        if self._peers.rank:
            ray.train.report(metrics)
            return
        if (loss := self._validate()) is not None:
            self._history[-1]["validation_loss"] = loss
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(Path(name), self._engine, self._here())
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(name))

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
