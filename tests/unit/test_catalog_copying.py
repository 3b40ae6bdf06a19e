"""A copy is the same version in another catalog: once, checked, and without a trace of what was refused."""

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from signing_keys import private_pem
from stores import Crash, CrashingStorage, adapter_files, draft
from typer.testing import CliRunner

import raytune_ft.cli.catalog.copy
from raytune_ft.catalog import (
    AdapterRecord,
    Catalog,
    Copy,
    Signer,
    Trust,
    copy_all_versions,
    copy_version,
    fingerprint,
    roll_back,
    verify,
)
from raytune_ft.catalog.lineage import lineage_of
from raytune_ft.catalog.removal import remove_version
from raytune_ft.errors import BadInput, CatalogError
from raytune_ft.storage import Storage

V1 = "adapters/capital/versions/9999999998.json"
# The note, three files, the record; and the probe of conditional writes before them.
PROBE_WRITES = 2
WRITES = 5
PEMS = [private_pem(Ed25519PrivateKey.from_private_bytes(bytes([byte]) * 32)) for byte in (1, 2)]
SIGNER, OTHER = (Signer.from_pem(pem, "test") for pem in PEMS)


def weights(content: bytes) -> bytes:
    """A sound safetensors file."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}})
    return struct.pack("<Q", len(header)) + header.encode() + content


def publish(catalog: Catalog, folder: Path, name: str, **options: Any) -> AdapterRecord:
    """A version whose content is its publish id."""
    files = adapter_files(folder / name, content=weights(name.encode()))
    said = {key: options.pop(key) for key in ("parent", "adapter") if key in options}
    return catalog.publish(draft(**said), files, publish_id=name, **options)


@pytest.fixture
def source(tmp_path: Path) -> Catalog:
    """Three versions, each from the one before; `best` means the second."""
    catalog = Catalog.at(str(tmp_path / "source"))
    publish(catalog, tmp_path, "run-1")
    publish(catalog, tmp_path, "run-2", parent="capital@v1")
    publish(catalog, tmp_path, "run-3", parent="capital@v2")
    catalog.set_alias("capital", "best", 2)
    return catalog


@pytest.fixture
def target(storage: Storage) -> Catalog:
    return Catalog(storage)


@pytest.fixture
def local(tmp_path: Path) -> Catalog:
    return Catalog.at(str(tmp_path / "target"))


def contents(catalog: Catalog, reference: str, folder: Path) -> dict[str, bytes]:
    catalog.pull(reference, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def references(copies: Sequence[Copy]) -> list[tuple[str, str]]:
    return [(copy.original.reference, copy.copied.reference) for copy in copies]


def nothing_there(catalog: Catalog) -> bool:
    return not list(catalog.storage.list())


class TestOneVersion:
    def test_there_and_back(self, source: Catalog, target: Catalog, tmp_path: Path) -> None:
        copy = copy_version(source, target, "capital@best", alias="production")
        assert (copy.original.version, copy.copied.version) == (2, 1)
        assert target.resolve("capital@production") == copy.copied
        assert contents(target, "capital", tmp_path / "a") == contents(source, "capital@v2", tmp_path / "b")
        origin = copy.copied.origin
        assert origin is not None
        assert (origin.catalog, origin.reference) == (source.uri, "capital@v2")
        assert origin.created_at == copy.original.created_at
        own = {"version", "created_at", "origin"}
        assert copy.copied.model_dump(exclude=own) == copy.original.model_dump(exclude=own)
        assert not verify(target).problems
        # Home again it is what it was, and nothing new.
        home = copy_version(target, source, "capital@production")
        assert home.copied == copy.original
        assert list(source.versions("capital")) == [1, 2, 3]

    def test_again_it_is_the_same(self, source: Catalog, target: Catalog) -> None:
        first = copy_version(source, target, "capital")
        before = list(target.storage.list())
        assert copy_version(source, target, "capital") == first
        assert list(target.storage.list()) == before

    def test_again_nothing_is_fetched(self, source: Catalog, local: Catalog) -> None:
        first = copy_version(source, local, "capital")
        for entry in first.original.files:
            source.storage.delete(f"blobs/{entry.sha256}")
        assert copy_version(source, local, "capital") == first

    def test_it_becomes_the_next_version(self, source: Catalog, local: Catalog, tmp_path: Path) -> None:
        publish(local, tmp_path, "their-own")
        assert copy_version(source, local, "capital@v3").copied.version == 2

    def test_a_copy_of_a_copy_tells_the_first_catalog(
        self, source: Catalog, local: Catalog, tmp_path: Path
    ) -> None:
        copy_version(source, local, "capital@v2")
        third = Catalog.at(str(tmp_path / "third"))
        copied = copy_version(local, third, "capital@v1").copied
        assert copied.origin is not None
        assert (copied.origin.catalog, copied.origin.reference) == (source.uri, "capital@v2")

    def test_again_no_alias_moves_back(self, source: Catalog, local: Catalog) -> None:
        for name in ("v1", "v2", "v1"):
            copy_version(source, local, f"capital@{name}", alias="production")
        assert local.aliases("capital") == {"production": 2}
        roll_back(local, "capital", "production")
        copy_version(source, local, "capital@v2", alias="production")
        assert local.aliases("capital") == {"production": 1}


class TestAllVersions:
    def test_numbers_and_parents_stay(self, source: Catalog, target: Catalog) -> None:
        copies = copy_all_versions(source, target, "capital", alias="production")
        assert references(copies) == [(f"capital@v{n}", f"capital@v{n}") for n in (1, 2, 3)]
        assert [copy.copied.parent for copy in copies] == [None, "capital@v1", "capital@v2"]
        assert target.aliases("capital") == {"production": 3}
        assert not verify(target).problems

    def test_a_lineage_is_that_of_the_copies(self, source: Catalog, local: Catalog) -> None:
        copy_all_versions(source, local, "capital")
        found = lineage_of(local, "capital")
        assert ([ancestor.record.version for ancestor in found.chain], found.broken) == ([3, 2, 1], None)

    def test_a_lineage_takes_no_other_version_of_the_name(
        self, source: Catalog, local: Catalog, tmp_path: Path
    ) -> None:
        publish(local, tmp_path, "own-1")
        copy_version(source, local, "capital@v2")
        found = lineage_of(local, "capital")
        assert len(found.chain) == 1
        assert found.broken == f"capital@v1: of {source.uri}; look there"

    def test_what_is_there_already_is_not_copied_twice(self, source: Catalog, local: Catalog) -> None:
        copy_version(source, local, "capital@v2")
        copies = copy_all_versions(source, local, "capital")
        assert [copy.copied.version for copy in copies] == [2, 1, 3]

    @pytest.mark.parametrize("adapter", ["capital@v1", "", "../x"])
    def test_a_reference_is_no_adapter(self, source: Catalog, local: Catalog, adapter: str) -> None:
        with pytest.raises(
            CatalogError, match=r"not an adapter's name; all versions are asked for: write NAME$"
        ):
            copy_all_versions(source, local, adapter)

    def test_one_bad_signature_and_none_is_copied(
        self, source: Catalog, local: Catalog, tmp_path: Path
    ) -> None:
        publish(source, tmp_path, "run-4", signer=SIGNER)
        key = "adapters/capital/versions/9999999995.json"
        said = json.loads(source.storage.read(key))
        source.storage.write(key, json.dumps({**said, "steps": 11}).encode())
        with pytest.raises(CatalogError, match=r"^capital@v4: its signature is not one of this record"):
            copy_all_versions(source, local, "capital")
        assert nothing_there(local)


class TestRefused:
    """Nothing of these is visible in the target, and nothing is left on the disk."""

    @pytest.fixture(autouse=True)
    def _temporary_folder_is_left_empty(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        yield
        assert not list((tmp_path / "tmp").iterdir())

    def test_into_itself(self, source: Catalog) -> None:
        before = list(source.storage.list())
        with pytest.raises(CatalogError) as caught:
            copy_version(source, Catalog.at(f"file://{source.uri}/"), "capital")
        assert str(caught.value) == f"{source.uri}: is both source and target; name another catalog"
        assert list(source.storage.list()) == before

    def test_what_is_not_there(self, source: Catalog, local: Catalog) -> None:
        for reference, message in {"x": "no adapter x", "capital@v9": "no version v9"}.items():
            with pytest.raises(CatalogError, match=message):
                copy_version(source, local, reference)
        with pytest.raises(CatalogError, match="no adapter x"):
            copy_all_versions(source, local, "x")
        with pytest.raises(CatalogError, match=r"^alias 'v3'"):
            copy_version(source, local, "capital", alias="v3")
        assert nothing_there(local)

    def test_an_id_that_stands_for_another_adapter(
        self, source: Catalog, local: Catalog, tmp_path: Path
    ) -> None:
        publish(local, tmp_path / "theirs", "run-1", adapter="other")
        with pytest.raises(CatalogError) as caught:
            copy_version(source, local, "capital@v1")
        assert str(caught.value) == (
            f"{local.uri}: publish id run-1 stands for adapter other, not capital; use another"
        )
        assert list(local.newest_versions()) == ["other"]

    def test_an_id_that_stands_for_another_version(
        self, source: Catalog, local: Catalog, tmp_path: Path
    ) -> None:
        adapter = adapter_files(tmp_path / "theirs", content=weights(b"theirs"))
        local.publish(draft(steps=99), adapter, publish_id="run-1")
        with pytest.raises(CatalogError) as caught:
            copy_version(source, local, "capital@v1", alias="production")
        assert str(caught.value) == (
            f"{local.uri}: publish id run-1 stands for capital@v1, which is not capital@v1 of {source.uri}: "
            "steps, files differ; nothing was copied; pull it, and publish its files under another id"
        )
        assert local.aliases("capital") == {}

    @pytest.mark.parametrize(
        "entry",
        [
            {"name": "../../evil.json"},
            {"name": "/etc/evil.json"},
            {"name": "evil.pkl"},
            {"sha256": "../../../etc/passwd"},
            {"sha256": hashlib.sha256(b"elsewhere").hexdigest()},
            {"size_bytes": 3},
            {"size_bytes": 1 << 60},
            {"size_bytes": -1},
        ],
    )
    def test_hostile_records(self, source: Catalog, local: Catalog, entry: Mapping[str, Any]) -> None:
        said = json.loads(source.storage.read(V1))
        said["files"][0] |= entry
        source.storage.write(V1, json.dumps(said).encode())
        with pytest.raises(CatalogError):
            copy_version(source, local, "capital@v1")
        assert nothing_there(local)

    @pytest.mark.parametrize("content", [b"{]", b"{} and much more" * 100_000, b""])
    def test_content_that_is_not_what_was_published(
        self, source: Catalog, local: Catalog, content: bytes
    ) -> None:
        for entry in source.resolve("capital@v1").files:
            if entry.name == "adapter_config.json":
                source.storage.write(f"blobs/{entry.sha256}", content)
        with pytest.raises(CatalogError, match=r"adapter_config\.json .*is not what was published"):
            copy_version(source, local, "capital@v1")
        assert nothing_there(local)

    def test_a_version_without_weights(self, source: Catalog, local: Catalog) -> None:
        said = json.loads(source.storage.read(V1))
        said["files"] = [entry for entry in said["files"] if not entry["name"].endswith(".safetensors")]
        source.storage.write(V1, json.dumps(said).encode())
        with pytest.raises(CatalogError, match="nothing to publish"):
            copy_version(source, local, "capital@v1")
        assert nothing_there(local)


class TestSignatures:
    def test_a_copy_is_signed_anew_or_not_at_all(
        self, source: Catalog, local: Catalog, tmp_path: Path
    ) -> None:
        publish(source, tmp_path, "run-4", signer=SIGNER)
        ours = Trust(frozenset({SIGNER.public_key}), required=True)
        theirs = Trust(frozenset({OTHER.public_key}), required=True)
        with pytest.raises(CatalogError, match=r"^capital@v3: has no signature, and one is required"):
            copy_version(source, local, "capital@v3", trust=ours)
        with pytest.raises(CatalogError, match=r"^capital@v4: is signed by sha256:"):
            copy_version(source, local, "capital@v4", trust=theirs)
        assert nothing_there(local)
        copied = copy_version(source, local, "capital@v4", trust=ours, signer=OTHER).copied
        assert theirs.problem(local.resolve("capital")) is None
        assert copied.signature is not None
        unsigned = Catalog.at(str(tmp_path / "unsigned"))
        assert copy_version(source, unsigned, "capital@v4").copied.signature is None

    def test_what_is_there_cannot_be_signed_any_more(
        self, source: Catalog, local: Catalog, tmp_path: Path
    ) -> None:
        copy_version(source, local, "capital")
        with pytest.raises(CatalogError) as caught:
            copy_version(source, local, "capital", signer=SIGNER)
        assert str(caught.value) == (
            f"{local.uri}: capital@v1 is there already and has no signature; a record is never changed, so "
            "it cannot be signed any more; leave out the signature, or publish into another catalog"
        )
        third = Catalog.at(str(tmp_path / "third"))
        first = copy_version(source, third, "capital", signer=SIGNER)
        assert copy_version(source, third, "capital", signer=SIGNER) == first
        with pytest.raises(CatalogError, match=fingerprint(SIGNER.public_key)):
            copy_version(source, third, "capital", signer=OTHER)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("crash_at", range(PROBE_WRITES + 1, PROBE_WRITES + WRITES + 1))
def test_a_crash_around_each_write_and_a_repetition(
    source: Catalog, local: Catalog, crash_at: int, written: bool
) -> None:
    dying = Catalog(CrashingStorage(local.storage, crash_at, written=written))
    with pytest.raises(Crash):
        copy_version(source, dying, "capital@v2")
    done = crash_at == PROBE_WRITES + WRITES and written
    assert list(local.versions("capital")) == ([1] if done else [])
    assert copy_version(source, local, "capital@v2").copied.version == 1
    assert list(local.versions("capital")) == [1]
    assert not verify(local).problems


def test_no_write_goes_without_a_crash(source: Catalog, local: Catalog) -> None:
    counting = CrashingStorage(local.storage, crash_at=0, written=False)
    copy_version(source, Catalog(counting), "capital@v2")
    assert counting.writes == PROBE_WRITES + WRITES


class TestCommands:
    def run(self, *arguments: str, **environment: str) -> str:
        app = raytune_ft.cli.catalog.copy.app
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", **environment})
        if result.exception is not None:
            raise result.exception
        return result.stdout

    def test_export(self, source: Catalog, local: Catalog) -> None:
        asked = ("export", "capital@best", "--catalog", source.uri, "--to", local.uri)
        told = f"capital@v2 of {source.uri} is capital@v1 in {local.uri}\n"
        meaning = "capital@production means v1 there\n"
        assert self.run(*asked, "--alias", "production") == told + meaning
        assert self.run(*asked) == told
        assert json.loads(self.run(*asked, "--json")) == {
            "source": source.uri,
            "target": local.uri,
            "copies": [{"original": "capital@v2", "copy": "capital@v1"}],
            "alias": None,
            "alias_version": None,
        }
        assert local.aliases("capital") == {"production": 1}

    def test_import(self, source: Catalog, local: Catalog) -> None:
        asked = ("import", "capital", "--from", source.uri, "--all-versions", "--json")
        told = json.loads(self.run(*asked, RAYTUNE_CATALOG=local.uri))
        assert [copy["copy"] for copy in told["copies"]] == ["capital@v1", "capital@v2", "capital@v3"]
        shown = self.run("show", "capital", RAYTUNE_CATALOG=local.uri)
        assert re.search(rf"copy of +capital@v3 of {re.escape(source.uri)}, created 20", shown)

    def test_sign(self, source: Catalog, local: Catalog) -> None:
        asked = ("import", "capital", "--from", source.uri, "--catalog", local.uri, "--sign")
        with pytest.raises(BadInput, match=r"^RAYTUNE_SIGNING_KEY on .*: is not set"):
            self.run(*asked)
        self.run(*asked, RAYTUNE_SIGNING_KEY=PEMS[0])
        assert Trust(frozenset({SIGNER.public_key}), required=True).problem(local.resolve("capital")) is None


class TestRemoved:
    def test_removed_versions_are_left_out(self, source: Catalog, local: Catalog) -> None:
        remove_version(source, "capital@v1")
        copies = copy_all_versions(source, local, "capital")
        assert references(copies) == [("capital@v2", "capital@v1"), ("capital@v3", "capital@v2")]

    def test_an_adapter_of_which_all_is_removed(
        self, source: Catalog, local: Catalog, tmp_path: Path
    ) -> None:
        publish(source, tmp_path, "gone", adapter="gone")
        remove_version(source, "gone@v1")
        with pytest.raises(CatalogError, match=r"gone@v1 was removed by"):
            copy_all_versions(source, local, "gone")

    def test_a_copy_that_was_removed_stays_removed(self, source: Catalog, local: Catalog) -> None:
        copy_version(source, local, "capital@v2")
        remove_version(local, "capital@v1", "leaks")
        with pytest.raises(CatalogError, match=r"capital@v1 was removed by .*: leaks; restore it with"):
            copy_version(source, local, "capital@v2", alias="production")
        assert local.aliases("capital") == {}
