"""Rows of parquet files and Arrow IPC files and streams, a batch at a time."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from raytune_ft.errors import DataError

_ROWS_PER_BATCH = 1024


def read_parquet(stream: BinaryIO, uri: str) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file.

    Raises:
        DataError: the file is damaged.
    """
    from pyarrow import parquet

    with _seekable(stream) as file, _arrow_errors(uri, "parquet"):
        for batch in parquet.ParquetFile(file).iter_batches(_ROWS_PER_BATCH):
            yield from batch.to_pylist()


def read_arrow(stream: BinaryIO, uri: str) -> Iterator[dict[str, Any]]:
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
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                yield from batch.slice(start, _ROWS_PER_BATCH).to_pylist()


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
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{uri}: not a whole {format} file ({reason}); write it again") from None
