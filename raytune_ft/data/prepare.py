"""The data pass: every object of a job through Ray Data, once, into tokenised examples on the cluster."""

import hashlib
import json
import logging
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from raytune_ft.data.counts import Counts, DataCounts, ObjectReport, check_counts
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import SCHEMA, tokenise_object
from raytune_ft.data.formats import BadRecord
from raytune_ft.data.sources import DataObject, list_objects
from raytune_ft.data.template import AUTO, check_template
from raytune_ft.errors import RaytuneError
from raytune_ft.models import load_tokenizer
from raytune_ft.spec import DataSpec, JobSpec
from raytune_ft.storage import disk_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPORT = "report"
_TASK_SCHEMA = SCHEMA.append(pa.field(_REPORT, pa.binary()))
_MAX_BLOCKS = 512


@dataclass(frozen=True)
class PreparedData:
    """A job's data, ready to be trained on."""

    examples: "ray.data.Dataset"
    """Materialised rows of `raytune_ft.data.examples.SCHEMA`, all splits, sorted by source and number."""
    objects: tuple[DataObject, ...]
    fingerprint: str
    """sha256 over the tokenised examples in order: the same content gives the same, wherever it lies."""
    counts: DataCounts
    bad: tuple[BadRecord, ...]
    """Malformed records, in order; of an object with very many, the first."""
    end_ids: tuple[int, ...]
    """Tokens that the learned answers end with: where generation has to stop."""
    templates: tuple[str, ...]
    """The template of each source's records, the most frequent where `auto` found several: a prompt that is
    rendered with it looks as it did in training."""


def prepare(
    job: JobSpec,
    quarantine: Path | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> PreparedData:
    """Read, render, split and tokenise all of a job's data. Ray must be initialised.

    Args:
        job: the job.
        quarantine: file for the malformed records, written where there are any.
        tokenizer: the base's; loaded here where it is not given.

    Raises:
        DataError: a source is missing, empty or unreadable, too many records are malformed, or nothing is
            left to train on.
        StorageError: the store failed.
    """
    encoder = Encoder.of(tokenizer or load_tokenizer(job.model))
    for source in job.data.sources:
        check_template(source.template, encoder)
    objects = list_objects(job.data)
    examples, reports = _run_pass(objects, job.data, encoder)
    for report in reports:
        if report.failure is not None:
            raise report.failure
    bad = tuple(record for report in reports for record in report.bad)
    if bad and quarantine is not None:
        write_quarantine(bad, quarantine)
    counts = check_counts(reports, job.data, None if quarantine is None else str(quarantine))
    return PreparedData(
        examples=examples,
        objects=tuple(objects),
        fingerprint=_content_fingerprint(reports),
        counts=counts,
        bad=bad,
        end_ids=tuple(sorted(set().union(*(report.end_ids for report in reports)))),
        templates=_templates(reports, len(job.data.sources)),
    )


def write_quarantine(bad: Sequence[BadRecord], path: Path) -> None:
    """Write malformed records as JSON lines: `file`, `position`, `reason`, and the beginning of `record`.

    Raises:
        StorageFull: no space is left.
        StorageError: the file cannot be written.
    """
    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(_quarantined(record), ensure_ascii=False)}\n" for record in bad)


def _quarantined(record: BadRecord) -> dict[str, str]:
    values = asdict(record)
    return {"file": values.pop("uri"), **values}


def _content_fingerprint(reports: Sequence[ObjectReport]) -> str:
    digest = hashlib.sha256()
    for report in reports:
        digest.update(f"{report.source} {report.digest}\n".encode())
    return digest.hexdigest()


def _templates(reports: Sequence[ObjectReport], sources: int) -> tuple[str, ...]:
    used = [Counter[str]() for _ in range(sources)]
    for report in reports:
        used[report.source].update(report.templates)
    return tuple(count.most_common(1)[0][0] if count else AUTO for count in used)


def _run_pass(
    objects: Sequence[DataObject], data: DataSpec, encoder: Encoder
) -> tuple["ray.data.Dataset", list[ObjectReport]]:
    """One execution of Ray Data: examples and reports travel in the same rows, and are separated after it."""
    # It would say, among other things, that it shows no progress bars.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    read = ray.data.from_items(
        [{"index": index} for index in range(len(objects))],
        override_num_blocks=min(len(objects), _MAX_BLOCKS),
    ).map_batches(
        partial(_read_objects, objects=tuple(objects), data=data, encoder=encoder),
        batch_size=None,
        num_cpus=1,
    )
    read.context.execution_options.preserve_order = True
    read.context.enable_progress_bars = False
    blocks = read.materialize().to_arrow_refs()
    separated = [_separate.remote(block) for block in blocks]
    examples = ray.data.from_arrow_refs([examples for examples, _ in separated])
    reports: list[ObjectReport] = [r for part in ray.get([reports for _, reports in separated]) for r in part]
    return examples, sorted(reports, key=lambda report: report.index)


def _read_objects(
    batch: dict[str, Any], objects: Sequence[DataObject], data: DataSpec, encoder: Encoder
) -> Iterator[pa.Table]:
    """A task of the pass: the examples of some objects, and after each object its report."""
    # A task has one CPU; the tokenizer would start a thread for each of the machine's.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for index in batch["index"].tolist():
        reading = tokenise_object(objects[index], index, data, encoder)
        while True:
            try:
                table = next(reading)
            except StopIteration as finished:
                report: ObjectReport = finished.value
                break
            except RaytuneError as error:
                # As a row, since an exception inside Ray is printed with its traceback and tried again.
                report = ObjectReport(index, objects[index].source, Counts(objects=1), failure=error)
                break
            yield table.append_column(_TASK_SCHEMA.field(_REPORT), pa.nulls(table.num_rows, pa.binary()))
        yield pa.Table.from_pylist([{_REPORT: pickle.dumps(report)}], schema=_TASK_SCHEMA)


@ray.remote(num_cpus=0, num_returns=2)  # type: ignore[untyped-decorator]  # ray ships no types
def _separate(block: pa.Table) -> tuple[pa.Table, list[ObjectReport]]:
    """Examples and reports of a block. The pickles are those of `_read_objects`."""
    is_example = pc.is_null(block[_REPORT])
    reports = block.filter(pc.invert(is_example))[_REPORT].to_pylist()
    examples = block.filter(is_example).select(SCHEMA.names)
    return examples, [pickle.loads(report) for report in reports]  # noqa: S301  our own, see above
