"""Objects that change, vanish or break off between a listing and the end of their reading."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from faultproxy import Fault, FaultProxy

from raytune_ft.data.formats import RawRecord, read_window
from raytune_ft.data.index import divide
from raytune_ft.data.sources import DataObject, list_objects
from raytune_ft.data.windows import Window
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec, SourceSpec
from raytune_ft.storage import Storage, open_storage

ROWS = [{"n": n, "text": "x" * (n % 300)} for n in range(20_000)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def listed(storage: Storage) -> tuple[DataObject, tuple[Window, ...]]:
    storage.write("a.jsonl", LINES)
    (found,) = list_objects(DataSpec(sources=(SourceSpec(uri=f"{storage.uri}/a.jsonl"),)))
    windows = divide(found, 0, "auto", None)
    assert len(windows) > 2
    return found, windows


def values(found: DataObject, windows: Sequence[Window]) -> list[Any]:
    records = [record for window in windows for record in read_window(found, window)]
    assert all(isinstance(record, RawRecord) for record in records)
    return [record.value for record in records if isinstance(record, RawRecord)]


def changed(found: DataObject) -> str:
    return (
        f"{found.uri}: the data changed since this run listed it, with {found.size_bytes:,} bytes and "
        f"version {found.etag}; put it back or start again"
    )


def test_windows_of_a_store(storage: Storage) -> None:
    found, windows = listed(storage)
    assert values(found, windows) == ROWS


def test_an_object_that_is_replaced_between_two_windows(storage: Storage) -> None:
    found, windows = listed(storage)
    first = values(found, windows[:1])
    assert first == ROWS[: len(first)]
    # As long as before, so that only the version tells.
    storage.write("a.jsonl", LINES.replace(b"x", b"y"))
    for window in windows:
        with pytest.raises(DataError) as raised:
            values(found, [window])
        assert str(raised.value) == changed(found)
    with pytest.raises(DataError) as raised:
        divide(found, 0, "auto", None)
    assert str(raised.value) == changed(found)


def test_an_object_that_is_deleted_between_two_windows(storage: Storage) -> None:
    found, windows = listed(storage)
    values(found, windows[:1])
    storage.delete("a.jsonl")
    for read in (lambda: values(found, windows[1:]), lambda: divide(found, 0, "auto", None)):
        with pytest.raises(DataError) as raised:
            read()
        assert str(raised.value) == (
            f"{found.uri}: deleted since this run listed it, with {found.size_bytes:,} bytes and version "
            f"{found.etag}; put it back or start again"
        )


def test_an_object_that_is_cut_off_between_two_windows(storage: Storage) -> None:
    found, windows = listed(storage)
    storage.write("a.jsonl", LINES[: windows[1].start])
    with pytest.raises(DataError) as raised:
        values(found, windows[2:])
    assert str(raised.value) == changed(found)


@pytest.mark.s3
def test_an_object_that_is_replaced_within_a_window(fault_proxy: FaultProxy, bucket: str) -> None:
    storage = open_storage(f"s3://{bucket}")
    found, windows = listed(storage)
    whole = replace(windows[0], unit="object", stop=found.size_bytes)
    fault_proxy.plan = lambda request: Fault.TRUNCATED if request.method == "GET" else None
    records = read_window(found, whole)
    assert next(records) == RawRecord(ROWS[0], "line 1")
    storage.write("a.jsonl", LINES.replace(b"x", b"y"))
    with pytest.raises(DataError) as raised:
        list(records)
    assert str(raised.value) == changed(found)


@pytest.mark.s3
@pytest.mark.parametrize("fault", list(Fault))
def test_windows_over_a_bad_network(fault_proxy: FaultProxy, bucket: str, fault: Fault) -> None:
    found, windows = listed(open_storage(f"s3://{bucket}"))
    fault_proxy.plan = lambda request: fault if request.number % 2 == 0 else None
    assert values(found, windows) == ROWS
    assert fault in fault_proxy.faults
