"""Tokenised windows in a store: found again, never mixed up, never needed."""

import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from raytune_ft.data.cache import TokenCache, cache_key
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import decode
from raytune_ft.data.index import divide
from raytune_ft.data.reader import WindowReader
from raytune_ft.data.sources import DataObject, list_objects
from raytune_ft.data.windows import Window
from raytune_ft.errors import DataError, StorageDenied, StorageError, StorageFull
from raytune_ft.spec import DataSpec
from raytune_ft.storage import FolderStorage, open_storage

ENCODER = Encoder.of(tiny.tokenizer())


def spec(folder: Path, **values: Any) -> DataSpec:
    path = folder / "a.jsonl"
    lines = [json.dumps({"prompt": f"say {n}", "completion": str(n)}) for n in range(30)]
    path.write_text("\n".join(lines) + "\n")
    return DataSpec.model_validate({"sources": [{"uri": str(path)}], **values})


def reader_of(folder: Path, encoder: Encoder = ENCODER) -> tuple[WindowReader, Window]:
    data = spec(folder)
    objects = tuple(list_objects(data))
    (window,) = divide(objects[0], 0, "auto", None)
    return WindowReader(objects, data, encoder, str(folder / "cache")), window


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*.arrow"))


def test_the_second_reading_neither_reads_nor_tokenises(tmp_path: Path) -> None:
    reader, window = reader_of(tmp_path)
    content = reader.read(window)
    assert decode(content).table.num_rows == 30
    (tmp_path / "a.jsonl").unlink()
    assert reader.read(window) == content
    with pytest.raises(DataError, match="deleted since"):
        replace(reader, cache=None).read(window)


def test_without_a_cache_nothing_is_written(tmp_path: Path) -> None:
    reader, window = reader_of(tmp_path)
    replace(reader, cache=None).read(window)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", [b"", b"junk", "cut", "flip"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: bytes | str) -> None:
    reader, window = reader_of(tmp_path)
    content = reader.read(window)
    (path,) = cached(tmp_path)
    middle = len(content) // 2
    changes = {
        "cut": content[:-9],
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    path.write_bytes(changes[damage] if isinstance(damage, str) else damage)
    assert reader.read(window) == content
    assert path.read_bytes() == content


def test_a_tokenizer_without_a_name_is_not_cached(tmp_path: Path) -> None:
    reader, window = reader_of(tmp_path, replace(ENCODER, digest=None))
    assert decode(reader.read(window)).table.num_rows == 30
    assert cached(tmp_path) == []


FOUND = DataObject(0, "s3://bucket", "a.jsonl", 100, "etag")
WINDOW = Window(0, 0, 1, "bytes", 50, 90, 40, "jsonl")
DATA = DataSpec.model_validate({"sources": [{"uri": "a"}]})


def source(**values: Any) -> DataSpec:
    return DataSpec.model_validate({"sources": [{"uri": "a", **values}]})


CHANGES: Sequence[tuple[DataObject, Window, DataSpec, Encoder]] = [
    (FOUND, WINDOW, DATA, ENCODER),
    (replace(FOUND, root="s3://other"), WINDOW, DATA, ENCODER),
    (replace(FOUND, key="b.jsonl"), WINDOW, DATA, ENCODER),
    (replace(FOUND, size_bytes=101), WINDOW, DATA, ENCODER),
    (replace(FOUND, etag="other"), WINDOW, DATA, ENCODER),
    (FOUND, replace(WINDOW, unit="row_groups"), DATA, ENCODER),
    (FOUND, replace(WINDOW, start=49), DATA, ENCODER),
    (FOUND, replace(WINDOW, stop=91), DATA, ENCODER),
    (FOUND, replace(WINDOW, format="csv"), DATA, ENCODER),
    (FOUND, replace(WINDOW, context="a,b"), DATA, ENCODER),
    (FOUND, WINDOW, source(template="qa"), ENCODER),
    (FOUND, WINDOW, source(fields={"prompt": "p"}), ENCODER),
    (FOUND, WINDOW, DATA.model_copy(update={"max_tokens": 100}), ENCODER),
    (FOUND, WINDOW, DATA.model_copy(update={"too_long": "cut"}), ENCODER),
    (FOUND, WINDOW, DataSpec.model_validate({**DATA.model_dump(), "split": {"test": 0.5}}), ENCODER),
    (FOUND, WINDOW, DATA, replace(ENCODER, digest="other")),
]


def test_a_key_follows_all_that_decides_on_the_content() -> None:
    keys = {cache_key(*change) for change in CHANGES}
    assert len(keys) == len(CHANGES)
    assert None not in keys


def test_a_key_follows_nothing_else() -> None:
    moved = (replace(FOUND, source=0), replace(WINDOW, object=9, part=3, size_bytes=1))
    data = source(weight=2.0).model_copy(update={"seed": 5, "max_bad_fraction": 0.5})
    assert cache_key(*moved, data, ENCODER) == cache_key(FOUND, WINDOW, DATA, ENCODER)


class Refusing(FolderStorage):
    """A store that lets nobody write."""

    def __init__(self, root: Path, error: StorageError) -> None:
        super().__init__(root)
        self.error = error
        self.asked: list[tuple[str, bytes | Path]] = []

    def write(self, key: str, data: bytes | Path) -> None:
        self.asked.append((key, data))
        raise self.error


@pytest.mark.parametrize("kind", [StorageDenied, StorageFull])
def test_a_store_that_takes_nothing_is_asked_once(tmp_path: Path, kind: type[StorageError]) -> None:
    store = Refusing(tmp_path, kind("no"))
    for key in ("tokens/a.arrow", "tokens/b.arrow"):
        TokenCache(store).put(key, b"x")
    assert store.asked == [("tokens/a.arrow", b"x")]
    assert TokenCache(open_storage(str(tmp_path))).get("tokens/a.arrow") is None


def test_an_outage_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        TokenCache(Refusing(tmp_path, StorageError("gone"))).put("tokens/a.arrow", b"x")


WRITER = """
import pickle, sys
reader, window = pickle.loads(bytes.fromhex(sys.argv[1]))
content = [reader.read(window) for _ in range(20)][-1]
print(content.hex())
"""


def test_several_processes_write_the_same_entry(tmp_path: Path) -> None:
    reader, window = reader_of(tmp_path)
    argument = pickle.dumps((reader, window)).hex()
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, argument], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    contents = {writer.communicate(timeout=60)[0].strip() for writer in writers}
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    (path,) = cached(tmp_path)
    assert contents == {path.read_bytes().hex()}
