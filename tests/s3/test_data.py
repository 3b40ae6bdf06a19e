"""Sources in a bucket."""

import gzip
import json

import pytest
import tiny

from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import decode
from raytune_ft.data.index import divide
from raytune_ft.data.reader import WindowReader
from raytune_ft.data.sources import list_objects, list_source
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec, SourceSpec
from raytune_ft.storage import open_storage

pytestmark = pytest.mark.s3


def test_objects_of_a_bucket(bucket: str) -> None:
    lines = "".join(f"{json.dumps({'prompt': str(n), 'completion': 'x'})}\n" for n in range(2000)).encode()
    storage = open_storage(f"s3://{bucket}")
    storage.write("sets/one/a.jsonl", lines)
    storage.write("sets/two/b.json", gzip.compress(lines))
    storage.write("sets/_SUCCESS", b"")
    uris = ("sets", "sets/*/a.*", "sets/one/a.jsonl")
    data = DataSpec(sources=tuple(SourceSpec(uri=f"s3://{bucket}/{uri}") for uri in uris))
    objects = list_objects(data)
    assert [(found.source, found.uri.rpartition("/")[2]) for found in objects] == [
        (0, "a.jsonl"),
        (0, "b.json"),
        (1, "a.jsonl"),
        (2, "a.jsonl"),
    ]
    reader = WindowReader(tuple(objects), data, Encoder.of(tiny.tokenizer()), f"s3://{bucket}/catalog/cache")
    windows = [window for at, found in enumerate(objects) for window in divide(found, at, "auto", None)]
    contents = [reader.read(window) for window in windows]
    assert sum(decode(content).table.num_rows for content in contents) == 4 * 2000
    # The same object by three names, and another.
    cached = list(storage.list("catalog/cache/tokens/"))
    assert len(cached) == 2
    assert [reader.read(window) for window in windows] == contents
    assert list(storage.list("catalog/cache/tokens/")) == cached


def test_nothing_in_a_bucket(bucket: str) -> None:
    uri = f"s3://{bucket}/sets/*.json"
    with pytest.raises(DataError) as raised:
        list_objects(DataSpec(sources=(SourceSpec(uri=uri),)))
    assert str(raised.value) == f"data.sources[0].uri = {uri}: no such file, and no folder or glob with files"


def test_splits_of_a_folder_in_a_bucket(bucket: str) -> None:
    storage = open_storage(f"s3://{bucket}/sets")
    for name in ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "README.md"):
        storage.write(name, b"{}")
    with pytest.raises(DataError, match=f"uri: s3://{bucket}/sets/train, or take"):
        list_source(f"s3://{bucket}/sets")
    (found,) = list_source(f"s3://{bucket}/sets/train").objects
    assert found.uri == f"s3://{bucket}/sets/data/train-00000-of-00001.jsonl"
