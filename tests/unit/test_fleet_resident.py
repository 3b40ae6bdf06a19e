"""What a lane makes of a job that comes with a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lanes import PLACEMENT, fleet_of, job_on, write_task

from raytune_ft.fleet.plan import plan_fleet
from raytune_ft.fleet.resident import Resident
from raytune_ft.model_files import model_folder, read_facts, tokenizer_digest
from raytune_ft.spec import JobSpec
from raytune_ft.train.checkpoint import with_position


@pytest.mark.parametrize(
    ("change", "tokens_per_forward"),
    [
        ({}, 64),
        ({"batch": {"sequences_per_worker": 2}}, 256),
        ({"model": {"gradient_checkpointing": True}}, 256),
    ],
    ids=["same", "batch", "model"],
)
def test_the_choice_of_a_checkpoint_holds_while_the_job_says_the_same_of_its_memory(
    tmp_path: Path, change: dict[str, dict[str, Any]], tokens_per_forward: int
) -> None:
    base = tiny.save_base(tmp_path / "base")
    fleet = fleet_of(base, tmp_path / "catalog", {"counts": job_on(write_task(tmp_path, "counts"))})
    plan = plan_fleet(
        fleet,
        lambda path: read_facts(model_folder(path, weights=False)),
        place_name="fleet.yaml",
        device_bytes=None,
        flops_per_s=None,
    )
    (group,) = plan.groups
    job = group.jobs[0].spec
    try:
        resident = Resident(group, PLACEMENT)
    finally:
        torch.use_deterministic_algorithms(False)
    bench = resident.bench(job, "data", None)
    assert bench.position.choice.tokens_per_forward == 256
    assert bench.position.tokenizer_digest == tokenizer_digest(base)
    kept = replace(bench.position, step=2, choice=replace(bench.position.choice, tokens_per_forward=64))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    snapshot = bench.engine.snapshot()
    assert snapshot
    with_position(snapshot, kept)(folder)
    resident.leave(bench)
    sections = {name: getattr(job, name).model_copy(update=values) for name, values in change.items()}
    later: JobSpec = job.model_copy(update=sections)
    position = resident.bench(later, "data", folder).position
    assert (position.step, position.choice.tokens_per_forward) == (2, tokens_per_forward)
