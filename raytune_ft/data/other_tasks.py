"""The examples of `evaluate.forgetting`: read as a job's own are, and never trained on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raytune_ft.data.checks import check_counts
from raytune_ft.data.counts import Survey
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import SCHEMA, decode
from raytune_ft.data.prepare import end_ids, reader_of
from raytune_ft.data.sources import DataObject, fingerprint, list_objects
from raytune_ft.data.survey import contents_of, divide_all, spread, surveyed
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec, JobSpec, SourceSpec, SplitSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OtherTasks:
    """The examples of `evaluate.forgetting`."""

    examples: pa.Table
    """Of `raytune_ft.data.examples.SCHEMA`; all are called train, since nothing is split off."""
    fingerprint: str
    """As that of a job's data."""
    end_ids: tuple[int, ...]
    """Tokens that their answers end with."""

    @property
    def described(self) -> dict[str, Any]:
        """What the record says of them."""
        return {"fingerprint": self.fingerprint, "examples": len(self.examples)}


def list_other_tasks(job: JobSpec) -> list[DataObject]:
    """The objects of `evaluate.forgetting`; none where it is not asked for.

    Raises:
        DataError: a source names nothing.
        StorageError: the store cannot be read.
    """
    with _places_of_other_tasks():
        return [] if job.evaluate.forgetting is None else list_objects(_as_data(job))


def read_other_tasks(
    job: JobSpec,
    *,
    tokenizer: "PreTrainedTokenizerBase | Encoder",
    cache: bool = True,
    here: bool = False,
) -> OtherTasks | None:
    """Read the examples of `evaluate.forgetting` as the job's own are read; None where it is not asked for.

    There are at most `evaluate.forgetting.max_examples` of them, evenly over what was read, so that each
    source has its share. They do not depend on `data.seed`: versions that differ in it are compared on the
    same. Ray must be initialised.

    Args:
        job: the job.
        tokenizer: the base's, or what was made of it.
        cache: keep tokenised windows beside the catalog, and take them from there.
        here: as for `prepare`.

    Raises:
        DataError: a source is missing, empty or unreadable, too many records are malformed, or no example
            is left.
        StorageError: the store failed.
        TrainingError: Ray lost the tasks.
    """
    if job.evaluate.forgetting is None:
        return None
    data = _as_data(job)
    with _places_of_other_tasks():
        reader = reader_of(job, data, tokenizer, cache=cache)
        windows = divide_all(reader)
        chosen = surveyed(windows, seed=0)
        opened = contents_of([windows[at] for at in chosen], reader, here=here)
        found = [decode(content) for _, content in opened]
        reports = {number: window.report for number, window in zip(chosen, found, strict=True)}
        survey = Survey(windows, reports)
        examples = pa.concat_tables([SCHEMA.empty_table(), *(window.table for window in found)])
        if len(examples) or not any(window.report.counts.dropped for window in found):
            check_counts(survey, data, None)
    if not len(examples):
        raise DataError(
            f"evaluate.forgetting: no example is left{survey.extent()}: the longest has "
            f"{max(window.report.longest for window in found)} tokens, and data.max_tokens is "
            f"{data.max_tokens}; raise it, or give other data"
        )
    return OtherTasks(
        examples=examples.take(spread(len(examples), job.evaluate.forgetting.max_examples)),
        fingerprint=fingerprint(reader.objects),
        end_ids=end_ids(reports),
    )


def _as_data(job: JobSpec) -> DataSpec:
    """The sources of `evaluate.forgetting` as a data section of which nothing is split off."""
    forgetting = job.evaluate.forgetting
    sources = () if forgetting is None else forgetting.sources
    own = {
        "sources": tuple(SourceSpec(**dict(source)) for source in sources),
        "split": SplitSpec(validation=0.0, test=0.0),
    }
    return job.data.model_copy(update=own)


@contextmanager
def _places_of_other_tasks() -> Iterator[None]:
    """Messages name the sources of `data`, which these stand in for."""
    try:
        yield
    except DataError as error:
        message = re.sub(r"\Adata(?=[.:])", "evaluate.forgetting", str(error))
        raise DataError(message) from None
