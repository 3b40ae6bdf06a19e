"""This project's data plane without a model: from listing to packed batches. Prints one line of JSON."""

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from transformers import PreTrainedTokenizerFast

from raytune_ft.data.counts import Counts
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import decode
from raytune_ft.data.ledger import Ledger
from raytune_ft.data.mixture import SourceShape
from raytune_ft.data.order import Course, plan_course
from raytune_ft.data.prepare import prepare
from raytune_ft.data.reader import WindowReader
from raytune_ft.data.sources import list_objects
from raytune_ft.data.stream import stream_windows
from raytune_ft.data.survey import divide_all
from raytune_ft.spec import JobSpec, parse_job
from raytune_ft.train.assignment import TrainingData
from raytune_ft.train.batch import Layout
from raytune_ft.train.feed import open_feed
from raytune_ft.train.steps import OpenWindows, Steps, ahead

EOS = "<|endoftext|>"
SEQUENCES_PER_STEP = 64
_TOKENS_PER_FORWARD = 16_384
_CLUSTER_CPUS = 2
_WARMING_WINDOWS = 8


def job_of(arguments: argparse.Namespace) -> JobSpec:
    """The job whose data is read; nothing is held out."""
    return parse_job(
        {
            "name": "data",
            "model": {"path": str(arguments.tokenizer)},
            "data": {
                "sources": [{"uri": arguments.data, "template": "instruction"}],
                "split": {"validation": 0.0, "test": 0.0},
                "max_tokens": arguments.max_tokens,
            },
            "batch": {"sequences": SEQUENCES_PER_STEP},
            "publish": {"catalog": arguments.catalog},
        }
    )


def core(job: JobSpec, arguments: argparse.Namespace) -> dict[str, Any]:
    """One core, one process, no cluster: windows read, tokenised, coded as in a task, decoded, put in order,
    packed."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    encoder = Encoder.of(_tokenizer(arguments.tokenizer))
    began = time.perf_counter()
    reader = WindowReader(tuple(list_objects(job.data)), job.data, encoder, None)
    windows = divide_all(reader)
    sizes = tuple(window.size_bytes for window in windows)
    course = _course(job, SourceShape(tuple(range(len(windows))), sizes, sum(sizes)))

    def opened(numbers: Any) -> Iterator[Any]:
        return (decode(reader.read(windows[number])) for number in numbers)

    return _consume(job, course, opened, _ledger(job, records=sum(sizes)), began)


def cluster(job: JobSpec, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ray on two cores, as a job with one worker reads its data; Ray was started before.

    With `--warm` the cluster has read something for another job, as one that runs for days has: Ray Data's
    own actors are up, and the processes of its tasks have imported what they need.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CLUSTER_CPUS])
    tokenizer = _tokenizer(arguments.tokenizer)
    with _local_cluster():
        if arguments.warm:
            reader = WindowReader(tuple(list_objects(job.data)), job.data, Encoder.of(tokenizer), None)
            for _ in stream_windows(divide_all(reader)[:_WARMING_WINDOWS], reader):
                pass
        began = time.perf_counter()
        prepared = prepare(job, tokenizer=tokenizer, cache=arguments.cache)
        seconds = time.perf_counter() - began
        course = plan_course(
            prepared.shapes,
            job.data,
            counted=prepared.complete,
            sequences_per_step=job.batch.sequences,
            epochs=1,
            steps=arguments.steps,
        )
        counts = {number: report.counts.train for number, report in prepared.reports.items()}
        data = TrainingData(
            course, prepared.windows, dict(prepared.contents), counts, prepared.reader, prepared.counts, {}
        )
        ledger = _ledger(job, prepared.counts.total.records)
        if prepared.complete:
            ledger.train_counts |= counts
        found = _consume(job, course, open_feed(data, 0, 1), ledger, began)
    return {**found, "of_which": {"prepare": seconds}}


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOS)


def _course(job: JobSpec, shape: SourceShape) -> Course:
    return plan_course(
        [shape], job.data, counted=False, sequences_per_step=job.batch.sequences, epochs=1, steps=None
    )


def _ledger(job: JobSpec, records: int) -> Ledger:
    return Ledger([Counts() for _ in job.data.sources], records, job.data.max_bad_fraction)


def _consume(
    job: JobSpec,
    course: Course,
    opened: OpenWindows,
    ledger: Ledger,
    began: float,
) -> dict[str, Any]:
    """Take the steps as training does, and lay each out in packed batches."""
    layout = Layout(True, job.data.max_tokens, 0, None, _TOKENS_PER_FORWARD)
    examples = rows = tokens = steps = 0
    first = None
    with ahead(Steps(course, opened, ledger).share_of(0, 1, 0)) as coming:
        for step in coming:
            batches = layout.batches(step.own)
            first = first or time.perf_counter() - began
            steps += 1
            examples += len(step.own)
            rows += sum(len(batch.input_ids_BT) for batch in batches)
            tokens += sum(batch.tokens for batch in batches)
    return {
        "seconds": time.perf_counter() - began,
        "first_batch_seconds": first,
        "steps": steps,
        "examples": examples,
        "packed_rows": rows,
        "tokens": tokens,
    }


@contextmanager
def _local_cluster() -> Iterator[None]:
    with warnings.catch_warnings():
        # Ray announces changes of its defaults to GPU-less clusters; nothing here depends on them.
        warnings.simplefilter("ignore", FutureWarning)
        ray.init(
            address="local",
            num_cpus=_CLUSTER_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    """Run one variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=("core", "cluster"))
    parser.add_argument("--data", required=True, help="file, folder or s3:// uri")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--catalog", required=True, help="where tokenised windows are kept, if they are")
    parser.add_argument("--cache", action="store_true", help="keep tokenised windows, and take them")
    parser.add_argument("--warm", action="store_true", help="let the cluster read something else before")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="stop after so many steps instead of one epoch")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    run = {"core": core, "cluster": cluster}[arguments.variant]
    print(json.dumps(run(job_of(arguments), arguments)))


if __name__ == "__main__":
    main()
