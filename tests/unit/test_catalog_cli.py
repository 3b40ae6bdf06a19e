"""`raytune-ft catalog`: what it prints, and for programs."""

import json
from pathlib import Path

import pytest
from stores import adapter_files, draft
from typer.testing import CliRunner

from raytune_ft.catalog import BaseModelRef, Catalog
from raytune_ft.cli.catalog import app
from raytune_ft.errors import CatalogError


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog.at(str(tmp_path / "catalog"))
    files = adapter_files(tmp_path / "files")
    for number in range(2):
        catalog.publish(draft(), files, publish_id=f"run-{number}")
    catalog.set_alias("capital", "candidate", 1)
    return catalog


def run(*arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", **environment})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_ls(catalog: Catalog) -> None:
    table = run("ls", "--catalog", catalog.uri)
    for part in ("capital", "v2", "candidate → v1", "s3://models/tiny", "exact_match 0.75"):
        assert part in table
    (entry,) = json.loads(run("ls", "--json", RAYTUNE_CATALOG=catalog.uri))
    assert (entry["adapter"], entry["version"], entry["aliases"]) == ("capital", 2, {"candidate": 1})
    assert entry["uri"] == f"{catalog.uri}/adapters/capital/versions/9999999997.json"


def test_an_empty_catalog(tmp_path: Path) -> None:
    assert "holds no adapter yet" in run("ls", "--catalog", str(tmp_path))
    assert json.loads(run("ls", "--catalog", str(tmp_path), "--json")) == []


def test_show(catalog: Catalog) -> None:
    shown = run("show", "capital@candidate", "--catalog", catalog.uri)
    assert "capital@v1 (adapter)" in shown
    assert "adapter_model.safetensors  7 bytes" in shown
    record = json.loads(run("show", "capital", "--catalog", catalog.uri, "--json"))
    assert (record["version"], record["base"]["path"]) == (2, "s3://models/tiny")
    assert len(record["files"]) == 3


def test_show_says_on_what_the_scores_were_measured(catalog: Catalog, tmp_path: Path) -> None:
    made = draft(
        adapter="made",
        scores_after={"exact_match": 0.75, "bleu": 20.0, "token_loss": 0.5},
        scored_examples={"exact_match": 40, "bleu": 40, "token_loss": 1200},
        max_new_tokens={"test split": 32},
        notices=("3 of 40 references are [cut]",),
    )
    catalog.publish(made, adapter_files(tmp_path / "made"), publish_id="made")
    lines = [" ".join(line.split()) for line in run("show", "made", "--catalog", catalog.uri).splitlines()]
    told = "exact_match 0.75, bleu 20 (of 40), token_loss 0.5 (of 1,200)"
    assert {f"scores after {told}", "notices 3 of 40 references are [cut]"} <= set(lines)
    assert "exact_match 0.75, bleu 20 (of 40)" in run("ls", "--catalog", catalog.uri)
    shown = json.loads(run("show", "made", "--catalog", catalog.uri, "--json"))
    assert shown["scored_examples"] == {"exact_match": 40, "bleu": 40, "token_loss": 1200}
    assert shown["max_new_tokens"] == {"test split": 32}


def test_the_uri_is_one_that_others_can_use(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(catalog.uri).parent)
    for command in (["ls"], ["show", "capital"]):
        found = json.loads(run(*command, "--catalog", "catalog", "--json"))
        entry = found[0] if isinstance(found, list) else found
        assert entry["uri"] == f"{catalog.uri}/adapters/capital/versions/9999999997.json"


def test_show_says_what_a_version_was_made_from(catalog: Catalog, tmp_path: Path) -> None:
    made = draft(adapter="made", parent="capital@v1", merged_from=("capital@v2", "other@v7"))
    catalog.publish(made, adapter_files(tmp_path / "made"), publish_id="made")
    lines = [" ".join(line.split()) for line in run("show", "made", "--catalog", catalog.uri).splitlines()]
    assert {"continues capital@v1", "merged from capital@v2, other@v7"} <= set(lines)


def test_pull(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run("pull", "capital@v1", "--catalog", catalog.uri)
        == "capital@v1 is in capital (3 files, 19 bytes)\n"
    )
    assert (tmp_path / "capital" / "adapter_model.safetensors").read_bytes() == b"weights"
    pulled = json.loads(run("pull", "capital", "--catalog", catalog.uri, "--to", "other", "--json"))
    assert pulled == {"adapter": "capital", "version": 2, "to": str(tmp_path / "other")}
    with pytest.raises(CatalogError, match="is there already"):
        run("pull", "capital", "--catalog", catalog.uri)


@pytest.mark.parametrize("reference", ["../../etc", "/tmp", ""])
def test_a_hostile_reference_names_no_folder(catalog: Catalog, reference: str) -> None:
    with pytest.raises(CatalogError, match="not a reference"):
        run("pull", reference, "--catalog", catalog.uri)


def test_a_record_cannot_command_the_terminal(catalog: Catalog, tmp_path: Path) -> None:
    hostile = draft(adapter="hostile", base=BaseModelRef(path="\x1b[2J[red]x", digest="d\x07"))
    catalog.publish(hostile, adapter_files(tmp_path / "files"), publish_id="hostile")
    for printed in (run("ls", "--catalog", catalog.uri), run("show", "hostile", "--catalog", catalog.uri)):
        assert "\x1b" not in printed
        assert "\x07" not in printed
        assert "[2J[red]x" in printed
