"""Folders as people have them: saved datasets, clones of Hub repositories, splits side by side."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from raytune_ft.data.folders import Split, must_choose, sort_out, split_of, splits
from raytune_ft.data.formats import RawRecord, read_records
from raytune_ft.data.sources import SourceListing, list_source
from raytune_ft.errors import DataError


def rows(split: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{split} {number}", "completion": "x"} for number in range(3)]


def save_dataset(folder: Path, split: str) -> Path:
    """What `datasets.Dataset.save_to_disk` writes: an Arrow stream and two files that describe it."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows(split))
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (folder / "data-00000-of-00001.arrow").write_bytes(sink.getvalue())
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "281cb9bd08be8d90",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    features = {name: {"dtype": "string", "_type": "Value"} for name in ("prompt", "completion")}
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "features": features}, indent=2))
    return folder


def save_dataset_dict(folder: Path, *names: str) -> Path:
    for name in names:
        save_dataset(folder / name, name)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": names}))
    return folder


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(rows(name)[0]))
    return folder


def records(listing: SourceListing) -> list[Any]:
    found: list[Any] = []
    for each in listing.objects:
        with Path(each.uri).open("rb") as stream:
            found += [
                record.value for record in read_records(stream, each.uri) if isinstance(record, RawRecord)
            ]
    return found


def files(uri: str | Path) -> list[str]:
    return [Path(found.uri).name for found in list_source(str(uri)).objects]


def refusal(uri: Path) -> str:
    with pytest.raises(DataError) as raised:
        list_source(str(uri))
    return str(raised.value)


def test_saved_dataset_has_its_rows_alone(tmp_path: Path) -> None:
    listing = list_source(str(save_dataset(tmp_path / "saved", "train")))
    assert records(listing) == rows("train")
    assert listing.skipped == ("dataset_info.json", "state.json")


def test_saved_dataset_dict_names_its_split(tmp_path: Path) -> None:
    saved = save_dataset_dict(tmp_path / "saved", "test", "train", "validation")
    assert refusal(saved) == (
        f"{saved}: holds the splits test, train, validation; name the one that is meant, as in "
        f"uri: {saved}/train, or take the files of several by a glob"
    )
    assert records(list_source(f"{saved}/train")) == rows("train")
    assert records(list_source(f"{saved}/test/")) == rows("test")
    several = list_source(f"{saved}/t*/*.arrow")
    assert records(several) == rows("test") + rows("train")
    assert several.skipped == ()


def test_saved_dataset_dict_of_one_split_or_of_other_names(tmp_path: Path) -> None:
    assert records(list_source(str(save_dataset_dict(tmp_path / "one", "train")))) == rows("train")
    others = save_dataset_dict(tmp_path / "two", "easy", "hard")
    assert "holds the splits easy, hard; " in refusal(others)
    assert records(list_source(f"{others}/hard")) == rows("hard")


def test_what_was_computed_of_a_saved_dataset_is_no_data(tmp_path: Path) -> None:
    saved = save_dataset(tmp_path / "saved", "train")
    (saved / "cache-0123456789abcdef.arrow").write_bytes(b"of another form")
    assert files(saved) == ["data-00000-of-00001.arrow"]


def test_clone_of_a_hub_repository(tmp_path: Path) -> None:
    clone = touch(tmp_path / "clone", "README.md", "LICENSE", ".gitattributes", ".git/HEAD", ".git/config")
    touch(clone, "assets/plot.png", "convert.py")
    data = clone / "data"
    data.mkdir()
    for split, shard in (("test", "0-of-00001"), ("train", "0-of-00002"), ("train", "1-of-00002")):
        parquet.write_table(pa.Table.from_pylist(rows(split)), data / f"{split}-0000{shard}.parquet")
    assert "holds the splits test, train; " in refusal(clone)
    assert files(clone / "train") == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert files(f"{data}/train") == files(clone / "train")
    (data / "test-00000-of-00001.parquet").unlink()
    listing = list_source(str(clone))
    assert len(listing.objects) == 2
    assert set(listing.skipped) == {
        *(".git/", ".gitattributes", "LICENSE", "README.md"),
        *("assets/plot.png", "convert.py"),
    }


def test_splits_side_by_side(tmp_path: Path) -> None:
    folder = touch(tmp_path / "data", "train.jsonl", "test.jsonl", "validation.jsonl")
    assert "holds the splits test, train, validation; " in refusal(folder)
    assert files(folder / "train") == ["train.jsonl"]
    assert files(f"{folder}/*.jsonl") == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    assert files(folder / "test.jsonl") == ["test.jsonl"]


@pytest.mark.parametrize(
    "names",
    [
        ["news.json", "sums.json"],
        ["train.jsonl"],
        ["test.jsonl"],
        ["extra.jsonl", "train.jsonl"],
        ["train-1.jsonl", "train-2.jsonl"],
        ["load_test.json", "unit_test.json"],
        ["contest.json", "latest.json", "restrain.json", "task1_test_of_wits.json"],
        ["licenses.json", "readme_texts.jsonl", "state.json", "notice.json"],
    ],
)
def test_folder_of_ordinary_names_is_read_as_a_whole(tmp_path: Path, names: list[str]) -> None:
    listing = list_source(str(touch(tmp_path / "data", *names)))
    assert [Path(found.uri).name for found in listing.objects] == sorted(names)
    assert listing.skipped == ()


def test_folder_without_records(tmp_path: Path) -> None:
    folder = touch(tmp_path / "clone", "README.md", "LICENSE.txt")
    assert refusal(folder) == (
        f"{folder}: no data: by their names these hold no records: LICENSE.txt, README.md"
    )


def test_name_of_a_split_that_is_not_there(tmp_path: Path) -> None:
    folder = touch(tmp_path / "data", "train.jsonl", "other.jsonl")
    assert refusal(folder / "test") == f"{folder}/test: no such file, and no folder or glob with files"
    assert refusal(folder / "other") == f"{folder}/other: no such file, and no folder or glob with files"


def test_id_of_the_hub_gets_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "; for the data set of the Hub write uri: hf://openai/gsm8k"
    assert refusal(tmp_path / "openai/gsm8k").endswith(hint)
    (tmp_path / "openai").mkdir()
    assert not refusal(tmp_path / "openai/gsm8k").endswith(hint)


@pytest.mark.parametrize(
    ("key", "name", "kind"),
    [
        ("train.jsonl", "train", "train"),
        ("TRAIN.JSONL.gz", "TRAIN", "train"),
        ("data/train-00000-of-00002-a09b74b3ef9c3b56.parquet", "train", "train"),
        ("en/c4-train.00000-of-01024.json.gz", "c4-train", "train"),
        ("train_3.json", "train", "train"),
        ("data/test_sft-00000-of-00001.parquet", "test_sft", "test"),
        ("gsm8k.dev.json", "gsm8k.dev", "validation"),
        ("eval/tasks/a.json", "eval", "test"),
        ("val/train.json", "val", "validation"),
    ],
)
def test_split_of_a_name(key: str, name: str, kind: str) -> None:
    assert split_of(key) == Split(name, kind)


def test_splits_of_a_saved_dict_below_the_folder() -> None:
    keys = ["x/dataset_dict.json", "x/easy/a.arrow", "x/hard/a.arrow", "y/easy/a.arrow"]
    data = sort_out(keys).data
    assert data == ("x/easy/a.arrow", "x/hard/a.arrow", "y/easy/a.arrow")
    found = splits(data, keys)
    assert {split.name: keys for split, keys in found.items()} == {
        "easy": ["x/easy/a.arrow"],
        "hard": ["x/hard/a.arrow"],
    }
    assert must_choose(found)
