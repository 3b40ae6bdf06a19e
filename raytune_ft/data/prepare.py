"""Before training: which windows a job's data has, and a survey of what stands in them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_ft.data.checks import check_counts
from raytune_ft.data.counts import KEPT_BAD_RECORDS, DataCounts, Survey, WindowReport
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.formats import BadRecord
from raytune_ft.data.mixture import SourceShape
from raytune_ft.data.reader import WindowReader
from raytune_ft.data.sources import DataObject, fingerprint, list_sources, listing_notices
from raytune_ft.data.survey import Kept, divide_all, read_windows, surveyed
from raytune_ft.data.template import AUTO, check_templates
from raytune_ft.data.windows import Window
from raytune_ft.models import load_tokenizer
from raytune_ft.spec import DataSpec, JobSpec
from raytune_ft.storage import disk_errors, join_uri

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """A job's data, ready to be trained on."""

    objects: tuple[DataObject, ...]
    windows: tuple[Window, ...]
    """All of them, sorted by object and part; elsewhere a window is named by its place among these."""
    fingerprint: str
    """sha256 over uri, size and etag of each object; see `raytune_ft.data.sources.fingerprint`."""
    complete: bool
    """All windows were read; otherwise a sample."""
    contents: Mapping[int, "Kept"]
    """Contents of the windows that were read: all of them where the data is complete, else the first of them,
    up to KEPT_BYTES. They are in Ray's object store, owned by this process, or in this process alone."""
    reports: Mapping[int, WindowReport]
    """Of the windows that were read."""
    counts: DataCounts
    examples: tuple[int, ...]
    """Training examples of each source; estimated where the data is not complete."""
    bad: tuple[BadRecord, ...]
    """Malformed records of the windows that were read, in order; where there are very many, the first."""
    end_ids: tuple[int, ...]
    """Tokens that the learned answers end with: where generation has to stop."""
    templates: tuple[str, ...]
    """The template of each source's records, the most frequent where `auto` found several: a prompt that is
    rendered with it looks as it did in training."""
    reader: WindowReader
    """Reads any of the windows."""

    @property
    def shapes(self) -> tuple[SourceShape, ...]:
        """What the order of the data needs to know of each source."""
        numbers = Survey(self.windows, self.reports).numbers
        return tuple(
            SourceShape(tuple(numbers[source]), tuple(map(self._size, numbers[source])), examples)
            for source, examples in enumerate(self.examples)
        )

    def _size(self, number: int) -> int:
        if self.complete:
            return self.reports[number].counts.train
        return self.windows[number].size_bytes


def prepare(
    job: JobSpec,
    quarantine: Path | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | Encoder | None" = None,
    cache: bool = True,
    here: bool = False,
) -> PreparedData:
    """Divide a job's data into windows and read them, or a sample of them. Ray must be initialised.

    Args:
        job: the job.
        quarantine: file for the malformed records, written where there are any.
        tokenizer: the base's, or what was made of it; loaded here where it is not given.
        cache: keep tokenised windows beside the catalog, and take them from there.
        here: this process trains meanwhile: it reads data of at most HERE_BYTES itself, keeps it to itself,
            and leaves all else to tasks.

    Raises:
        DataError: a source is missing, empty or unreadable, too many records are malformed, or nothing is
            left to train on.
        StorageError: the store failed.
        TrainingError: Ray lost the tasks.
    """
    reader = reader_of(job, job.data, tokenizer or load_tokenizer(job.model), cache=cache)
    windows = divide_all(reader)
    chosen = surveyed(windows, job.data.seed)
    contents, reports = read_windows(windows, chosen, reader, here=here)
    survey = Survey(windows, reports, reader.notices)
    bad = tuple(record for report in survey.read() for record in report.bad)[:KEPT_BAD_RECORDS]
    if bad and quarantine is not None:
        write_quarantine(bad, quarantine)
    counts = check_counts(survey, job.data, None if quarantine is None else str(quarantine))
    return PreparedData(
        objects=reader.objects,
        windows=windows,
        fingerprint=fingerprint(reader.objects),
        complete=survey.complete,
        contents=contents,
        reports=reports,
        counts=counts,
        # What is estimated at nothing would never be read.
        examples=tuple(
            source.train if survey.complete else max(1, source.train) for source in counts.sources
        ),
        bad=bad,
        end_ids=end_ids(reports),
        templates=tuple(_template(survey.read(source)) for source in range(len(job.data.sources))),
        reader=reader,
    )


def reader_of(
    job: JobSpec, data: DataSpec, tokenizer: "PreTrainedTokenizerBase | Encoder", *, cache: bool
) -> WindowReader:
    """What reads the windows of the objects that `data` names.

    Args:
        job: whose catalog and classes they are read for.
        data: the job's own, or other data that is read as its own is.
        tokenizer: the base's, or what was made of it.
        cache: keep tokenised windows beside the catalog, and take them from there.

    Raises:
        DataError: a source is missing, or its template is not to be had.
        StorageError: the store failed.
    """
    encoder = tokenizer if isinstance(tokenizer, Encoder) else Encoder.of(tokenizer)
    check_templates((source.template for source in data.sources), encoder)
    kept_at = join_uri(job.publish.catalog.rstrip("/"), "cache") if cache else None
    listings = list_sources(data)
    return WindowReader(
        objects=tuple(found for listing in listings for found in listing.objects),
        data=data,
        encoder=encoder,
        cache=kept_at,
        labels=job.model.labels,
        notices=tuple(listing_notices(data, listings)),
    )


def end_ids(reports: Mapping[int, WindowReport]) -> tuple[int, ...]:
    """Tokens that the learned answers of the windows end with."""
    return tuple(sorted(set().union(*(report.end_ids for report in reports.values()))))


def _template(reports: Sequence[WindowReport]) -> str:
    used = Counter[str]()
    for report in reports:
        used.update(report.templates)
    return used.most_common(1)[0][0] if used else AUTO


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
