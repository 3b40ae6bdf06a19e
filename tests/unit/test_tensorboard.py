"""Scalars that TensorBoard reads back."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raytune_ft.tensorboard import ScalarLog, step_scalars


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


def _entry(**more: object) -> dict[str, object]:
    return {"loss": 0.5, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens": 90, "seconds": 0.5, **more}


def test_a_step_has_the_scalars_of_its_entry() -> None:
    plain = {
        "train/loss": 0.5,
        "train/learning_rate": 1e-3,
        "train/grad_norm": 2.0,
        "train/tokens_per_second": 180.0,
    }
    assert step_scalars(_entry()) == plain
    assert step_scalars(_entry(validation_loss=0.75)) == {**plain, "validation/loss": 0.75}
    scored = {**_entry(), "validation_scores": {"exact_match": 0.5}}
    assert step_scalars(scored) == {**plain, "validation/exact_match": 0.5}


def test_several_sources_have_scalars_of_their_own_where_they_had_tokens() -> None:
    several = step_scalars(_entry(source_losses=[0.5, None, 0.25]))
    assert {tag: value for tag, value in several.items() if "source" in tag} == {
        "train/loss/source_0": 0.5,
        "train/loss/source_2": 0.25,
    }
    assert step_scalars(_entry(source_losses=[0.5])) == step_scalars(_entry())


@pytest.mark.parametrize("library", ["torch", "tensorflow", "ray"])
def test_it_needs_no_large_library(library: str) -> None:
    check = f"import sys, raytune_ft.tensorboard; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
