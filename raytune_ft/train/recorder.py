"""What happens beside the loop: events for the driver, validation, checkpoints for Ray Train."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray.train

from raytune_ft.train.checkpoint import Position, write_checkpoint
from raytune_ft.train.engine import Engine
from raytune_ft.train.loop import StepReport
from raytune_ft.train.progress import EventWriter

_EVENT_INTERVAL_S = 0.2


class Recorder:
    """Turns the reports of steps into events for the driver and checkpoints for Ray Train."""

    def __init__(
        self,
        engine: Engine,
        position: Position,
        total_steps: int,
        every_steps: int,
        events: EventWriter,
        validate: Callable[[], float | None],
    ) -> None:
        self._position = position
        self._history = list(position.history)
        self._engine = engine
        self._total_steps = total_steps
        self._every_steps = every_steps
        self._events = events
        self._validate = validate
        self._unsent: list[dict[str, Any]] = []
        self._sent_at = 0.0

    def __call__(self, report: StepReport) -> None:
        """Record one step; every so often, and after the last, keep a checkpoint."""
        last = report.step == self._total_steps
        due = last or report.step % self._every_steps == 0
        entry: dict[str, Any] = asdict(report)
        if due and (loss := self._validate()) is not None:
            entry["validation_loss"] = loss
        self._unsent.append(entry)
        self._history.append(entry)
        if due:
            self._checkpoint()
        if last or time.monotonic() - self._sent_at > _EVENT_INTERVAL_S:
            self._send()

    @property
    def position(self) -> Position:
        """Where the run stands now."""
        return replace(self._position, step=len(self._history), history=self._history)

    def _send(self) -> None:
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

    def _checkpoint(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(Path(name), self._engine, self.position)
            ray.train.report(
                {"step": len(self._history)}, checkpoint=ray.train.Checkpoint.from_directory(name)
            )
