"""Scalars that TensorBoard reads back."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raytune_ft.tensorboard import ScalarLog


def _read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    log = ScalarLog(tmp_path / "new" / "folder")
    log.write(1, {"train/loss": 0.5, "train/grad_norm": 2.0})
    log.write(2, {"train/loss": 0.25})
    log.close()
    assert _read(tmp_path / "new" / "folder") == {
        "train/loss": [(1, 0.5), (2, 0.25)],
        "train/grad_norm": [(1, 2.0)],
    }


def test_a_value_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    log = ScalarLog(tmp_path)
    log.write(1, {"loss": math.nan})
    log.close()
    [(step, value)] = _read(tmp_path)["loss"]
    assert step == 1
    assert math.isnan(value)


def test_a_second_log_leaves_the_first_one_alone(tmp_path: Path) -> None:
    for step in (1, 2):
        log = ScalarLog(tmp_path)
        log.write(step, {"loss": 1.0})
        log.close()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("library", ["torch", "tensorflow", "ray"])
def test_it_needs_no_large_library(library: str) -> None:
    check = f"import sys, raytune_ft.tensorboard; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
