"""Before training: which windows a job's data has, and a survey of what stands in them."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.exceptions

from raytune_ft.data.access import store_at
from raytune_ft.data.counts import KEPT_BAD_RECORDS, DataCounts, Survey, WindowReport, check_counts
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import SCHEMA, decode
from raytune_ft.data.formats import BadRecord
from raytune_ft.data.index import divide
from raytune_ft.data.mixture import SourceShape
from raytune_ft.data.order import POOL_WINDOWS, window_order
from raytune_ft.data.reader import WindowReader
from raytune_ft.data.sources import DataObject, fingerprint, list_objects
from raytune_ft.data.stream import Contents, cluster_task_cpus, ray_reason, stream_windows
from raytune_ft.data.template import AUTO, check_template
from raytune_ft.data.windows import WINDOW_BYTES, Window
from raytune_ft.errors import DataError, RaytuneError, TrainingError
from raytune_ft.models import load_tokenizer
from raytune_ft.spec import DataSpec, JobSpec, SourceSpec, SplitSpec
from raytune_ft.storage import disk_errors, join_uri

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SURVEY_BYTES = 64 << 20
"""Data up to this size is read as a whole before training, and its contents stay on the cluster."""
HERE_BYTES = 4 << 20
"""A process that trains meanwhile reads data up to this size itself: starting tasks takes longer."""
SAMPLE_BYTES = POOL_WINDOWS * WINDOW_BYTES
"""About how much of larger data is read before training; of each source at least a window."""
SAMPLE_WINDOWS = 256
"""How many files a sample of very small ones has at most, of each source."""
KEPT_BYTES = 64 << 20
"""Contents of a sample that stay on the cluster: its windows may be whole objects, and there may be many."""
_DIVIDED_HERE = 16
"""Up to so many objects it takes longer to start tasks than to divide them."""
_READ_HERE = 16
"""Up to so many windows, of SAMPLE_BYTES together, it takes longer to start tasks than to read them."""
_OBJECTS_PER_TASK = 64


Kept = Any
"""A reference into Ray's object store, or the content itself as a `pa.Buffer`; see `content_of`."""


def content_of(kept: Kept) -> pa.Buffer:
    """The content of a window that was kept; see `raytune_ft.data.examples.decode`."""
    found: pa.Buffer = kept if isinstance(kept, pa.Buffer) else ray.get(kept)
    return found


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
    encoder = _encoder(tokenizer or load_tokenizer(job.model))
    for source in job.data.sources:
        check_template(source.template, encoder)
    objects = tuple(list_objects(job.data))
    reader = WindowReader(objects, job.data, encoder, _cache_uri(job) if cache else None, job.model.labels)
    windows = divide_all(reader)
    chosen = surveyed(windows, job.data.seed)
    contents, reports = _read(windows, chosen, reader, here=here)
    survey = Survey(windows, reports)
    bad = tuple(record for report in survey.read() for record in report.bad)[:KEPT_BAD_RECORDS]
    if bad and quarantine is not None:
        write_quarantine(bad, quarantine)
    counts = check_counts(survey, job.data, None if quarantine is None else str(quarantine))
    return PreparedData(
        objects=objects,
        windows=windows,
        fingerprint=fingerprint(objects),
        complete=survey.complete,
        contents=contents,
        reports=reports,
        counts=counts,
        # What is estimated at nothing would never be read.
        examples=tuple(
            source.train if survey.complete else max(1, source.train) for source in counts.sources
        ),
        bad=bad,
        end_ids=_end_ids(reports),
        templates=tuple(_template(survey.read(source)) for source in range(len(job.data.sources))),
        reader=reader,
    )


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
    data, encoder = _as_data(job), _encoder(tokenizer)
    with _places_of_other_tasks():
        for source in data.sources:
            check_template(source.template, encoder)
        objects = tuple(list_objects(data))
        reader = WindowReader(objects, data, encoder, _cache_uri(job) if cache else None, job.model.labels)
        windows = divide_all(reader)
        chosen = surveyed(windows, seed=0)
        opened = _contents([windows[at] for at in chosen], reader, here=here)
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
        fingerprint=fingerprint(objects),
        end_ids=_end_ids(reports),
    )


def _encoder(tokenizer: "PreTrainedTokenizerBase | Encoder") -> Encoder:
    return tokenizer if isinstance(tokenizer, Encoder) else Encoder.of(tokenizer)


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


def _cache_uri(job: JobSpec) -> str:
    return join_uri(job.publish.catalog.rstrip("/"), "cache")


def _end_ids(reports: Mapping[int, WindowReport]) -> tuple[int, ...]:
    return tuple(sorted(set().union(*(report.end_ids for report in reports.values()))))


def spread(size: int, limit: int) -> list[int]:
    """At most `limit` numbers below `size`, evenly over them."""
    return list(range(size)) if size <= limit else [at * size // limit for at in range(limit)]


def surveyed(windows: Sequence[Window], seed: int) -> list[int]:
    """Which windows are read before training: all, or those of each source that an epoch begins with.

    They are drawn at random, as a sample should be, and training needs nothing more for its first steps.
    """
    if sum(window.size_bytes for window in windows) <= SURVEY_BYTES:
        return list(range(len(windows)))
    of_source = Survey(windows, {}).numbers
    chosen = []
    for source, numbers in of_source.items():
        order = window_order(len(numbers), seed, source, task_epoch=0)
        in_order = [numbers[at] for at in order.tolist()]
        # A file without content tells nothing of the others.
        filled = [number for number in in_order if windows[number].size_bytes] or in_order
        chosen += _sample(filled, windows, SAMPLE_BYTES // len(of_source))
    return sorted(chosen)


def _sample(numbers: Sequence[int], windows: Sequence[Window], size_bytes: int) -> list[int]:
    """The first windows that have so many bytes; of very small files no more than SAMPLE_WINDOWS."""
    taken: list[int] = []
    taken_bytes = 0
    for number in numbers[:SAMPLE_WINDOWS]:
        if taken and taken_bytes >= size_bytes:
            break
        taken.append(number)
        taken_bytes += windows[number].size_bytes
    return taken


def divide_all(reader: WindowReader) -> tuple[Window, ...]:
    """The windows of all objects, sorted by object and part.

    Raises:
        DataError: an object is of no known format, or too large to be read as a whole.
        StorageError: the store failed.
        TrainingError: Ray lost the tasks.
    """
    numbers = range(len(reader.objects))
    if len(numbers) <= _DIVIDED_HERE:
        return tuple(_divide(numbers, reader))
    chunks = [numbers[at : at + _OBJECTS_PER_TASK] for at in range(0, len(numbers), _OBJECTS_PER_TASK)]
    shared = ray.put(reader)
    task = _divide_remotely.options(num_cpus=cluster_task_cpus())
    try:
        divided = ray.get([task.remote(chunk, shared) for chunk in chunks])
    except ray.exceptions.RayError as error:
        raise TrainingError(f"the data could not be divided: {ray_reason(error)}") from error
    windows: list[Window] = []
    for found in divided:
        if isinstance(found, RaytuneError):
            raise found
        windows += found
    return tuple(windows)


def _divide(numbers: Sequence[int], reader: WindowReader) -> Iterator[Window]:
    cache = None if reader.cache is None else store_at(reader.cache)
    for number in numbers:
        found = reader.objects[number]
        yield from divide(found, number, reader.data.sources[found.source].format, cache)


@ray.remote  # type: ignore[untyped-decorator]  # ray ships no types
def _divide_remotely(numbers: Sequence[int], reader: WindowReader) -> list[Window] | RaytuneError:
    try:
        return list(_divide(numbers, reader))
    except RaytuneError as error:
        # As a value, since Ray would print it with its traceback.
        return error


def _read(
    windows: Sequence[Window], chosen: Sequence[int], reader: WindowReader, *, here: bool
) -> tuple[dict[int, Kept], dict[int, WindowReport]]:
    """Contents and reports of some windows, by their numbers."""
    contents: dict[int, Kept] = {}
    reports: dict[int, WindowReport] = {}
    kept_bytes = 0
    complete = len(chosen) == len(windows)
    wanted = [windows[number] for number in chosen]
    stays = here and _size_bytes(wanted) <= HERE_BYTES
    for place, content in _contents(wanted, reader, here=here):
        number = chosen[place]
        reports[number] = decode(content).report
        if complete or kept_bytes + content.size <= KEPT_BYTES:
            # A copy of its own, since the execution's goes away with it.
            contents[number] = content if stays else ray.put(content)
            kept_bytes += content.size
    return contents, reports


def _size_bytes(windows: Iterable[Window]) -> int:
    return sum(window.size_bytes for window in windows)


def _contents(windows: Sequence[Window], reader: WindowReader, *, here: bool) -> Contents:
    """As `stream_windows`; what is soon read is read by this process."""
    few = here or len(windows) <= _READ_HERE
    if few and _size_bytes(windows) <= (HERE_BYTES if here else SAMPLE_BYTES):
        return ((place, pa.py_buffer(reader.read(window))) for place, window in enumerate(windows))
    return stream_windows(windows, reader)


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
