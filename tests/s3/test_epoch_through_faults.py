"""An epoch over a store that has a bad day: every example once, in the order of a good day."""

import gzip
import io
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from faultproxy import Fault, FaultProxy, Request

from raytune_ft.data.counts import Counts
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import TokenisedWindow, decode
from raytune_ft.data.index import divide
from raytune_ft.data.ledger import Ledger
from raytune_ft.data.mixture import SourceShape
from raytune_ft.data.order import plan_course
from raytune_ft.data.reader import WindowReader
from raytune_ft.data.sources import list_objects
from raytune_ft.spec import DataSpec, SourceSpec
from raytune_ft.storage import open_storage
from raytune_ft.train.steps import Steps

pytestmark = pytest.mark.s3

RECORDS = 6000
OUTAGE_S = 20.0
Example = tuple[int, ...]


@pytest.fixture
def data(bucket: str, tmp_path: Path) -> DataSpec:
    """The same number of records in each of three formats; each record names itself."""
    store = open_storage(f"s3://{bucket}/data")
    records = [
        {"prompt": f"Number {n} of many, which is {'long ' * 70}", "completion": f" {n}"}
        for n in range(RECORDS)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    store.write("lines.jsonl", lines)
    store.write("packed.jsonl.gz", gzip.compress(lines))
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), file, row_group_size=500)
    store.write("table.parquet", file.getvalue())
    names = ("lines.jsonl", "packed.jsonl.gz", "table.parquet")
    return DataSpec(sources=tuple(SourceSpec(uri=f"s3://{bucket}/data/{name}") for name in names))


def epoch(data: DataSpec, cache: str | None, workers: int) -> tuple[list[Example], list[str]]:
    """All examples that the workers were given, and the digests of the steps."""
    objects = tuple(list_objects(data))
    reader = WindowReader(objects, data, Encoder.of(tiny.tokenizer()), cache)
    windows = [w for at, found in enumerate(objects) for w in divide(found, at, "auto", None)]
    shapes = []
    for source in range(len(data.sources)):
        numbers = tuple(number for number, window in enumerate(windows) if window.source == source)
        shapes.append(SourceShape(numbers, tuple(windows[n].size_bytes for n in numbers), RECORDS))
    course = plan_course(shapes, data, counted=False, sequences_per_step=100, epochs=1, steps=None)

    def open_windows(numbers: Sequence[int]) -> Iterator[TokenisedWindow]:
        return (decode(reader.read(windows[number])) for number in numbers)

    seen: list[Example] = []
    digests: list[str] = []
    for rank in range(workers):
        ledger = Ledger([Counts() for _ in data.sources], 3 * RECORDS, 0.0)
        steps = list(Steps(course, open_windows, ledger).share_of(rank, workers, 0))
        seen += [(example.source, *example.input_ids.tolist()) for step in steps for example in step.own]
        digests = [step.digest for step in steps]
    return seen, digests


def bad_day(seed: int) -> Callable[[Request], Fault | None]:
    """A third of all requests fail, each in one of the four ways."""
    draw = random.Random(seed)
    return lambda _: draw.choice([*Fault, *[None] * 8])


def test_each_row_exactly_once(fault_proxy: FaultProxy, bucket: str, data: DataSpec) -> None:
    expected, digests = epoch(data, None, 1)
    assert len(set(expected)) == len(expected)
    fault_proxy.plan = bad_day(seed=0)
    # The first pass fills the cache through the faults, the second reads it through them.
    for workers in (1, 2):
        found, found_digests = epoch(data, f"s3://{bucket}/cache", workers)
        assert sorted(found) == sorted(expected)
        assert found_digests == digests
    assert set(fault_proxy.faults) == set(Fault)


@pytest.mark.slow
@pytest.mark.chaos
def test_an_outage_in_the_middle(fault_proxy: FaultProxy, data: DataSpec) -> None:
    expected, digests = epoch(data, None, 1)
    began: list[float] = []

    def outage(request: Request) -> Fault | None:
        if request.number < len(fault_proxy.requests) - 1 or "lines.jsonl" not in request.path:
            return None
        if not began:
            began.append(time.monotonic())
        return Fault.UNAVAILABLE if time.monotonic() - began[0] < OUTAGE_S else None

    fault_proxy.plan = outage
    found, found_digests = epoch(data, None, 1)
    assert time.monotonic() - began[0] >= OUTAGE_S
    assert (sorted(found), found_digests) == (sorted(expected), digests)
