"""What is done again: a publish, a copy, a merge, the move of an alias. It repairs, and overrides nobody."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from stores import CarelessStorage, Crash, CrashingStorage, InterruptedStorage, adapter_files, draft
from typer.testing import CliRunner

from raytune_ft.catalog import (
    AdapterRecord,
    Catalog,
    Signer,
    alias_history,
    copy_all_versions,
    copy_version,
    remove_version,
    roll_back,
    verify,
)
from raytune_ft.catalog.layout import blob_key
from raytune_ft.catalog.lookup import CatalogView
from raytune_ft.catalog.removal import settle
from raytune_ft.cli.catalog import app
from raytune_ft.errors import CatalogError, StorageError
from raytune_ft.merge.result import publish_written

V1 = "adapters/capital/versions/9999999998.json"
WEIGHTS = "adapter_model.safetensors"
SIGNER, OTHER = (Signer(Ed25519PrivateKey.from_private_bytes(bytes([byte]) * 32)) for byte in (1, 2))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.at(str(tmp_path / "catalog"))


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Path]:
    return adapter_files(tmp_path / "files")


def pulls(catalog: CatalogView, record: AdapterRecord, to: Path) -> bool:
    shutil.rmtree(to, ignore_errors=True)
    return catalog.pull(record.reference, to) == record


def lose(catalog: Catalog, record: AdapterRecord) -> None:
    for entry in record.files:
        catalog.storage.delete(blob_key(entry.sha256))


def weights_key(record: AdapterRecord) -> str:
    return next(blob_key(entry.sha256) for entry in record.files if entry.name == WEIGHTS)


def move(catalog: Catalog, *versions: int) -> None:
    for version in versions:
        catalog.set_alias("capital", "production", version)


def alias_problems(catalog: Catalog) -> list[str]:
    return [problem for problem in verify(catalog).problems if f"{catalog.uri}: capital@" in problem]


class TestMove:
    """A job moves its alias forward; of a retry nobody shall notice anything."""

    @pytest.fixture(autouse=True)
    def _five_versions(self, catalog: Catalog, files: Mapping[str, Path]) -> None:
        for number in range(1, 6):
            catalog.publish(draft(), files, publish_id=f"run-{number}")

    def retried(self, catalog: Catalog, version: int) -> int:
        return catalog.set_alias("capital", "production", version, forward_only=True).version

    def test_a_rollback_stands(self, catalog: Catalog) -> None:
        move(catalog, 1, 2)
        roll_back(catalog, "capital", "production")
        assert self.retried(catalog, 2) == 1
        assert catalog.aliases("capital") == {"production": 1}
        assert self.retried(catalog, 3) == 3, "a version that it has never meant is news"

    @pytest.mark.parametrize(
        ("moves", "version"), [((1, 3, 1), 3), ((1, 3, 1, 2), 3), ((1, 3, 1), 2), ((4, 1, 2, 3), 4)]
    )
    def test_what_was_taken_back_by_hand_stays_so(
        self, catalog: Catalog, moves: tuple[int, ...], version: int
    ) -> None:
        move(catalog, *moves)
        assert self.retried(catalog, version) == moves[-1]
        assert self.retried(catalog, 5) == 5

    @pytest.mark.parametrize("moves", [(1, 2), (1, 3, 1, 2)])
    def test_a_log_that_does_not_say_the_highest_is_read_whole(
        self, catalog: Catalog, moves: tuple[int, ...]
    ) -> None:
        move(catalog, *moves)
        for found in list(catalog.storage.list("adapters/capital/aliases/")):
            said = json.loads(catalog.storage.read(found.key))
            del said["highest"]
            catalog.storage.write(found.key, json.dumps(said).encode())
        roll_back(catalog, "capital", "production")
        before = catalog.aliases("capital")["production"]
        assert self.retried(catalog, max(moves)) == before
        assert self.retried(catalog, 4) == 4
        assert not alias_problems(catalog)

    def test_a_log_takes_no_more_requests_when_it_is_long(self, catalog: Catalog) -> None:
        requests = []
        for version in (4, 5):
            move(catalog, *[1, 2, 3] * 5)
            counting = InterruptedStorage(catalog.storage, -1, lambda: None)
            self.retried(Catalog(counting), version)
            requests.append(counting.requests)
        assert requests[0] == requests[1] < 10

    @pytest.mark.parametrize("highest", [1, 5])
    def test_verify_looks_at_the_highest(self, catalog: Catalog, highest: int) -> None:
        move(catalog, 1, 2)
        key = "adapters/capital/aliases/production/9999999997.json"
        said = json.loads(catalog.storage.read(key))
        catalog.storage.write(key, json.dumps({**said, "highest": highest}).encode())
        (problem,) = alias_problems(catalog)
        assert problem == (
            f"{catalog.uri}: capital@production: move 2 says that v{highest} is the highest version that it "
            "has meant, and it is not"
        )
        assert len(alias_history(catalog, "capital", "production")) == 2


class TestPublish:
    @pytest.mark.parametrize("content", [None, b"wEights", b"we"])
    def test_again_it_repairs(
        self, catalog: Catalog, files: Mapping[str, Path], tmp_path: Path, content: bytes | None
    ) -> None:
        record = catalog.publish(draft(), files, publish_id="run-1")
        if content is None:
            lose(catalog, record)
        else:
            catalog.storage.write(weights_key(record), content)
        assert catalog.publish(draft(), files, publish_id="run-1") == record
        assert pulls(catalog, record, tmp_path / "pulled")

    def test_of_other_files_it_writes_none(self, catalog: Catalog, tmp_path: Path) -> None:
        record = catalog.publish(draft(), adapter_files(tmp_path / "a"), publish_id="run-1")
        before = list(catalog.storage.list("blobs/"))
        other = adapter_files(tmp_path / "b", content=b"other")
        assert catalog.publish(draft(), other, publish_id="run-1") == record
        assert list(catalog.storage.list("blobs/")) == before

    def test_a_crash_after_the_record_and_a_sweep(
        self, catalog: Catalog, files: Mapping[str, Path], tmp_path: Path
    ) -> None:
        dying = Catalog(CrashingStorage(catalog.storage, 5, written=True))
        with pytest.raises(Crash):
            dying.publish(draft(), files, publish_id="run-1")
        (record,) = (catalog.read("capital", version) for version in catalog.versions("capital"))
        catalog.storage.delete(weights_key(record))
        catalog.publish(draft(), files, publish_id="run-1")
        assert pulls(catalog, record, tmp_path / "pulled")

    def test_what_stands_there_must_be_signed(self, catalog: Catalog, files: Mapping[str, Path]) -> None:
        catalog.publish(draft(), files, publish_id="run-1")
        catalog.publish(draft(), files, publish_id="run-2", signer=OTHER)
        ours = catalog.publish(draft(), files, publish_id="run-3", signer=SIGNER)
        forged = json.loads(ours.to_bytes())
        forged["seed"] = 7
        catalog.storage.write("adapters/capital/versions/9999999996.json", json.dumps(forged).encode())
        problems = {"run-1": "has no signature", "run-2": "is signed by sha256:", "run-3": "its signature is"}
        for publish_id, problem in problems.items():
            with pytest.raises(CatalogError, match=rf"is there already and {problem}.*; leave out the sig"):
                catalog.publish(draft(), files, publish_id=publish_id, signer=SIGNER)
        assert catalog.publish(draft(), files, publish_id="run-4", signer=SIGNER).version == 4
        assert catalog.publish(draft(), files, publish_id="run-4", signer=SIGNER).version == 4

    def test_a_note_of_no_adapter_is_refused(self, catalog: Catalog, files: Mapping[str, Path]) -> None:
        note = {"schema_version": 1, "adapter": "\x1b[2J", "base_version": 0}
        catalog.storage.write("publishes/run-1.json", json.dumps(note).encode())
        with pytest.raises(CatalogError, match=r"run-1\.json: not a publish's note"):
            catalog.publish(draft(), files, publish_id="run-1")


class TestCopy:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Catalog:
        source = Catalog.at(str(tmp_path / "source"))
        for number in range(1, 4):
            content = adapter_files(tmp_path / f"files-{number}", content=b"weights %d" % number)
            source.publish(draft(), content, publish_id=f"run-{number}")
        return source

    def test_again_it_repairs(self, source: Catalog, catalog: Catalog, tmp_path: Path) -> None:
        copied = copy_version(source, catalog, "capital").copied
        lose(catalog, copied)
        assert copy_version(source, catalog, "capital").copied == copied
        assert pulls(catalog, copied, tmp_path / "pulled")

    def test_all_again_takes_as_many_requests_for_each_version(
        self, source: Catalog, catalog: Catalog, tmp_path: Path
    ) -> None:
        requests = []
        for number in (3, 6, 9):
            for more in range(len(source.versions("capital")) + 1, number + 1):
                content = adapter_files(tmp_path / "more", content=b"weights %d" % more)
                source.publish(draft(), content, publish_id=f"run-{more}")
            copy_all_versions(source, catalog, "capital")
            counting = InterruptedStorage(catalog.storage, -1, lambda: None)
            copy_all_versions(source, Catalog(counting), "capital")
            requests.append(counting.requests)
        assert requests[2] - requests[1] == requests[1] - requests[0]

    @pytest.mark.parametrize("copy", [copy_version, copy_all_versions])
    def test_from_nowhere_leaves_nothing(self, tmp_path: Path, catalog: Catalog, copy: object) -> None:
        assert callable(copy)
        with pytest.raises(CatalogError, match=r"no adapter capital; it holds none$"):
            copy(Catalog.at(str(tmp_path / "typo")), catalog, "capital")
        assert not list(tmp_path.iterdir())

    def test_a_link_to_itself(self, source: Catalog, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(source.uri)
        with pytest.raises(CatalogError, match="is both source and target"):
            copy_version(source, Catalog.at(str(tmp_path / "link")), "capital")


class TestMerge:
    """Of a merge all that the catalog sees: some files that can be made again, and an id."""

    @pytest.fixture(autouse=True)
    def _made(self) -> None:
        self.made = 0

    def merge(self, catalog: Catalog, *, alias: str | None = None) -> AdapterRecord:
        def write(folder: Path) -> None:
            self.made += 1
            adapter_files(folder)

        return publish_written(catalog, draft(), write, publish_id="merge-1", alias=alias)

    def test_again_it_is_the_same_and_repairs(self, catalog: Catalog, tmp_path: Path) -> None:
        record = self.merge(catalog, alias="production")
        assert (self.merge(catalog), self.made) == (record, 1)
        lose(catalog, record)
        assert (self.merge(catalog), self.made) == (record, 2)
        assert pulls(catalog, record, tmp_path / "pulled")

    def test_a_removed_result_is_none_until_its_files_are_gone(
        self, catalog: Catalog, tmp_path: Path
    ) -> None:
        for version in (1, 2):
            assert self.merge(catalog).version == version
            remove_version(catalog, f"capital@v{version}", "bad")
            with pytest.raises(CatalogError, match=rf"capital@v{version} was removed by .*: bad; restore it"):
                self.merge(catalog, alias="production")
            note = catalog.read_removal_note("capital", version)
            assert note is not None
            assert settle(catalog, "capital", note, "swept")
        record = self.merge(catalog, alias="production")
        assert (record.version, self.merge(catalog)) == (3, record)
        assert pulls(catalog, record, tmp_path / "pulled")

    @pytest.mark.parametrize("into_base", [False, True])
    def test_of_no_adapter_that_nobody_trusted_has_signed(
        self, catalog: Catalog, files: Mapping[str, Path], tmp_path: Path, into_base: bool
    ) -> None:
        for name in ("one", "two"):
            job = {"name": name, "model": {"path": "x"}, "data": {"sources": [{"uri": "x"}], "max_tokens": 8}}
            whole = {**job, "publish": {"catalog": catalog.uri}}
            catalog.publish(draft(adapter=name, job=whole), files, publish_id=name)
        key = Ed25519PrivateKey.generate().public_key()
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / "keys.pem").write_bytes(pem)
        asked = ["merge", "one", "--into-base"] if into_base else ["merge", "one", "two"]
        trusting = ["--require-signature", "--trusted-keys", str(tmp_path / "keys.pem")]
        result = CliRunner().invoke(app, [*asked, "--as", "both", "--catalog", catalog.uri, *trusting])
        assert str(result.exception).startswith("one@v1: has no signature, and one is required")

    def test_nothing_is_made_for_a_store_that_could_lose_it(self, catalog: Catalog) -> None:
        with pytest.raises(StorageError, match="ignores If-None-Match"):
            self.merge(Catalog(CarelessStorage(catalog.storage)))
        assert self.made == 0


def test_a_pull_follows_no_link(catalog: Catalog, files: Mapping[str, Path], tmp_path: Path) -> None:
    catalog.publish(draft(), files, publish_id="run-1")
    (tmp_path / "empty").mkdir()
    for name, target in {"link": "empty", "dangling": "nowhere"}.items():
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(CatalogError, match=r"is a link; name a new or empty folder$"):
            catalog.pull("capital", tmp_path / name)
