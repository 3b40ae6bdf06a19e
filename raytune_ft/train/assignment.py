"""What the driver and the worker tell each other, and the function that Ray Train runs.

Driver, controller and worker all unpickle what stands here. Only the worker needs torch, whose import takes
seconds and memory in each process; so it is imported when the worker runs.
"""

import logging
from dataclasses import dataclass
from typing import Any

from raytune_ft.errors import RaytuneError, TrainingError
from raytune_ft.spec import JobSpec
from raytune_ft.train.run import RunState


@dataclass(frozen=True)
class Assignment:
    """All that the driver tells the worker."""

    job: JobSpec
    state: RunState
    data: dict[str, Any]
    """What the record says of the data: fingerprint, counts, and the template of each source."""
    end_ids: tuple[int, ...]
    """Tokens that learned answers end with."""
    tables: list[Any]
    """References to the Arrow tables of the data pass, in Ray's object store."""
    channel: str
    """Where the worker's events go: another for each launch, so that nobody reads an earlier driver's."""
    use_gpu: bool
    threads: int


@dataclass(frozen=True)
class Outcome:
    """What the driver learns from a run that succeeded."""

    result: dict[str, Any]
    history: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    versions: dict[str, str]
    machine: dict[str, str]


def train_worker(config: dict[str, Assignment]) -> Outcome | RaytuneError:
    """Entry for Ray Train. Errors come back as a value: Ray would retry an exception."""
    from raytune_ft.train.worker import run_recipe

    try:
        return run_recipe(config["assignment"])
    except RaytuneError as error:
        return error
    except Exception as error:
        logging.getLogger(__name__).exception("the worker failed")
        reason = str(error).strip().partition("\n")[0][:300]
        return TrainingError(f"the worker failed: {type(error).__name__}: {reason}")
