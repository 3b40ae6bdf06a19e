"""One object of training data, from its bytes to a table of tokenised examples. Knows nothing of Ray."""

import hashlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from raytune_ft.data.counts import NO_LEARNED_TOKENS, Counts, ObjectReport
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.formats import BadRecord, RawRecord, read_records
from raytune_ft.data.records import Conversation, Malformed, PlainText, read_record
from raytune_ft.data.sources import DataObject
from raytune_ft.data.split import Split, split_of
from raytune_ft.data.template import Segment, concrete_name, render
from raytune_ft.data.tokenise import Tokenised, fit, tokenise
from raytune_ft.spec import DataSpec
from raytune_ft.storage import open_storage

SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("number", pa.int64()),
        ("split", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.bool_())),
        ("references", pa.list_(pa.string())),
    ]
)
"""`source` and `number` together name an example and sort all of them; see `NUMBERS_PER_OBJECT`."""

NUMBERS_PER_OBJECT = 1 << 32
"""An example's number is its object's index × this + its record's place in the object."""
KEPT_BAD_RECORDS = 10_000
"""Bad records of an object that are kept for the quarantine file; all are counted."""
_RECORDS_PER_TABLE = 1024


@dataclass(frozen=True, slots=True)
class _Rendered:
    raw: RawRecord
    position: int
    record: Conversation | PlainText
    segments: tuple[Segment, ...]


def tokenise_object(
    found: DataObject, index: int, data: DataSpec, encoder: Encoder
) -> Generator[pa.Table, None, ObjectReport]:
    """Read, render, split and tokenise the records of one object.

    Args:
        found: the object.
        index: its place among all objects of the job.
        data: the job's data section.
        encoder: the tokenizer's.

    Yields:
        Tables of SCHEMA with the good examples, in the order of the records.

    Returns:
        The report, with the bad records.

    Raises:
        DataError: the object cannot be read as a whole, or its template cannot be used.
        StorageError: the store failed.
    """
    source = data.sources[found.source]
    reading = _Reading(found, index, data, encoder)
    with open_storage(found.root).open(found.key) as stream:
        for chunk in _chunks(read_records(stream, found.uri, source.format), _RECORDS_PER_TABLE):
            table = reading.read(chunk)
            if table.num_rows:
                yield table
    return reading.finish()


class _Reading:
    """The state of reading one object: its report and the digest so far."""

    def __init__(self, found: DataObject, index: int, data: DataSpec, encoder: Encoder) -> None:
        self._found = found
        self._data = data
        self._encoder = encoder
        self._source = data.sources[found.source]
        self._report = ObjectReport(index=index, source=found.source, counts=Counts(objects=1))
        self._digest = hashlib.sha256()

    def finish(self) -> ObjectReport:
        """The report, once all records were read."""
        self._report.digest = self._digest.hexdigest()
        return self._report

    def read(self, records: Iterable[RawRecord | BadRecord]) -> pa.Table:
        """Examples of the next records."""
        rendered = list(self._rendered(records))
        tokenised = tokenise([each.segments for each in rendered], self._encoder)
        columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
        for each, example in zip(rendered, tokenised, strict=True):
            kept = self._fitted(each, example)
            if kept is not None:
                split = split_of(each.record.input_text, self._data.split)
                self._count(split, kept)
                columns["source"].append(self._found.source)
                columns["number"].append(self._report.index * NUMBERS_PER_OBJECT + each.position)
                columns["split"].append(split)
                columns["input_ids"].append(kept.input_ids)
                columns["learned"].append(kept.learned)
                columns["references"].append(
                    each.record.references if isinstance(each.record, Conversation) else ()
                )
        return pa.table(columns, schema=SCHEMA)

    def _rendered(self, records: Iterable[RawRecord | BadRecord]) -> Iterator[_Rendered]:
        for raw in records:
            position = self._report.counts.records
            self._report.counts.records += 1
            if isinstance(raw, BadRecord):
                self._refuse(raw)
                continue
            try:
                record = read_record(raw.value, self._source.fields)
                template = concrete_name(self._source.template, record, self._encoder)
                yield _Rendered(raw, position, record, render(template, record, self._encoder))
                self._report.templates[template] += 1
            except Malformed as error:
                self._refuse(BadRecord.of(self._found.uri, raw, str(error)))

    def _fitted(self, each: _Rendered, example: Tokenised | None) -> Tokenised | None:
        if example is None:
            self._report.reasons[NO_LEARNED_TOKENS] += 1
            self._refuse(BadRecord.of(self._found.uri, each.raw, NO_LEARNED_TOKENS))
            return None
        self._report.longest = max(self._report.longest, len(example.input_ids))
        begins_with_bos = example.input_ids[0] == self._encoder.bos_id
        kept, outcome = fit(example, self._data.max_tokens, self._data.too_long, keep_first=begins_with_bos)
        self._report.counts.dropped += outcome == "dropped"
        self._report.counts.cut += outcome == "cut"
        return kept

    def _count(self, split: Split, example: Tokenised) -> None:
        counts = self._report.counts
        if split == "train":
            counts.train += 1
            counts.tokens += len(example.input_ids)
            counts.learned_tokens += sum(example.learned)
        elif split == "validation":
            counts.validation += 1
        else:
            counts.test += 1
        if example.learned[-1]:
            self._report.end_ids.add(example.input_ids[-1])
        self._digest.update(f"{split} {len(example.input_ids)} ".encode())
        self._digest.update(np.asarray(example.input_ids, dtype="<i4").tobytes())
        self._digest.update(np.packbits(example.learned).tobytes())

    def _refuse(self, bad: BadRecord) -> None:
        self._report.counts.bad += 1
        if len(self._report.bad) < KEPT_BAD_RECORDS:
            self._report.bad.append(bad)


def _chunks(records: Iterator[RawRecord | BadRecord], size: int) -> Iterator[list[RawRecord | BadRecord]]:
    while chunk := list(islice(records, size)):
        yield chunk
