"""`raytune-ft catalog`: what it prints, and for programs."""

import json
from pathlib import Path

import pytest
from stores import adapter_files, draft
from typer.testing import CliRunner

from raytune_ft.catalog import BaseModelRef, Catalog
from raytune_ft.cli.catalog import app
from raytune_ft.errors import BadInput, CatalogError


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


@pytest.mark.parametrize(
    "command", [("ls",), ("show", "a"), ("diff", "a@v1", "a"), ("lineage", "a"), ("history", "a", "b")]
)
def test_a_folder_that_is_not_there_is_no_empty_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CatalogError) as caught:
        run(*command, "--catalog", "typo/catalog")
    assert caught.value.exit_code == 2
    assert str(caught.value) == f"{tmp_path}/typo/catalog: no such folder; name one that holds a catalog"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "typo", ["s3:/adapters", "S3://adapters", "s3//adapters", "s3:adapters", "s3:///adapters"]
)
@pytest.mark.parametrize(
    "command",
    [
        ("ls", "--catalog"),
        ("export", "capital", "--catalog", "{catalog}", "--to"),
        ("import", "capital", "--catalog", "{catalog}", "--from"),
        ("serve-dir", "--alias", "candidate", "--catalog", "{catalog}", "--to"),
    ],
)
def test_a_mistyped_uri_is_no_folder(
    catalog: Catalog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    typo: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match=r"is no uri; did you mean s3://adapters\?"):
        run(*(part.format(catalog=catalog.uri) for part in command), typo)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["s3://bucket/folder", "s3:/bucket", "file:///folder"])
@pytest.mark.parametrize("command", [("pull", "capital"), ("report",), ("merge", "capital", "--into-base")])
def test_what_is_written_here_has_no_uri(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        run(*command, "--catalog", catalog.uri, "--to", place)
    assert str(caught.value) == f"{place}: is not on this machine; name a local file or folder"
    assert not (tmp_path / "s3:").exists()


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
    hostile = draft(adapter="hostile", base=BaseModelRef(path="\x1b[2J[red]\u202ex", digest="d\x07"))
    catalog.publish(hostile, adapter_files(tmp_path / "files"), publish_id="hostile")
    for printed in (run("ls", "--catalog", catalog.uri), run("show", "hostile", "--catalog", catalog.uri)):
        assert "\x1b" not in printed
        assert "\x07" not in printed
        assert "\u202e" not in printed
        assert "\\x1b[2J[red]\\u202ex" in printed
