"""Rows of parquet files and Arrow IPC files and streams, a batch at a time.

Numbers of 16 and 32 bits come as their shortest decimal: 0.1, and not 0.10000000149011612. In nested objects
what is null is left out: Arrow gives every struct all of its fields, so that it means "not there".
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from raytune_ft.data.access import ObjectFile
from raytune_ft.data.raw import BadRecord, RawRecord
from raytune_ft.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

_ROWS_PER_BATCH = 1024


def read_parquet(stream: BinaryIO, uri: str) -> Iterator[RawRecord | BadRecord]:
    """Rows of a parquet file.

    Raises:
        DataError: the file is damaged.
    """
    with _seekable(stream) as file, _arrow_errors(uri, "parquet"):
        opened = _open_parquet(file)
        yield from _rows_of_groups(opened, range(opened.num_row_groups), uri)


def parquet_group_sizes(file: ObjectFile, size_bytes: int, uri: str) -> list[int]:
    """Bytes of each row group of a parquet file, of which only the footer is read.

    Raises:
        DataError: the footer is damaged, or tells of bytes that the file does not have.
    """
    with _arrow_errors(uri, "parquet"):
        metadata = _open_parquet(file).metadata
        spans = [_span(metadata, group) for group in range(metadata.num_row_groups)]
    for group, (start, stop) in enumerate(spans):
        if not 0 <= start <= stop <= size_bytes:
            raise DataError(
                f"{uri}: not a whole parquet file (row group {group} is said to be at bytes {start:,} to "
                f"{stop:,} of {size_bytes:,}); write it again"
            )
    return [stop - start for start, stop in spans]


def read_row_groups(file: ObjectFile, uri: str, start: int, stop: int) -> Iterator[RawRecord | BadRecord]:
    """Rows of the row groups [start, stop) of a parquet file, which are asked for at once.

    Raises:
        DataError: the file is damaged.
    """
    if start == stop:
        return
    with _arrow_errors(uri, "parquet"):
        opened = _open_parquet(file)
        spans = [_span(opened.metadata, group) for group in range(start, stop)]
        file.fetch(min(begin for begin, _ in spans), max(end for _, end in spans))
        yield from _rows_of_groups(opened, range(start, stop), uri)


def read_arrow(stream: BinaryIO, uri: str) -> Iterator[RawRecord | BadRecord]:
    """Rows of an Arrow IPC file or stream.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow as pa

    with _seekable(stream) as file, _arrow_errors(uri, "arrow"):
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        before = 0
        for batch in batches:
            yield from _rows(batch, uri, before)
            before += batch.num_rows


def arrow_batch_count(file: ObjectFile, uri: str) -> int:
    """How many record batches an Arrow IPC file has, by its footer.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow as pa

    with _arrow_errors(uri, "arrow"):
        return int(pa.ipc.open_file(file).num_record_batches)


def read_batches(file: ObjectFile, uri: str, start: int, stop: int) -> Iterator[RawRecord | BadRecord]:
    """Rows of the record batches [start, stop) of an Arrow IPC file.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow as pa

    with _arrow_errors(uri, "arrow"):
        reader = pa.ipc.open_file(file)
        before = 0
        for number in range(start, stop):
            batch = reader.get_batch(number)
            # How many rows the batches before have is not in the footer.
            yield from _rows(batch, uri, before, f"batch {number + 1}, " if start else "")
            before = 0 if start else before + batch.num_rows


def stream_batches(file: ObjectFile, uri: str) -> tuple[int, list[tuple[int, int]]] | None:
    """Where the parts of an Arrow IPC stream are, found by reading it once, a message at a time.

    Returns:
        The bytes of the schema at its beginning, and of each record batch its bytes and its rows; None where
        batches refer to dictionaries that stand between them.

    Raises:
        DataError: the stream is damaged.
    """
    import pyarrow as pa

    batches = []
    with _arrow_errors(uri, "arrow"):
        messages = pa.ipc.MessageReader.open_stream(file)
        schema = pa.ipc.read_schema(messages.read_next_message())
        schema_bytes = end = file.tell()
        for message in messages:
            if message.type != "record batch":
                return None
            start, end = end, file.tell()
            batches.append((end - start, pa.ipc.read_record_batch(message, schema).num_rows))
    return schema_bytes, batches


def read_stream_part(content: bytes, uri: str, before: int) -> Iterator[RawRecord | BadRecord]:
    """Rows of some record batches of an Arrow IPC stream.

    Args:
        content: the bytes of the schema, and of the batches.
        uri: where the stream is.
        before: rows that stand before them.

    Raises:
        DataError: the stream is damaged.
    """
    import pyarrow as pa

    with _arrow_errors(uri, "arrow"):
        for batch in pa.ipc.open_stream(content):
            yield from _rows(batch, uri, before)
            before += batch.num_rows


def _open_parquet(file: BinaryIO | ObjectFile) -> "parquet.ParquetFile":
    from pyarrow import parquet

    return parquet.ParquetFile(file)


def _span(metadata: "parquet.FileMetaData", group: int) -> tuple[int, int]:
    """First byte of a row group, and the byte after its last."""
    row_group = metadata.row_group(group)
    starts, stops = [], []
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        # A dictionary at offset 0 means that there is none.
        start = column.dictionary_page_offset or column.data_page_offset
        starts.append(min(start, column.data_page_offset))
        stops.append(starts[-1] + column.total_compressed_size)
    return min(starts, default=0), max(stops, default=0)


def _rows_of_groups(
    file: "parquet.ParquetFile", groups: Sequence[int], uri: str
) -> Iterator[RawRecord | BadRecord]:
    metadata = file.metadata
    before = first = sum(metadata.row_group(group).num_rows for group in range(groups[0] if groups else 0))
    for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=list(groups)):
        yield from _rows(batch, uri, before)
        before += batch.num_rows
    promised = sum(metadata.row_group(group).num_rows for group in groups)
    if before - first != promised:
        raise DataError(
            f"{uri}: not a whole parquet file (its footer tells of {promised:,} rows, and there are "
            f"{before - first:,}); write it again"
        )


def _rows(batch: "pa.RecordBatch", uri: str, before: int, place: str = "") -> Iterator[RawRecord | BadRecord]:
    _check(batch)
    batch = _shortened(batch)
    cleaners = {field.name: clean for field in batch.schema if (clean := _cleaner(field.type)) is not None}
    for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
        part = batch.slice(start, _ROWS_PER_BATCH)
        try:
            rows = part.to_pylist()
        except (ValueError, OverflowError):
            rows = [None] * part.num_rows
        for number, row in enumerate(rows):
            position = f"{place}record {before + start + number + 1}"
            record = _row(part, number, uri, position) if row is None else RawRecord(row, position)
            if cleaners and isinstance(record, RawRecord):
                for name, clean in cleaners.items():
                    record.value[name] = _clean(record.value[name], clean)
            yield record


def _shortened(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """The batch with numbers of 32 bits as those of 64 bits that have the same shortest decimal."""
    import pyarrow as pa

    columns = batch.columns
    for at, column in enumerate(columns):
        as_text = _with_float32_as(pa.string(), column.type)
        if as_text != column.type:
            columns[at] = column.cast(as_text).cast(_with_float32_as(pa.float64(), column.type))
    # A batch made of no columns would have no rows.
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names) if columns else batch


def _with_float32_as(target: "pa.DataType", type: "pa.DataType") -> "pa.DataType":
    import pyarrow as pa

    if pa.types.is_float32(type):
        return target
    if pa.types.is_struct(type):
        return pa.struct([field.with_type(_with_float32_as(target, field.type)) for field in type])
    for is_list, new in (
        (pa.types.is_list, pa.list_),
        (pa.types.is_large_list, pa.large_list),
        (pa.types.is_fixed_size_list, lambda field: pa.list_(field, type.list_size)),
    ):
        if is_list(type):
            return new(type.value_field.with_type(_with_float32_as(target, type.value_type)))
    return type


Cleaner = Callable[[Any], Any]


def _cleaner(type: "pa.DataType") -> Cleaner | None:
    """What makes a record's value of a value of this type that is not null; None where that is itself."""
    import pyarrow as pa

    if pa.types.is_float16(type):
        return _shortest_float16
    if pa.types.is_struct(type):
        members = {field.name: _cleaner(field.type) for field in type}
        return lambda value: {
            name: _clean(member, members[name]) for name, member in value.items() if member is not None
        }
    is_list = pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)
    element = _cleaner(type.value_type) if is_list else None
    return None if element is None else lambda value: [_clean(each, element) for each in value]


def _clean(value: Any, clean: Cleaner | None) -> Any:
    return value if value is None or clean is None else clean(value)


def _shortest_float16(value: float) -> float:
    import numpy as np

    return float(str(np.float16(value)))


def _check(batch: "pa.RecordBatch") -> None:
    """Refuse offsets that lead elsewhere: Arrow would follow them. Raises ArrowInvalid.

    Whether text is UTF-8 is left to each row.
    """
    for column in batch.columns:
        column.view(_without_text(column.type)).validate(full=True)


def _without_text(type: "pa.DataType") -> "pa.DataType":
    """The type of the same layout whose texts are bytes."""
    import pyarrow as pa

    if pa.types.is_string(type):
        return pa.binary()
    if pa.types.is_large_string(type):
        return pa.large_binary()
    if pa.types.is_list(type):
        return pa.list_(_without_text(type.value_type))
    if pa.types.is_large_list(type):
        return pa.large_list(_without_text(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([field.with_type(_without_text(field.type)) for field in type])
    return type


def _row(batch: "pa.RecordBatch", number: int, uri: str, position: str) -> RawRecord | BadRecord:
    """A row by itself, as one beside it is not UTF-8, or a date beyond the calendar."""
    try:
        return RawRecord(batch.slice(number, 1).to_pylist()[0], position)
    except UnicodeDecodeError as error:
        return BadRecord(uri, position, "not UTF-8", error.object.decode("utf-8", "backslashreplace")[:2000])
    except (ValueError, OverflowError) as error:
        return BadRecord(uri, position, f"not readable: {error}", "")


@contextmanager
def _seekable(stream: BinaryIO) -> Iterator[BinaryIO]:
    """The stream's bytes on disk: these formats are read from their end, and may not fit the memory."""
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(stream, file, 1 << 20)
        file.seek(0)
        yield file


@contextmanager
def _arrow_errors(uri: str, format: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        # A damaged length asks for more memory than there is; a damaged name is not UTF-8.
        reason = str(error).strip().partition("\n")[0] or "it asks for too much memory"
        raise DataError(f"{uri}: not a whole {format} file ({reason}); write it again") from None
