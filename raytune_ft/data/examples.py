"""One window of training data, from its bytes to a table of tokenised examples. Knows nothing of Ray."""

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter

from raytune_ft.data.conversation import Conversation, Malformed, PlainText, check_label
from raytune_ft.data.counts import KEPT_BAD_RECORDS, NO_LEARNED_TOKENS, Counts, WindowReport
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.formats import BadRecord, RawRecord, named_columns, read_window
from raytune_ft.data.records import read_record
from raytune_ft.data.segments import Example, Rendered
from raytune_ft.data.sources import DataObject
from raytune_ft.data.split import split_of
from raytune_ft.data.teaching import as_told, check_lost, count_learned, count_turns, left_out
from raytune_ft.data.template import concrete_name, render, shortened
from raytune_ft.data.tokenise import Tokenised, fit, learned_ends, tokenise
from raytune_ft.data.windows import Window
from raytune_ft.spec import DataSpec

SCHEMA = pa.schema(
    [
        ("record", pa.int64()),
        ("split", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.bool_())),
        ("references", pa.list_(pa.string())),
    ]
)
"""`record` is the place of an example's record among all records of its window."""

_RECORDS_PER_BATCH = 64
"""Small enough that texts and tokens stay in the processor's cache: a thousand take a tenth longer each."""
_REPORT, _CHECKSUM = b"raytune_ft", b"raytune_ft.crc32"
_WRITE = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class TokenisedWindow:
    """The good examples of a window, and what was found beside them."""

    table: pa.Table
    """Of SCHEMA, in the order of the records."""
    report: WindowReport


class Observed(NamedTuple):
    """One example with what it was made of, for those who look at the data."""

    record: Conversation | PlainText
    template: str
    example: Example
    part: int
    """Its place among the examples of its record."""
    parts: int
    split: str
    tokens: Tokenised
    """Before any limit."""
    kept: Tokenised | None
    """What is trained on; None where it is too long and dropped."""


def tokenise_window(
    found: DataObject,
    window: Window,
    data: DataSpec,
    encoder: Encoder,
    labels: Collection[str] = (),
    observe: Callable[[Observed], None] | None = None,
) -> TokenisedWindow:
    """Read, render, split and tokenise the records of one window.

    Args:
        found: the window's object.
        window: which part of it.
        data: the job's data section.
        encoder: the tokenizer's.
        labels: what completions may be; any text where there are none.
        observe: is called with every example, those that are dropped too.

    Raises:
        DataError: the window cannot be read as a whole, or its template cannot be used.
        StorageError: the store failed.
    """
    reading = _Reading(found, data, encoder, labels, observe)
    records = iter(read_window(found, window, named_columns(data.sources[found.source].fields)))
    while batch := list(islice(records, _RECORDS_PER_BATCH)):
        reading.read(batch)
    return reading.finish()


def encode(window: TokenisedWindow) -> bytes:
    """A tokenised window as an Arrow IPC file (lz4) with its report as JSON in the schema's metadata.

    Equal windows give equal bytes.
    """
    columns = [column.combine_chunks() for column in window.table.columns]
    report = _reports().dump_json(window.report)
    batch = pa.record_batch(columns, schema=SCHEMA)
    metadata = {_REPORT: report, _CHECKSUM: str(_checksum(batch, report)).encode()}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA.with_metadata(metadata), options=_WRITE) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def decode(content: bytes | pa.Buffer) -> TokenisedWindow:
    """What `encode` gave.

    Raises:
        ValueError: the bytes are anything else: cut off, damaged, or of another version.
    """
    try:
        with pa.ipc.open_file(pa.BufferReader(content)) as file:
            metadata = file.schema.metadata or {}
            if file.schema.remove_metadata() != SCHEMA or set(metadata) != {_REPORT, _CHECKSUM}:
                raise ValueError(f"not a tokenised window: its columns are {', '.join(file.schema.names)}")
            if file.num_record_batches != 1:
                raise ValueError(f"not a tokenised window: {file.num_record_batches} batches, not 1")
            batch = file.get_batch(0).replace_schema_metadata(None)
        batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a tokenised window: {error}") from None
    if str(_checksum(batch, metadata[_REPORT])).encode() != metadata[_CHECKSUM]:
        raise ValueError("a damaged tokenised window: its checksum is another")
    report = _reports().validate_json(metadata[_REPORT])
    if any(column.null_count for column in batch.columns) or not _agree(batch, report):
        raise ValueError("a damaged tokenised window: its examples are not those that its report counts")
    return TokenisedWindow(pa.Table.from_batches([batch]), report)


def _agree(batch: pa.RecordBatch, report: WindowReport) -> bool:
    """Whether a table is what its report says. What stands in a cache may be anybody's."""
    ids, learned = batch["input_ids"], batch["learned"]
    train = pc.sum(pc.equal(batch["split"], "train")).as_py() or 0
    lowest = pc.min(ids.values).as_py()
    return (
        train == report.counts.train
        and ids.values.null_count + learned.values.null_count == 0
        and ids.offsets.equals(learned.offsets)
        and (lowest is None or lowest >= 0)
    )


def _checksum(batch: pa.RecordBatch, report: bytes) -> int:
    # Arrow has none of its own: a damaged list of tokens would be trained on.
    return zlib.crc32(batch.serialize(), zlib.crc32(report))


@cache
def _reports() -> TypeAdapter[WindowReport]:
    return TypeAdapter(WindowReport)


class _Record(NamedTuple):
    """A record that was rendered."""

    place: int
    raw: RawRecord
    record: Conversation | PlainText
    template: str
    rendered: Rendered


class _Reading:
    """The state of reading one window. Examples are kept as flat arrays, which is what Arrow keeps."""

    def __init__(
        self,
        found: DataObject,
        data: DataSpec,
        encoder: Encoder,
        labels: Collection[str],
        observe: Callable[[Observed], None] | None,
    ) -> None:
        self._observe = observe
        self._found = found
        self._data = data
        self._encoder = encoder
        self._labels = labels
        self._source = data.sources[found.source]
        self._counts = Counts()
        self._left_out = Counter[str]()
        self._bad: list[BadRecord] = []
        self._masked = 0
        self._longest = 0
        self._templates = Counter[str]()
        self._places: list[int] = []
        self._splits: list[str] = []
        self._lengths: list[int] = []
        self._references: list[tuple[str, ...]] = []
        self._ids = [np.zeros(0, dtype=np.int32)]
        self._runs = [np.zeros(0, dtype=np.int64)]
        self._ends = set[int]()

    def read(self, records: Sequence[RawRecord | BadRecord]) -> None:
        """Take the next records."""
        rendered = list(self._rendered(records))
        segments = [example.segments for each in rendered for example in each.rendered.examples]
        tokenised = iter(tokenise(segments, self._encoder))
        kept: list[Tokenised] = []
        for each in rendered:
            pairs = [(example, next(tokenised)) for example in each.rendered.examples]
            found = [(example, tokens) for example, tokens in pairs if tokens is not None]
            if not found:
                self._masked += 1
                self._refuse(BadRecord.of(self._found.uri, each.raw, NO_LEARNED_TOKENS))
                continue
            self._counts.divided += len(found) > 1
            count_turns(self._counts, each.record)
            kept += self._kept(each, found)
        self._lengths += [len(tokens.input_ids) for tokens in kept]
        self._ends.update(*(learned_ends(tokens, self._encoder) for tokens in kept))
        self._ids.append(np.frombuffer(b"".join(tokens.input_ids for tokens in kept), dtype=np.int32))
        self._runs.append(np.fromiter(chain.from_iterable(tokens.runs for tokens in kept), dtype=np.int64))

    def finish(self) -> TokenisedWindow:
        """The table and the report, once all records were read."""
        ids, runs = np.concatenate(self._ids), np.concatenate(self._runs)
        learned = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        self._count(learned)
        report = WindowReport(
            counts=self._counts,
            bad=tuple(self._bad),
            reasons={NO_LEARNED_TOKENS: self._masked} if self._masked else {},
            templates=dict(self._templates),
            end_ids=tuple(sorted(self._ends)),
            longest=max(self._longest, max(self._lengths, default=0)),
        )
        return TokenisedWindow(self._table(ids, learned), report)

    def _rendered(self, records: Sequence[RawRecord | BadRecord]) -> Iterator[_Record]:
        source, encoder = self._source, self._encoder
        first = self._counts.records
        self._counts.records += len(records)
        for place, raw in enumerate(records, first):
            if isinstance(raw, BadRecord):
                self._refuse(raw)
                continue
            try:
                record = read_record(raw.value, source.fields, source.ignore)
                if self._labels:
                    check_label(record, self._labels)
                if isinstance(record, Conversation):
                    record = as_told(record, self._data)
                name = concrete_name(source.template, record, encoder)
                rendered = render(name, record, encoder)
                check_lost(rendered.lost, source, shortened(name))
            except Malformed as error:
                self._refuse(BadRecord.of(self._found.uri, raw, str(error)))
                continue
            self._templates[name] += 1
            self._left_out.update(left_out(raw.value, record, rendered.lost, source.ignore))
            yield _Record(place, raw, record, name, rendered)

    def _kept(self, each: _Record, found: Sequence[tuple[Example, Tokenised]]) -> Iterator[Tokenised]:
        """Those of a record's examples that are short enough."""
        split = split_of(each.record.input_text, self._data.split)
        for part, (example, tokens) in enumerate(found):
            kept = tokens if len(tokens.input_ids) <= self._data.max_tokens else self._fitted(tokens)
            if self._observe is not None:
                self._observe(
                    Observed(each.record, each.template, example, part, len(found), split, tokens, kept)
                )
            if kept is None:
                continue
            self._places.append(each.place)
            self._splits.append(split)
            self._references.append(_references(each.record, example))
            count_learned(self._counts, each.record, example, has_eos=self._encoder.eos_id is not None)
            yield kept

    def _fitted(self, example: Tokenised) -> Tokenised | None:
        self._longest = max(self._longest, len(example.input_ids))
        begins_with_bos = example.input_ids[0] == self._encoder.bos_id
        kept, outcome = fit(example, self._data.max_tokens, self._data.too_long, keep_first=begins_with_bos)
        self._counts.dropped += outcome == "dropped"
        self._counts.cut += outcome == "cut"
        return kept

    def _count(self, learned: np.ndarray[Any, Any]) -> None:
        counts, splits = self._counts, Counter(self._splits)
        counts.train, counts.validation, counts.test = (
            splits[split] for split in ("train", "validation", "test")
        )
        in_training = np.repeat([split == "train" for split in self._splits], self._lengths).astype(np.bool_)
        counts.tokens = int(in_training.sum())
        counts.learned_tokens = int((in_training & learned).sum())
        counts.left_out = dict(sorted(self._left_out.items()))

    def _refuse(self, bad: BadRecord) -> None:
        self._counts.bad += 1
        if len(self._bad) < KEPT_BAD_RECORDS:
            self._bad.append(bad)

    def _table(self, ids: np.ndarray[Any, Any], learned: np.ndarray[Any, Any]) -> pa.Table:
        def lists(name: str, lengths: Sequence[int], values: pa.Array) -> pa.Array:
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
            return pa.ListArray.from_arrays(pa.array(offsets), values, type=SCHEMA.field(name).type)

        references = pa.array(list(chain.from_iterable(self._references)), pa.string())
        columns = [
            pa.array(self._places, pa.int64()),
            pa.array(self._splits, pa.string()),
            lists("input_ids", self._lengths, pa.array(ids)),
            lists("learned", self._lengths, pa.array(learned)),
            lists("references", [len(texts) for texts in self._references], references),
        ]
        return pa.table(columns, schema=SCHEMA)


def _references(record: Conversation | PlainText, example: Example) -> tuple[str, ...]:
    """Texts that the last answer of an example may equally be."""
    if isinstance(record, PlainText) or not example.answers:
        return ()
    last = example.answers[-1]
    if last == len(record.turns) - 1 and record.references[0].strip():
        return record.references
    return (example.segments[-1].text,)
