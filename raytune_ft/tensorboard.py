"""Scalars for TensorBoard, through its own event writer: this needs neither torch nor TensorFlow."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

_FLUSH_EVERY_S = 10


class ScalarLog:
    """Appends scalars to an event file of its own in a folder, which is made where it is missing.

    TensorBoard reads all event files of a folder as one run: so a run that goes on continues its curves.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder), flush_secs=_FLUSH_EVERY_S)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of one step, such as `{"train/loss": 0.41}`."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Write what is still in memory, and close the file."""
        self._writer.close()


def step_scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of one entry of a run's history.

    Losses of the sources, which are means since the entry before that has them, stand there only where there
    are several: a single source's is the run's.
    """
    scalars: dict[str, float] = {
        "train/loss": entry["loss"],
        "train/learning_rate": entry["learning_rate"],
        "train/grad_norm": entry["grad_norm"],
        "train/tokens_per_second": entry["tokens"] / entry["seconds"],
    }
    if "validation_loss" in entry:
        scalars["validation/loss"] = entry["validation_loss"]
    scores = entry.get("validation_scores", {})
    scalars |= {f"validation/{name}": value for name, value in scores.items()}
    losses = entry.get("source_losses", [])
    if len(losses) > 1:
        named = enumerate(losses)
        scalars |= {f"train/loss/source_{at}": loss for at, loss in named if loss is not None}
    return scalars
