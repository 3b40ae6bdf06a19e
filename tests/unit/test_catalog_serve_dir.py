"""The folder for servers: what stands there, what is left alone, and that loaders read it."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from stores import Crash, CrashingStorage, InterruptedStorage, adapter_files, draft
from typer.testing import CliRunner

from raytune_ft.catalog import BaseModelRef, Catalog, ServeDirResult, update_serve_dir
from raytune_ft.cli.catalog import app
from raytune_ft.errors import CatalogError
from raytune_ft.methods.lora import add_lora, save_lora
from raytune_ft.spec import LoraSpec
from raytune_ft.storage import Storage, open_storage

JOB = {"data": {"max_tokens": 384}}
CONFIG, WEIGHTS, MARKER = (
    f"capital/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", ".raytune_ft.json")
)


def publish(
    catalog: Catalog, folder: Path, adapter: str, content: bytes = b"weights", **changes: Any
) -> None:
    files = dict(adapter_files(folder / adapter, content=content))
    (folder / adapter / "adapter_config.json").write_text(json.dumps({"r": len(content)}))
    publish_files(catalog, files, adapter, **changes)


def publish_files(catalog: Catalog, files: Mapping[str, Path], adapter: str, **changes: Any) -> None:
    number = catalog.newest_version(adapter) + 1
    told = draft(adapter=adapter, **{"job": JOB, **changes})
    record = catalog.publish(told, files, publish_id=f"{adapter}-{number}")
    catalog.set_alias(adapter, "production", record.version)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog.at(str(tmp_path / "catalog"))
    publish(catalog, tmp_path / "v1", "capital")
    return catalog


def keys(to: Storage) -> list[str]:
    return [found.key for found in to.list()]


def test_is_kept_in_step(catalog: Catalog, storage: Storage, tmp_path: Path) -> None:
    publish(catalog, tmp_path, "sum")
    catalog.set_alias("sum", "candidate", 1)
    found = update_serve_dir(catalog, "production", storage)
    assert found == ServeDirResult(copied=["capital@v1", "sum@v1"])
    assert sorted(keys(storage)) == sorted(
        [CONFIG, WEIGHTS, MARKER, *(k.replace("capital", "sum") for k in (CONFIG, WEIGHTS, MARKER))]
    )
    assert json.loads(storage.read(CONFIG)) == {"r": 7, "max_length": 384}
    assert storage.read(WEIGHTS) == b"weights"

    publish(catalog, tmp_path / "v2", "capital", b"new weights")
    assert update_serve_dir(catalog, "production", storage) == ServeDirResult(
        copied=["capital@v2"], unchanged=["sum@v1"]
    )
    assert (json.loads(storage.read(CONFIG))["r"], storage.read(WEIGHTS)) == (11, b"new weights")
    catalog.set_alias("capital", "production", 1)
    assert update_serve_dir(catalog, "production", storage).copied == ["capital@v1"]
    assert storage.read(WEIGHTS) == b"weights"


def test_what_left_the_alias_goes_and_nothing_else(
    catalog: Catalog, tmp_path: Path, storage: Storage
) -> None:
    update_serve_dir(catalog, "production", storage)
    storage.write("capital/notes.txt", b"mine")
    storage.write("theirs/adapter_config.json", b"{}")
    storage.write("forged/.raytune_ft.json", storage.read(MARKER))
    # Another catalog, in which nothing bears the alias, knows nothing of what this one put there.
    other = Catalog.at(str(tmp_path / "other"))
    publish(other, tmp_path / "o", "sum")
    assert update_serve_dir(other, "stable", storage) == ServeDirResult(
        notes=[f"no adapter of {other.uri} has the alias stable"]
    )
    catalog.storage.delete("adapters/capital/aliases/production/9999999998.json")
    assert update_serve_dir(catalog, "production", storage).removed == ["capital"]
    assert keys(storage) == ["capital/notes.txt", "forged/.raytune_ft.json", "theirs/adapter_config.json"]


def test_an_empty_catalog_removes_nothing(catalog: Catalog, tmp_path: Path, storage: Storage) -> None:
    update_serve_dir(catalog, "production", storage)
    (tmp_path / "catalog").rename(tmp_path / "unmounted")
    with pytest.raises(CatalogError, match=r"holds no adapter; nothing in .* was touched; check the name"):
        update_serve_dir(catalog, "production", storage)
    assert len(keys(storage)) == 3


@pytest.mark.parametrize("marker", [None, b"", b"{}", b"[" * 100_000, b"\xff"])
def test_somebody_elses_folder_is_left_alone(
    catalog: Catalog, tmp_path: Path, storage: Storage, marker: bytes | None
) -> None:
    publish(catalog, tmp_path, "sum")
    storage.write(CONFIG, b"theirs")
    if marker is not None:
        storage.write(MARKER, marker)
    found = update_serve_dir(catalog, "production", storage)
    assert found.copied == ["sum@v1"]
    (problem,) = found.problems
    assert problem == (
        f"{storage.uri}/capital/: holds files and no .raytune_ft.json of this command; nothing there was "
        "touched; remove them or name another folder"
    )
    assert storage.read(CONFIG) == b"theirs"
    assert storage.info(WEIGHTS) is None


def test_another_alias_takes_nothing_over(catalog: Catalog, storage: Storage) -> None:
    update_serve_dir(catalog, "production", storage)
    catalog.set_alias("capital", "candidate", 1)
    (problem,) = update_serve_dir(catalog, "candidate", storage).problems
    assert problem.endswith(
        f"serves capital@production of {catalog.uri}; nothing there was touched; name another folder"
    )


@pytest.mark.parametrize("key", [CONFIG, WEIGHTS])
def test_a_file_that_was_lost_comes_back(catalog: Catalog, storage: Storage, key: str) -> None:
    update_serve_dir(catalog, "production", storage)
    before = storage.read(key)
    storage.delete(key)
    assert update_serve_dir(catalog, "production", storage).copied == ["capital@v1"]
    assert storage.read(key) == before


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("crash_at", [1, 2, 3, 4])
def test_a_crash_shows_no_mixture_and_the_next_call_completes(
    catalog: Catalog, tmp_path: Path, crash_at: int, written: bool
) -> None:
    to = open_storage(str(tmp_path / "to"))
    update_serve_dir(catalog, "production", to)
    publish(catalog, tmp_path / "v2", "capital", b"new weights")
    with pytest.raises(Crash):
        update_serve_dir(catalog, "production", CrashingStorage(to, crash_at, written=written))
    config = to.read_or_none(CONFIG)
    assert config is None or json.loads(config)["r"] == len(to.read(WEIGHTS))
    found = update_serve_dir(catalog, "production", to)
    assert (
        (found.copied, found.unchanged) == (["capital@v2"], [])
        if (crash_at, written) != (4, True)
        else (
            [],
            ["capital@v2"],
        )
    )
    assert (json.loads(to.read(CONFIG))["r"], to.read(WEIGHTS)) == (11, b"new weights")


def test_a_damaged_version_stops_no_other_and_what_stood_there_stays(
    catalog: Catalog, tmp_path: Path
) -> None:
    to = open_storage(str(tmp_path / "to"))
    update_serve_dir(catalog, "production", to)
    publish(catalog, tmp_path / "v2", "capital", b"new weights")
    publish(catalog, tmp_path, "sum")
    (entry,) = (e for e in catalog.resolve("capital").files if e.name.endswith(".safetensors"))
    catalog.storage.write(f"blobs/{entry.sha256}", b"nEw weights")
    found = update_serve_dir(catalog, "production", to)
    assert (found.copied, found.removed, len(found.problems)) == (["sum@v1"], [], 1)
    assert "capital@v2: adapter_model.safetensors" in found.problems[0]
    assert to.read(WEIGHTS) == b"weights"


def forge(catalog: Catalog, tmp_path: Path, content: bytes, **changes: Any) -> None:
    """Put another record, and other weights of the same size, in the place of the version that is there."""
    other = Catalog.at(str(tmp_path / "forger"))
    publish(other, tmp_path / "forged", "capital", content, **changes)
    record = other.resolve("capital")
    for entry in record.files:
        catalog.storage.write(f"blobs/{entry.sha256}", other.storage.read(f"blobs/{entry.sha256}"))
    catalog.storage.write("adapters/capital/versions/9999999998.json", record.to_bytes())


@pytest.mark.parametrize(
    ("content", "changes"), [(b"WEIGHTS", {}), (b"weights", {"job": {"data": {"max_tokens": 512}}})]
)
def test_another_record_under_the_same_number_is_another_version(
    catalog: Catalog, tmp_path: Path, content: bytes, changes: dict[str, Any]
) -> None:
    key = "adapters/capital/versions/9999999998.json"
    true = catalog.storage.read(key)
    forge(catalog, tmp_path, content, **changes)
    to = open_storage(str(tmp_path / "to"))
    update_serve_dir(catalog, "production", to)
    catalog.storage.write(key, true)
    # As whoever asks for signatures from now on.
    assert update_serve_dir(catalog, "production", to).copied == ["capital@v1"]
    assert (to.read(WEIGHTS), json.loads(to.read(CONFIG))["max_length"]) == (b"weights", 384)


def test_a_marker_of_an_older_kind_is_served_anew(catalog: Catalog, tmp_path: Path) -> None:
    to = open_storage(str(tmp_path / "to"))
    update_serve_dir(catalog, "production", to)
    mark = json.loads(to.read(MARKER))
    del mark["record_sha256"]
    to.write(MARKER, json.dumps(mark).encode())
    assert update_serve_dir(catalog, "production", to).copied == ["capital@v1"]
    assert update_serve_dir(catalog, "production", to).unchanged == ["capital@v1"]


def test_what_is_in_step_takes_few_requests(catalog: Catalog, tmp_path: Path) -> None:
    for number in range(20):
        publish(catalog, tmp_path, f"other-{number}")
    catalog.set_alias("capital", "stable", 1)
    to = open_storage(str(tmp_path / "to"))
    update_serve_dir(catalog, "stable", to)
    seen = InterruptedStorage(catalog.storage, -1, lambda: None)
    served = InterruptedStorage(to, -1, lambda: None)
    assert update_serve_dir(Catalog(seen), "stable", served).unchanged == ["capital@v1"]
    # The listing, the alias's last move, the record, and whether it is removed; the listing and the marker.
    assert (seen.requests, served.requests) == (4, 2)


def test_models_are_skipped(catalog: Catalog, tmp_path: Path) -> None:
    publish(catalog, tmp_path, "whole", kind="model")
    publish_files(catalog, {"x.safetensors": tmp_path / "v1/capital/README.md"}, "bare")
    found = update_serve_dir(catalog, "production", open_storage(str(tmp_path / "to")))
    assert found.copied == ["capital@v1"]
    assert found.skipped == [
        "bare@v1: has no adapter_config.json and no adapter_model.safetensors",
        "whole@v1: a whole model; serve it by itself",
    ]


def test_a_tokenizer_beside_the_weights_is_not_served(catalog: Catalog, tmp_path: Path) -> None:
    files = dict(adapter_files(tmp_path / "with"))
    for name in ("tokenizer.json", "generation_config.json"):
        files[name] = tmp_path / "with" / name
        files[name].write_text("{}")
    publish_files(catalog, files, "with")
    to = open_storage(str(tmp_path / "to"))
    assert update_serve_dir(catalog, "production", to).copied == ["capital@v1", "with@v1"]
    served = [key for key in keys(to) if key.startswith("with/")]
    assert sorted(served) == [
        "with/.raytune_ft.json",
        "with/adapter_config.json",
        "with/adapter_model.safetensors",
    ]


@pytest.mark.parametrize("below", ["", "/adapters", "/blobs/x", "/runs/x", "/derived", "/else"])
def test_the_catalogs_own_folders_are_refused(catalog: Catalog, below: str) -> None:
    with pytest.raises(CatalogError, match=r"the catalog keeps its own things there; name another folder$"):
        update_serve_dir(catalog, "production", open_storage(catalog.uri + below))


def test_command(catalog: Catalog, tmp_path: Path) -> None:
    arguments = ["serve-dir", "--catalog", catalog.uri, "--alias", "production", "--to", str(tmp_path / "to")]
    printed = CliRunner().invoke(app, arguments)
    assert printed.stdout == f"{tmp_path}/to is in step with production. copied: capital@v1\n"
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    empty: dict[str, list[str]] = {"copied": [], "removed": [], "skipped": [], "notes": [], "problems": []}
    assert found == {**empty, "unchanged": ["capital@v1"]}
    arguments[4] = "prodution"
    typo = CliRunner().invoke(app, arguments)
    assert (typo.exit_code, typo.stderr) == (
        0,
        f"note: no adapter of {catalog.uri} has the alias prodution\n",
    )
    arguments[4] = "production"
    (tmp_path / "to" / "capital" / ".raytune_ft.json").unlink()
    refused = CliRunner().invoke(app, arguments)
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)


def test_adapters_of_different_tokenizers_are_noted(
    catalog: Catalog, storage: Storage, tmp_path: Path
) -> None:
    """`capital` is of an earlier version, whose records tell no tokenizer."""
    for adapter, base, tokenizer in (
        ("one", "d", "a"), ("same", "d", "a"), ("two", "d", "b"), ("elsewhere", "e", "c"),
    ):  # fmt: skip
        told = BaseModelRef(path="base", digest=base * 64, tokenizer_digest=tokenizer * 64)
        publish(catalog, tmp_path, adapter, base=told)
    for _ in range(2):
        assert update_serve_dir(catalog, "production", storage).notes == [
            "one@v1 and two@v1 were trained on one base with different tokenizers, and a server of that base "
            "has one; train one of them again with the other's"
        ]


def test_peft_loads_it(tmp_path: Path) -> None:
    model, spec = tiny.llama(), LoraSpec(rank=4)
    add_lora(model, spec, seed=0)
    (tmp_path / "files").mkdir()
    save_lora(model, spec, tmp_path / "files", "base")
    catalog = Catalog.at(str(tmp_path / "catalog"))
    files = {file.name: file for file in (tmp_path / "files").iterdir()}
    publish_files(catalog, files, "capital", base=BaseModelRef(path="base", digest="d"))
    update_serve_dir(catalog, "production", open_storage(str(tmp_path / "to")))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['max_length'\]"):
        loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "to" / "capital"))
    names = [name for name, _ in loaded.named_parameters() if "lora_B" in name]
    assert names
    ids = torch.arange(3, 9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.s3
def test_ray_serve_finds_and_fetches_it(
    catalog: Catalog, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = pytest.importorskip(
        "ray.llm._internal.common.utils.lora_utils", reason="ray[llm] is not installed"
    )
    path = f"s3://{bucket}/served"
    update_serve_dir(catalog, "production", open_storage(path))
    assert lora.get_lora_model_ids(path, "tiny") == ["tiny:capital"]
    assert asyncio.run(lora.get_lora_finetuned_context_length(f"{path}/capital")) == 384
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    lora.sync_files_with_lock(f"{path}/capital", str(tmp_path / "fetched"))
    assert (tmp_path / "fetched" / "adapter_model.safetensors").read_bytes() == b"weights"
