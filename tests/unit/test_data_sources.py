"""Which objects a source names, and their fingerprint."""

from dataclasses import replace
from pathlib import Path

import pytest

from raytune_ft.data.sources import DataObject, fingerprint, glob_pattern, list_objects
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec, SourceSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.json",
        "a.jsonl",
        "deep/c.json",
        "deep/er/d.json",
        "_SUCCESS",
        ".cache/x",
        "deep/.hidden",
        "x[1].csv",
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "data"


def names(*uris: str | Path) -> list[str]:
    data = DataSpec(sources=tuple(SourceSpec(uri=str(uri)) for uri in uris))
    return [f"{found.source}:{Path(found.uri).name}" for found in list_objects(data)]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("b.json", ["0:b.json"]),
        ("", ["0:a.jsonl", "0:b.json", "0:c.json", "0:d.json", "0:x[1].csv"]),
        ("/", ["0:a.jsonl", "0:b.json", "0:c.json", "0:d.json", "0:x[1].csv"]),
        ("deep", ["0:c.json", "0:d.json"]),
        ("*.json", ["0:b.json"]),
        ("*.json*", ["0:a.jsonl", "0:b.json"]),
        ("**/*.json", ["0:b.json", "0:c.json", "0:d.json"]),
        ("*/*.json", ["0:c.json"]),
        ("?.json", ["0:b.json"]),
        ("[ab].json*", ["0:a.jsonl", "0:b.json"]),
        ("[!b].json*", ["0:a.jsonl"]),
        ("x[1].csv", ["0:x[1].csv"]),
        ("deep/**", ["0:.hidden", "0:c.json", "0:d.json"]),
    ],
)
def test_files_folders_and_globs(folder: Path, uri: str, expected: list[str]) -> None:
    assert names(f"{folder}/{uri}".removesuffix("/") if not uri else f"{folder}/{uri}") == expected


def test_file_uri_and_order_of_sources(folder: Path) -> None:
    assert names(f"file://{folder}/deep", folder / "a.jsonl") == ["0:c.json", "0:d.json", "1:a.jsonl"]


@pytest.mark.parametrize("name", ["missing.json", "*.parquet", "missing/"])
def test_nothing_there(folder: Path, name: str) -> None:
    uri = f"{folder}/{name}"
    with pytest.raises(DataError) as raised:
        names(folder / "b.json", uri)
    assert str(raised.value) == f"data.sources[1].uri = {uri}: no such file, and no folder or glob with files"


@pytest.mark.parametrize("glob", ["a.b", "a+b", "(x)", "[", "[]", "a|b", "^$", "[a", "\\d"])
def test_other_characters_of_a_glob_mean_themselves(glob: str) -> None:
    assert glob_pattern(glob).fullmatch(glob)
    assert not glob_pattern(glob).fullmatch("aab")


def test_fingerprint_follows_every_part() -> None:
    first = DataObject(0, "s3://b", "a", 1, "e")
    second = DataObject(0, "s3://b", "c", 2, "f")
    changes = [replace(first, key="b"), replace(first, size_bytes=2), replace(first, etag="g")]
    found = {fingerprint([first, second]), fingerprint([second, first]), fingerprint([first])}
    found |= {fingerprint([changed, second]) for changed in changes}
    assert len(found) == 6
    assert fingerprint([first, second]) == fingerprint([replace(first), replace(second)])
