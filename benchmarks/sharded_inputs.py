"""The passes of a sharded run, as its workers computed them, for a script that knows none of the data plane.

Writes `rank-<r>.safetensors` with the tensors of each step, and `steps.json` with what all workers share.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from raytune_ft.data.counts import Counts
from raytune_ft.data.ledger import Ledger
from raytune_ft.data.order import plan_course
from raytune_ft.data.prepare import prepare
from raytune_ft.model_files import model_folder, read_facts
from raytune_ft.models import load_tokenizer
from raytune_ft.planner import bucket_elements, trainable_parameters
from raytune_ft.spec import JobSpec, read_job
from raytune_ft.train.assignment import TrainingData
from raytune_ft.train.batch import Layout
from raytune_ft.train.feed import open_feed
from raytune_ft.train.launch import ray_session
from raytune_ft.train.steps import StepExamples, Steps

_SHARED = ("learning_rate", "learned_tokens", "tokens")


def shares(job: JobSpec) -> Iterator[list[StepExamples]]:
    """The steps of each worker in turn. Ray is up."""
    prepared = prepare(job, cache=False)
    course = plan_course(
        prepared.shapes,
        job.data,
        counted=prepared.complete,
        sequences_per_step=job.batch.sequences,
        epochs=job.schedule.epochs,
        steps=job.schedule.steps,
    )
    counts = {number: report.counts.train for number, report in prepared.reports.items()}
    data = TrainingData(
        course, prepared.windows, dict(prepared.contents), counts, prepared.reader, prepared.counts, {}
    )
    for rank in range(job.cluster.workers):
        ledger = Ledger([Counts()], prepared.counts.total.records, job.data.max_bad_fraction, dict(counts))
        yield list(Steps(course, open_feed(data, 0, 1), ledger).share_of(rank, job.cluster.workers, 0))


def passes(layout: Layout, steps: list[StepExamples], history: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of one worker's steps, by number and name.

    Raises:
        SystemExit: they are not those of the run, or a worker has not one pass in each step.
    """
    if [step.digest for step in steps] != [entry["batch"] for entry in history]:
        raise SystemExit("the steps that were laid out are not those of the run")
    tensors: dict[str, Tensor] = {}
    for number, step in enumerate(steps):
        batches = layout.batches(step.own)
        if len(batches) != 1:
            raise SystemExit(f"step {number}: a worker has {len(batches)} passes; choose smaller steps")
        for name in ("input_ids_BT", "position_ids_BT", "predictor_N", "labels_N"):
            tensors[f"{number}.{name}"] = getattr(batches[0], name).contiguous()
    return tensors


def main() -> None:
    """Lay the steps out as the run did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--position", type=Path, required=True, help="position.json of the run's end")
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    job = read_job(arguments.job)
    position = json.loads(arguments.position.read_text())
    layout = Layout(
        packing=job.data.packing,
        max_tokens=job.data.max_tokens,
        pad_token_id=load_tokenizer(job.model).pad_token_id,
        sequences_per_forward=None,
        tokens_per_forward=position["choice"]["tokens_per_forward"],
    )
    arguments.to.mkdir()
    with ray_session():
        for rank, steps in enumerate(shares(job)):
            save_file(passes(layout, steps, position["history"]), arguments.to / f"rank-{rank}.safetensors")
    shared = {
        "bucket_elements": bucket_elements(
            trainable_parameters(read_facts(model_folder(job.model.path)), job)
        ),
        "steps": [{name: entry[name] for name in _SHARED} for entry in position["history"]],
    }
    (arguments.to / "steps.json").write_text(json.dumps(shared))


if __name__ == "__main__":
    main()
