"""The catalog's promises: complete or not there, each publish once, no gap, nothing hostile let through."""

import hashlib
import json
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from stores import (
    CarelessStorage,
    Crash,
    CrashingStorage,
    ForgetfulStorage,
    KeepingStorage,
    adapter_files,
    check_race,
    draft,
    publish_through_crashes,
)

from raytune_ft.catalog import AdapterRecord, BaseModelRef, Catalog, check_alias, model_card
from raytune_ft.errors import CatalogError, StorageError, StorageFull
from raytune_ft.storage import Storage

V1 = "adapters/capital/versions/9999999998.json"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.at(str(tmp_path / "catalog"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return dict(adapter_files(tmp_path / "files"))


def change(storage: Storage, key: str, **fields: Any) -> None:
    """Alter a record, as somebody with access to the store could."""
    storage.write(key, json.dumps({**json.loads(storage.read(key)), **fields}).encode())


def test_what_is_published_is_found_and_pulled(
    catalog: Catalog, files: dict[str, Path], tmp_path: Path
) -> None:
    record = catalog.publish(draft(), files, publish_id="run-1")
    assert (record.reference, record.scores_after) == ("capital@v1", {"exact_match": 0.75})
    assert catalog.resolve("capital") == catalog.resolve("capital@v1") == record
    assert record.uri(catalog.uri) == f"{catalog.uri}/{V1}"
    assert catalog.storage.read(V1) == record.to_bytes()
    assert catalog.pull("capital", tmp_path / "pulled") == record
    pulled = {path.name: path.read_bytes() for path in (tmp_path / "pulled").iterdir()}
    assert pulled == {name: path.read_bytes() for name, path in files.items()}


def test_versions_count_up_and_a_bare_name_means_the_newest(catalog: Catalog, files: dict[str, Path]) -> None:
    for number in range(1, 13):
        assert catalog.publish(draft(steps=number), files, publish_id=f"run-{number}").version == number
    catalog.publish(draft(adapter="other"), files, publish_id="other")
    assert list(catalog.versions("capital")) == list(range(1, 13))
    assert catalog.resolve("capital").steps == 12
    assert catalog.resolve("capital@v3").steps == 3
    assert catalog.newest_versions() == {"capital": 12, "other": 1}
    assert len(list(catalog.storage.list("blobs/"))) == 3


def test_a_repeated_publish_is_the_same_version(catalog: Catalog, files: dict[str, Path]) -> None:
    first = catalog.publish(draft(), files, publish_id="run-1")
    catalog.publish(draft(), files, publish_id="run-2")
    assert catalog.publish(draft(steps=99), files, publish_id="run-1") == first
    assert list(catalog.versions("capital")) == [1, 2]
    expected = f"{catalog.uri}: publish id run-1 stands for adapter capital, not other; use another"
    with pytest.raises(CatalogError) as caught:
        catalog.publish(draft(adapter="other"), files, publish_id="run-1")
    assert str(caught.value) == expected


# The note, three files, the record.
WRITES = 5


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("crash_at", range(1, WRITES + 1))
def test_a_crash_around_each_write_shows_nothing_and_a_retry_completes(
    catalog: Catalog, files: dict[str, Path], tmp_path: Path, crash_at: int, written: bool
) -> None:
    dying = Catalog(CrashingStorage(catalog.storage, crash_at, written=written))
    with pytest.raises(Crash):
        dying.publish(draft(), files, publish_id="run-1")
    visible = [1] if crash_at == WRITES and written else []
    assert list(catalog.versions("capital")) == visible
    assert list(catalog.newest_versions().values()) == visible
    record = catalog.publish(draft(), files, publish_id="run-1")
    assert (record.version, list(catalog.versions("capital"))) == (1, [1])
    assert catalog.pull("capital", tmp_path / "pulled") == record


def test_no_write_goes_without_a_crash(catalog: Catalog, files: dict[str, Path]) -> None:
    counting = CrashingStorage(catalog.storage, crash_at=0, written=False)
    Catalog(counting).publish(draft(), files, publish_id="run-1")
    assert counting.writes == WRITES


def test_lost_answers_publish_once(catalog: Catalog, files: dict[str, Path]) -> None:
    forgetful = Catalog(ForgetfulStorage(catalog.storage))
    forgetful.check()
    assert forgetful.publish(draft(), files, publish_id="run-1").version == 1
    assert forgetful.publish(draft(), files, publish_id="run-2").version == 2
    forgetful.set_alias("capital", "candidate", 2)
    assert list(catalog.versions("capital")) == [1, 2]
    assert len(list(catalog.storage.list("adapters/capital/aliases/candidate/"))) == 1


def test_one_publish_run_twice_at_once_is_one_version(catalog: Catalog, files: dict[str, Path]) -> None:
    for number in range(10):
        barrier = threading.Barrier(4)

        def publish(publish_id: str, barrier: threading.Barrier = barrier) -> int:
            barrier.wait()
            return catalog.publish(draft(), files, publish_id=publish_id).version

        with ThreadPoolExecutor(4) as threads:
            versions = list(
                threads.map(publish, [f"a-{number}", f"a-{number}", f"b-{number}", f"b-{number}"])
            )
        assert versions[0] == versions[1] != versions[2] == versions[3]
    assert list(catalog.versions("capital")) == list(range(1, 21))


def test_sixteen_publishers_at_once(catalog: Catalog, tmp_path: Path) -> None:
    """Four processes of four threads, each dying at random and starting over."""
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as processes:
        work = partial(_four_publishers, catalog.uri, tmp_path / "files")
        published = {
            name: version for part in processes.map(work, range(4)) for name, version in part.items()
        }
    assert len(published) == 48
    check_race(catalog, "capital", published)


def _four_publishers(uri: str, folder: Path, process: int) -> dict[str, int]:
    with ThreadPoolExecutor(4) as threads:
        parts = threads.map(
            lambda thread: publish_through_crashes(uri, 4 * process + thread, 3, folder, "capital"), range(4)
        )
        return {name: version for part in parts for name, version in part.items()}


def test_an_alias_moves(catalog: Catalog, files: dict[str, Path]) -> None:
    for number in range(3):
        catalog.publish(draft(), files, publish_id=f"run-{number}")
    catalog.set_alias("capital", "candidate", 2)
    catalog.set_alias("capital", "production", 1)
    assert catalog.aliases("capital") == {"candidate": 2, "production": 1}
    assert catalog.resolve("capital@candidate").version == 2
    catalog.set_alias("capital", "candidate", 1, forward_only=True)
    assert catalog.resolve("capital@candidate").version == 2
    catalog.set_alias("capital", "candidate", 3, forward_only=True)
    catalog.set_alias("capital", "candidate", 3)
    catalog.set_alias("capital", "candidate", 1)
    assert catalog.resolve("capital@candidate").version == 1
    assert len(list(catalog.storage.list("adapters/capital/aliases/candidate/"))) == 3


def test_many_move_an_alias_at_once(catalog: Catalog, files: dict[str, Path]) -> None:
    for number in range(8):
        catalog.publish(draft(), files, publish_id=f"run-{number}")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda v: catalog.set_alias("capital", "new", v, forward_only=True), range(1, 9)))
    assert catalog.aliases("capital") == {"new": 8}


def test_names_that_are_not_there(catalog: Catalog, files: dict[str, Path]) -> None:
    def message(reference: str) -> str:
        with pytest.raises(CatalogError) as caught:
            catalog.resolve(reference)
        return str(caught.value)

    assert message("capital") == f"{catalog.uri}: no adapter capital; it holds none"
    for number in range(12):
        catalog.publish(draft(), files, publish_id=f"run-{number}")
    catalog.set_alias("capital", "candidate", 1)
    assert message("capitol") == f"{catalog.uri}: no adapter capitol; did you mean capital?"
    assert message("x") == f"{catalog.uri}: no adapter x; it holds capital"
    assert message("capital@v13") == (
        f"{catalog.uri}: capital has no version v13; it has v12, v11, v10, v9, v8, v7, v6, v5, "
        "v4, v3 and 2 more"
    )
    assert message("capital@v0").startswith(f"{catalog.uri}: capital has no version v0; it has v12")
    assert message("capital@best") == f"{catalog.uri}: capital has no alias best; it has candidate"
    with pytest.raises(CatalogError, match=r"has no version v13"):
        catalog.set_alias("capital", "candidate", 13)


HOSTILE = [
    *("", "@", "a@", "@v1", "../a", "a/b", "a\n", "a@v1\n", "a@../b", "A", "a b", "é", "a@V1", "a\0", "*"),
    *("a" * 64, "a@" + "a" * 64),
]


@pytest.mark.parametrize("reference", HOSTILE)
def test_hostile_references(catalog: Catalog, reference: str) -> None:
    with pytest.raises(CatalogError, match=r"not a reference; write NAME, NAME@v3 or NAME@ALIAS$"):
        catalog.resolve(reference)


@pytest.mark.parametrize("alias", ["", "v1", "v0", "../x", "a/b", "a\n", "A", "-a", "x" * 64])
def test_hostile_aliases(catalog: Catalog, files: dict[str, Path], alias: str) -> None:
    catalog.publish(draft(), files, publish_id="run-1")
    with pytest.raises(CatalogError, match=r"^alias .*must be 1 to 63 of"):
        catalog.set_alias("capital", alias, 1)
    with pytest.raises(CatalogError):
        check_alias(alias)
    assert list(catalog.storage.list("adapters/capital/aliases/")) == []


@pytest.mark.parametrize("publish_id", ["", "../x", "a/b", "a\n", ".a", "x" * 129])
def test_hostile_publish_ids(catalog: Catalog, files: dict[str, Path], publish_id: str) -> None:
    with pytest.raises(ValueError, match=r"^publish_id "):
        catalog.publish(draft(), files, publish_id=publish_id)


HOSTILE_FILES = [
    *("../x.json", "/x.json", "a/../x.json", "a/b/c.json", ".x.json", "x.json\n", "a//x.json", "x\\y.json"),
    *("adapter_model.bin", "x.pt", "x.pkl", "x.pickle", "x.py", "x.safetensors.exe", "x", "", "é.json"),
    *("a" * 129 + ".json", "x.json "),
]


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_file_names_are_not_published(catalog: Catalog, files: dict[str, Path], name: str) -> None:
    with pytest.raises(CatalogError, match=r"^capital: the file name .* must (be|end) "):
        catalog.publish(draft(), {**files, name: files["README.md"]}, publish_id="run-1")
    assert list(catalog.storage.list()) == []


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_file_names_are_not_pulled(
    catalog: Catalog, files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    record = catalog.publish(draft(), files, publish_id="run-1")
    entries = [entry.model_dump() for entry in record.files]
    change(catalog.storage, V1, files=[*entries, {**entries[0], "name": name}])
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(
        CatalogError, match=r"not a record of this catalog: files\.3\.name: .*altered or damaged$"
    ):
        catalog.pull("capital", tmp_path / "pulled")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2},
        {"adapter": "other"},
        {"schema_version": 2},
        {"schema_version": "1"},
        {"extra": 1},
        {"steps": "10"},
        {"steps": -1},
        {"loss": "NaN"},
        {"files": []},
        {"files": [{"name": "a.json", "sha256": "../../etc/passwd", "size_bytes": 1}]},
        {"files": [{"name": "a.json", "sha256": "A" * 64, "size_bytes": 1}]},
        {"files": [{"name": name, "sha256": "a" * 64, "size_bytes": 1} for name in ("a.json", "A.json")]},
        {
            "files": [
                {"name": name, "sha256": "a" * 64, "size_bytes": 1} for name in ("a.json", "a.json/b.md")
            ]
        },
        {"created_at": "yesterday"},
    ],
)
def test_altered_records_are_refused(
    catalog: Catalog, files: dict[str, Path], fields: dict[str, Any]
) -> None:
    catalog.publish(draft(), files, publish_id="run-1")
    change(catalog.storage, V1, **fields)
    with pytest.raises(CatalogError, match=f"^{catalog.uri}/{V1}: "):
        catalog.resolve("capital")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (17 << 20)])
def test_a_damaged_record_stops_its_readers_but_no_publisher(
    catalog: Catalog, files: dict[str, Path], content: bytes
) -> None:
    catalog.publish(draft(), files, publish_id="run-1")
    catalog.storage.write("adapters/capital/versions/9999999997.json", content)
    with pytest.raises(CatalogError, match=r"9999999997\.json: "):
        catalog.resolve("capital")
    if len(content) < 1 << 20:
        assert catalog.publish(draft(), files, publish_id="run-3").version == 3
        assert catalog.resolve("capital").version == 3
    assert catalog.resolve("capital@v1").version == 1


def test_foreign_objects_are_not_versions(catalog: Catalog, files: dict[str, Path]) -> None:
    for key in ("!first.json", "0000000000.txt", "0000000000/x.json", "000.json", "sub/0000000001.json"):
        catalog.storage.write(f"adapters/capital/versions/{key}", b"{}")
    catalog.storage.write("adapters/Bad Name/versions/9999999998.json", b"{}")
    assert catalog.publish(draft(), files, publish_id="run-1").version == 1
    assert list(catalog.versions("capital")) == [1]
    assert catalog.newest_versions() == {"capital": 1}


def test_altered_content_is_not_pulled(catalog: Catalog, files: dict[str, Path], tmp_path: Path) -> None:
    record = catalog.publish(draft(), files, publish_id="run-1")
    weights = next(entry for entry in record.files if entry.name == "adapter_model.safetensors")
    for content in (b"wEights", b"weights and more" * 1000, b"we"):
        catalog.storage.write(f"blobs/{weights.sha256}", content)
        with pytest.raises(
            CatalogError, match=r"^capital@v1: adapter_model\.safetensors .*is not what was published"
        ):
            catalog.pull("capital", tmp_path / "pulled")
    catalog.storage.delete(f"blobs/{weights.sha256}")
    with pytest.raises(CatalogError, match=r"^capital@v1: adapter_model\.safetensors .*is gone; publish"):
        catalog.pull("capital", tmp_path / "pulled")
    assert sorted(os.listdir(tmp_path)) == ["catalog", "files"]


@pytest.mark.parametrize("content", [b"wEights", b"we"])
def test_publishing_again_repairs_content(
    catalog: Catalog, files: dict[str, Path], tmp_path: Path, content: bytes
) -> None:
    record = catalog.publish(draft(), files, publish_id="run-1")
    weights = next(entry for entry in record.files if entry.name == "adapter_model.safetensors")
    catalog.storage.write(f"blobs/{weights.sha256}", content)
    catalog.publish(draft(), files, publish_id="run-2")
    catalog.pull("capital@v1", tmp_path / "pulled")


def test_content_that_is_there_is_not_sent_again(catalog: Catalog, files: dict[str, Path]) -> None:
    catalog.publish(draft(), files, publish_id="run-1")
    counting = CrashingStorage(catalog.storage, crash_at=0, written=False)
    Catalog(counting).publish(draft(), files, publish_id="run-2")
    assert counting.writes == WRITES - len(files)


def test_large_content_is_told_by_its_size(
    catalog: Catalog, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.catalog.contents.READ_BACK_BYTES", len(b"weights") - 1)
    record = catalog.publish(draft(), files, publish_id="run-1")
    weights = next(entry for entry in record.files if entry.name == "adapter_model.safetensors")
    catalog.storage.write(f"blobs/{weights.sha256}", b"wEights")
    catalog.publish(draft(), files, publish_id="run-2")
    assert catalog.storage.read(f"blobs/{weights.sha256}") == b"wEights"


def test_a_pull_replaces_nothing(catalog: Catalog, files: dict[str, Path], tmp_path: Path) -> None:
    catalog.publish(draft(), files, publish_id="run-1")
    (tmp_path / "empty").mkdir()
    catalog.pull("capital", tmp_path / "empty")
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(CatalogError, match=rf"^{target}: is there already; name a new or empty folder$"):
            catalog.pull("capital", target)


def test_a_model_with_a_folder_in_it(catalog: Catalog, files: dict[str, Path], tmp_path: Path) -> None:
    names = {
        "model.safetensors": files["README.md"],
        "additional_chat_templates/tool.jinja": files["README.md"],
    }
    catalog.publish(draft(kind="model", method={"kind": "full"}), names, publish_id="run-1")
    catalog.pull("capital", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "additional_chat_templates" / "tool.jinja").read_bytes() == b"# capital\n"


def test_nothing_to_publish(catalog: Catalog, files: dict[str, Path]) -> None:
    with pytest.raises(CatalogError) as caught:
        catalog.publish(draft(), {"README.md": files["README.md"]}, publish_id="run-1")
    assert str(caught.value) == "capital: no .safetensors file among ['README.md']; nothing to publish"


def test_a_store_that_ignores_the_condition_is_refused(catalog: Catalog) -> None:
    catalog.check()
    with pytest.raises(StorageError) as caught:
        Catalog(CarelessStorage(catalog.storage)).check()
    assert str(caught.value) == (
        f"{catalog.uri}: this store ignores If-None-Match: two publishers could overwrite each other's "
        "versions; use one with conditional writes (AWS S3, Ceph, MinIO, Cloudflare R2) or a folder"
    )


def test_a_store_that_keeps_everything_is_good_enough(catalog: Catalog, files: dict[str, Path]) -> None:
    keeping = Catalog(KeepingStorage(catalog.storage))
    keeping.check()
    assert keeping.publish(draft(), files, publish_id="run-1").version == 1


@pytest.fixture
def large_files(tmp_path: Path) -> dict[str, Path]:
    return dict(adapter_files(tmp_path / "large", content=b"x" * ((1 << 20) + 1)))


def test_a_full_disk_while_publishing_shows_nothing(
    large_files: dict[str, Path], files: dict[str, Path], small_disk: Path
) -> None:
    catalog = Catalog.at(str(small_disk))
    catalog.check()
    with pytest.raises(StorageFull) as caught:
        catalog.publish(draft(), large_files, publish_id="run-1")
    sha256 = hashlib.sha256(b"x" * ((1 << 20) + 1)).hexdigest()
    assert str(caught.value) == (
        f"{small_disk}/blobs/{sha256}: the disk is full: 1,048,577 bytes were not written; "
        "nothing of it is visible; free space and run again"
    )
    assert catalog.newest_versions() == {}
    assert catalog.storage.info(f"blobs/{sha256}") is None
    assert catalog.publish(draft(), files, publish_id="run-1").version == 1


def test_numbers_that_are_none_are_not_recorded() -> None:
    for fields in (
        {"loss": float("nan")},
        {"scores_after": {"bleu": float("inf")}},
        {"steps": 1.5},
        {"adapter": "A"},
    ):
        with pytest.raises(ValidationError):
            draft(**fields)


def test_a_record_survives_being_written(catalog: Catalog, files: dict[str, Path]) -> None:
    record = catalog.publish(draft(loss=1, scores_before=None), files, publish_id="run-1")
    assert AdapterRecord.model_validate_json(record.to_bytes()) == record


def test_the_card_says_what_it_is() -> None:
    card = model_card(draft())
    assert "| exact_match | 0 | 0.75 | - |" in card
    assert 'PeftModel.from_pretrained(base, "./capital")' in card
    assert "Scores" not in model_card(draft(scores_before=None, scores_after=None))
    assert 'AutoModelForCausalLM.from_pretrained("./capital")' in model_card(draft(kind="model"))


def test_the_card_says_on_what_the_scores_were_measured() -> None:
    card = model_card(draft(scored_examples={"exact_match": 40}, notices=("3 of 40 references are cut",)))
    assert "| exact_match | 0 | 0.75 | 40 |" in card
    assert "\n\n3 of 40 references are cut.\n" in card


def test_the_card_tells_how_to_end_answers_where_the_files_say_it() -> None:
    line = 'model.generation_config = GenerationConfig.from_pretrained("./capital")'
    assert line in model_card(draft(), says_how_to_generate=True)
    assert line not in model_card(draft())
    # Whoever loads a model reads it there without being told.
    assert line not in model_card(draft(kind="model"), says_how_to_generate=True)


def test_nothing_breaks_out_of_the_card() -> None:
    path = 'x"\n---\n`|\x1b[2J'
    card = model_card(draft(base=BaseModelRef(path=path, digest="d")))
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"base_model": path, "library_name": "peft", "tags": ["raytune-ft", "lora"]}
    assert all(letter.isprintable() or letter == "\n" for letter in card)
    assert "| Base | `x\"�---�'\\|�[2J` |" in card
