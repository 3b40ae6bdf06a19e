"""Removal, restoration and gc, at each moment of everything else: no version that is left loses a file."""

import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from stores import Crash, ForgetfulStorage, InterruptedStorage, WrappedStorage, adapter_files, draft
from typer.testing import CliRunner

from raytune_ft.catalog import Catalog, list_catalog, roll_back, update_serve_dir, verify
from raytune_ft.catalog.removal import remove_version, restore_version
from raytune_ft.catalog.sweep import LEAST_AGE_S, Swept, sweep
from raytune_ft.cli.catalog import app, remove  # noqa: F401  it registers its commands
from raytune_ft.errors import CatalogError
from raytune_ft.storage import FolderStorage, Storage, open_storage

HOUR_S = 3600.0
CACHED = f"cache/tokens/{'a' * 64}.arrow"


def weights(values: bytes) -> bytes:
    """A safetensors file of four bytes."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


def publish(catalog: Catalog, folder: Path, publish_id: str, values: bytes = b"aaaa") -> int:
    files = adapter_files(folder / values.decode(), content=weights(values))
    return catalog.publish(draft(), files, publish_id=publish_id).version


def age(storage: Storage, by_s: float) -> None:
    """Let all that a folder holds have been written earlier."""
    assert isinstance(storage, FolderStorage)
    for path in storage.root.rglob("*"):
        with suppress(FileNotFoundError):
            modified_at = path.stat().st_mtime - by_s
            os.utime(path, (modified_at, modified_at))


def contents(catalog: Catalog) -> set[str]:
    return {found.key for found in catalog.storage.list("blobs/")}


@pytest.fixture
def catalog(storage: Storage) -> Catalog:
    return Catalog(storage)


@pytest.fixture
def local(tmp_path: Path) -> Catalog:
    """Three versions in a folder: two of one content, one of another."""
    catalog = Catalog.at(str(tmp_path / "catalog"))
    for number, values in enumerate((b"aaaa", b"aaaa", b"bbbb"), start=1):
        publish(catalog, tmp_path, f"run-{number}", values)
    return catalog


def message(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(CatalogError) as caught:
        call(*arguments)
    return str(caught.value)


class TestRemove:
    def test_nothing_means_a_removed_version_until_it_is_restored(
        self, catalog: Catalog, tmp_path: Path
    ) -> None:
        for number in (1, 2, 3):
            publish(catalog, tmp_path, f"run-{number}")
        remove_version(catalog, "capital@v3", "learned the test split")
        assert catalog.resolve("capital").version == 2
        assert catalog.newest_versions() == {"capital": 2}
        said = message(catalog.resolve, "capital@v3")
        assert re.fullmatch(
            rf"{catalog.uri}: capital@v3 was removed by .+ at .+: learned the test split; "
            r"restore it with: raytune-ft catalog restore capital@v3",
            said,
        )
        assert message(catalog.pull, "capital@v3", tmp_path / "pulled") == said
        assert message(catalog.set_alias, "capital", "production", 3) == said
        assert message(remove_version, catalog, "capital@v3") == said
        assert message(catalog.resolve, "capital@v4").endswith("has no version v4; it has v2, v1")
        remove_version(catalog, "capital@v1")
        assert catalog.resolve("capital").version == 2
        assert restore_version(catalog, "capital@v3").version == 3
        assert catalog.resolve("capital").version == catalog.resolve("capital@v3").version == 3
        assert message(restore_version, catalog, "capital@v3").endswith("there is nothing to restore")

    def test_an_adapter_without_versions_goes_on_counting(self, catalog: Catalog, tmp_path: Path) -> None:
        publish(catalog, tmp_path, "run-1")
        remove_version(catalog, "capital@v1")
        assert "capital@v1 was removed" in message(catalog.resolve, "capital")
        assert (catalog.newest_versions(), list_catalog(catalog).rows) == ({}, ())
        assert publish(catalog, tmp_path, "run-2") == 2
        assert catalog.newest_versions() == {"capital": 2}
        with pytest.raises(CatalogError, match=r"capital@v1 was removed by .*; restore it with"):
            publish(catalog, tmp_path, "run-1")
        removed = catalog.published("capital", "run-1")
        assert removed is not None
        assert removed.version == 1
        assert list(catalog.versions("capital")) == [1, 2]

    def test_not_while_an_alias_means_it(self, local: Catalog) -> None:
        local.set_alias("capital", "production", 2)
        assert message(remove_version, local, "capital@v2") == (
            f"{local.uri}: capital@v2 is what production means; it was not removed; move the alias first, "
            "with catalog promote"
        )
        local.set_alias("capital", "production", 3)
        remove_version(local, "capital@v2")
        assert "capital@v2 was removed" in message(roll_back, local, "capital", "production")
        assert local.aliases("capital") == {"production": 3}

    @pytest.mark.parametrize(
        "reference", ["capital", "capital@production", "capital@", "../x@v1", "", "x@v1\n"]
    )
    def test_only_a_version_by_its_number(self, local: Catalog, reference: str) -> None:
        local.set_alias("capital", "production", 1)
        for call in (remove_version, restore_version):
            assert message(call, local, reference).endswith("not a version by its number; write NAME@v3")

    @pytest.mark.parametrize("reason", ["a\nb", "\x1b[2J", "x" * 501])
    def test_a_reason_is_one_line(self, local: Catalog, reason: str) -> None:
        assert "must be one printable line of at most 500" in message(
            remove_version, local, "capital@v1", reason
        )
        assert local.resolve("capital@v1")

    def test_what_is_not_there(self, local: Catalog) -> None:
        for call in (remove_version, restore_version):
            assert message(call, local, "capital@v9").endswith("has no version v9; it has v3, v2, v1")

    def test_a_lost_answer_is_no_other_removal(self, local: Catalog) -> None:
        remove_version(Catalog(ForgetfulStorage(local.storage)), "capital@v1")
        assert local.removed_versions("capital") == {1}

    def test_the_newest_takes_three_requests(self, local: Catalog) -> None:
        remove_version(local, "capital@v1")
        counting = InterruptedStorage(local.storage, -1, lambda: None)
        assert Catalog(counting).resolve("capital").version == 3
        assert counting.requests == 3

    def test_a_damaged_note_removes_and_is_found(self, local: Catalog) -> None:
        local.storage.write("adapters/capital/removed/9999999998.json", b"{}")
        assert "not a removal's note" in message(local.resolve, "capital@v1")
        (problem,) = verify(local).problems
        assert problem.endswith(
            "removed/9999999998.json: not a removal's note; the object was altered or damaged"
        )
        restore_version(local, "capital@v1")
        assert verify(local).problems == ()

    def test_verify_finds_an_alias_that_means_it(self, local: Catalog, tmp_path: Path) -> None:
        remove_version(local, "capital@v1")
        note = local.storage.read("adapters/capital/removed/9999999998.json")
        restore_version(local, "capital@v1")
        local.set_alias("capital", "production", 1)
        local.storage.write("adapters/capital/removed/9999999998.json", note)
        (problem,) = verify(local).problems
        assert problem.startswith(f"{local.uri}: capital@production: capital@v1 was removed by ")
        served = update_serve_dir(local, "production", open_storage(str(tmp_path / "served")))
        assert "capital@v1 was removed by" in served.problems[0]


class TestSweep:
    def test_takes_what_no_version_names(
        self, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(catalog, tmp_path, "run-1", b"aaaa")
        publish(catalog, tmp_path, "run-2", b"bbbb")
        kept = contents(catalog)
        publish(catalog, tmp_path, "run-3", b"cccc")
        orphan, foreign = f"blobs/{'0' * 64}", "blobs/notes.txt"
        for key in (orphan, foreign, CACHED, "cache/notes.txt", "runs/a/b/state"):
            catalog.storage.write(key, b"12345")
        taken = (contents(catalog) - kept - {foreign}) | {CACHED}
        before = {found.key for found in catalog.storage.list()}
        remove_version(catalog, "capital@v3")
        old_s = 2 * HOUR_S
        if isinstance(catalog.storage, FolderStorage):
            age(catalog.storage, old_s)
        else:
            monkeypatch.setattr(import_module("raytune_ft.catalog.sweep"), "LEAST_AGE_S", 0.0)
            old_s = 0.5
            time.sleep(1.6)  # A bucket tells whole seconds.
        found = sweep(catalog, old_s, dry_run=True)
        assert {info.key for info in (*found.contents, *found.cached)} == taken
        assert found.size_bytes == len(weights(b"cccc")) + 10
        assert {found.key for found in catalog.storage.list()} >= before, "a dry run takes nothing"
        assert sweep(catalog, old_s) == found
        left = {found.key for found in catalog.storage.list()}
        assert before - left == taken
        assert message(restore_version, catalog, "capital@v3").endswith("is gone; publish it again")
        assert sweep(catalog, old_s) == Swept((), ())
        sound = verify(catalog)
        assert (sound.problems, sound.versions) == ((), 3)
        assert not any("adapters/" in note for note in sound.notes)

    def test_nothing_young(self, local: Catalog) -> None:
        age(local.storage, 2 * HOUR_S)
        remove_version(local, "capital@v3")
        local.storage.write(f"blobs/{'0' * 64}", b"orphan")
        local.storage.write(CACHED, b"")
        assert sweep(local, HOUR_S) == Swept((), ())
        age(local.storage, HOUR_S - 60)
        assert sweep(local, HOUR_S) == Swept((), ())
        age(local.storage, 120)
        assert len(sweep(local, HOUR_S).contents) == 2

    @pytest.mark.parametrize(
        "key", ["adapters/capital/versions/9999999996.json", "adapters/capital/removed/9999999998.json"]
    )
    def test_nothing_while_a_record_cannot_be_read(self, local: Catalog, key: str) -> None:
        local.storage.write(f"blobs/{'0' * 64}", b"orphan")
        local.storage.write(key, b"{")
        age(local.storage, 2 * HOUR_S)
        before = contents(local)
        assert message(sweep, local, HOUR_S).endswith("; nothing is taken away while this cannot be read")
        assert contents(local) == before

    @pytest.mark.parametrize("age_s", [0.0, -1.0, LEAST_AGE_S - 1, float("nan")])
    def test_a_young_age_is_refused(self, local: Catalog, age_s: float) -> None:
        assert "a younger content than 3,600 s may belong to a publish" in message(sweep, local, age_s)

    def test_files_that_went_by_accident_are_not_restored(self, local: Catalog) -> None:
        remove_version(local, "capital@v3")
        for entry in local.read("capital", 3).files:
            local.storage.delete(f"blobs/{entry.sha256}")
        assert "cannot be restored: README.md is gone" in message(restore_version, local, "capital@v3")

    def test_content_is_written_anew_where_it_is_old(self, local: Catalog, tmp_path: Path) -> None:
        age(local.storage, HOUR_S)
        publish(local, tmp_path, "run-4", b"bbbb")
        for entry in local.resolve("capital").files:
            info = local.storage.info(f"blobs/{entry.sha256}")
            assert info is not None
            assert time.time() - info.modified_at < 60

    def test_a_publish_writes_again_what_goes_meanwhile(self, local: Catalog, tmp_path: Path) -> None:
        files = adapter_files(tmp_path / "cccc", content=weights(b"cccc"))
        key = f"blobs/{hashlib.sha256(files['README.md'].read_bytes()).hexdigest()}"
        requests = []
        for at in itertools.count():
            losing = InterruptedStorage(local.storage, at, partial(local.storage.delete, key))
            version = publish(Catalog(losing), tmp_path, f"losing-{at}", b"cccc")
            requests.append(losing.keys)
            looks = [n for n, asked in enumerate(losing.keys) if asked == key]
            if at > looks[-1]:
                break
            with tempfile.TemporaryDirectory(dir=tmp_path) as pulled:
                assert local.pull(f"capital@v{version}", Path(pulled))
        record_at = next(n for n, asked in enumerate(losing.keys) if "/versions/99" in asked)
        before_at = max(n for n in looks if n < record_at)
        assert before_at == record_at - len(files), "all are looked at again just before the record"
        assert requests[before_at][before_at : before_at + 2] == [key, key]
        assert looks[-1] > record_at


Act = Callable[[Catalog, Path], object]


def attempt(act: Act, catalog: Catalog, folder: Path) -> bool:
    """Whether something was done; a refusal says why."""
    try:
        act(catalog, folder)
    except CatalogError:
        return False
    return True


_ids = itertools.count()
ACTS: Mapping[str, Act] = {
    "publish a": lambda catalog, folder: publish(catalog, folder, f"new-{next(_ids)}", b"aaaa"),
    "publish b": lambda catalog, folder: publish(catalog, folder, f"new-{next(_ids)}", b"bbbb"),
    "rm v1": lambda catalog, _: remove_version(catalog, "capital@v1"),
    "rm v2": lambda catalog, _: remove_version(catalog, "capital@v2"),
    "rm v3": lambda catalog, _: remove_version(catalog, "capital@v3"),
    "restore v1": lambda catalog, _: restore_version(catalog, "capital@v1"),
    "restore v3": lambda catalog, _: restore_version(catalog, "capital@v3"),
    "promote v1": lambda catalog, _: catalog.set_alias("capital", "production", 1),
    "promote v3": lambda catalog, _: catalog.set_alias("capital", "production", 3),
    "rollback": lambda catalog, _: roll_back(catalog, "capital", "production"),
    "gc": lambda catalog, _: sweep(catalog, HOUR_S),
}


def check_whole(catalog: Catalog, folder: Path) -> None:
    """No problem, no gap, and all that is not removed can be pulled; no alias means what is removed."""
    assert verify(catalog).problems == ()
    versions, removed = catalog.versions("capital"), catalog.removed_versions("capital")
    assert list(versions) == list(range(1, len(versions) + 1))
    living = [version for version in versions if version not in removed]
    for version in living:
        with tempfile.TemporaryDirectory(dir=folder) as pulled:
            catalog.pull(f"capital@v{version}", Path(pulled))
    assert catalog.newest_versions() == ({"capital": living[-1]} if living else {})
    assert not living or catalog.resolve("capital").version == living[-1]
    assert removed.isdisjoint(catalog.aliases("capital").values())


@pytest.fixture
def prepared(local: Catalog) -> Catalog:
    """As `local`, and old; the third version is removed for long, and its files may go."""
    local.set_alias("capital", "production", 1)
    local.set_alias("capital", "production", 2)
    remove_version(local, "capital@v3")
    age(local.storage, 2 * HOUR_S)
    return local


PAIRS = [
    ("publish b", "gc"),
    ("gc", "publish b"),
    ("restore v3", "gc"),
    ("gc", "restore v3"),
    ("rm v1", "promote v1"),
    ("promote v1", "rm v1"),
    ("rm v1", "rollback"),
    ("rollback", "rm v1"),
    ("rm v1", "rm v1"),
    ("gc", "gc"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_thing_at_each_moment_of_another(
    prepared: Catalog, tmp_path: Path, first: str, second: str
) -> None:
    root = Path(prepared.uri)
    template = root.rename(tmp_path / "template")
    done = set()
    for at in itertools.count():
        shutil.copytree(template, root)
        interrupted = InterruptedStorage(
            prepared.storage, at, lambda: done.add((2, attempt(ACTS[second], prepared, tmp_path)))
        )
        done.add((1, attempt(ACTS[first], Catalog(interrupted), tmp_path)))
        check_whole(prepared, tmp_path)
        shutil.rmtree(root)
        if interrupted.requests <= at:
            break
    assert {(1, True), (2, True)} <= done, "each has got its way at some moment"


class DyingStorage(InterruptedStorage):
    """Dies before its n-th request, and something else happens before another."""

    def __init__(self, inner: Storage, at: int, happens: Callable[[], object], dies_at: int) -> None:
        super().__init__(inner, at, happens)
        self._dies_at = dies_at

    def _request(self, key: str) -> None:
        super()._request(key)
        if len(self.keys) == self._dies_at + 1:
            raise Crash


def test_a_restoration_that_dies_is_none_or_whole(prepared: Catalog, tmp_path: Path) -> None:
    template = Path(prepared.uri).rename(tmp_path / "template")
    shutil.copytree(template, prepared.uri)
    counting = InterruptedStorage(prepared.storage, -1, lambda: None)
    restore_version(Catalog(counting), "capital@v3")
    ends = set()
    for at, dies_at in itertools.combinations_with_replacement(range(counting.requests), 2):
        shutil.rmtree(prepared.uri)
        shutil.copytree(template, prepared.uri)
        dying = DyingStorage(prepared.storage, at, lambda: sweep(prepared, HOUR_S), dies_at)
        with suppress(Crash, CatalogError):
            restore_version(Catalog(dying), "capital@v3")
        check_whole(prepared, tmp_path)
        # Who comes later completes it, or is told why not.
        attempt(ACTS["restore v3"], prepared, tmp_path)
        check_whole(prepared, tmp_path)
        ends.add(prepared.resolve("capital").version)
    assert ends == {2, 3}


def test_who_gives_up_takes_no_other_removal_away(local: Catalog) -> None:
    class Slow(WrappedStorage):
        """Its owner removes v1 while others promote it, leave it again and remove it themselves."""

        def write_once(self, key: str, data: bytes) -> bool:
            if "/removed/" in key:
                local.set_alias("capital", "production", 1)
            if "/settled/" in key:
                remove_again()
            return super().write_once(key, data)

    def remove_again() -> None:
        restore_version(local, "capital@v1")
        local.set_alias("capital", "production", 3)
        remove_version(local, "capital@v1", "theirs")

    assert "is what production means" in message(remove_version, Catalog(Slow(local.storage)), "capital@v1")
    removal = local.read_removal("capital", 1)
    assert removal is not None
    assert removal.reason == "theirs"


def test_an_end_that_cannot_be_read_stops_both(local: Catalog, tmp_path: Path) -> None:
    remove_version(local, "capital@v3")
    note = local.read_removal_note("capital", 3)
    assert note is not None
    local.storage.write(f"adapters/capital/settled/{hashlib.sha256(note).hexdigest()}.json", b"{}")
    age(local.storage, 2 * HOUR_S)
    before = contents(local)
    for call in (partial(sweep, local, HOUR_S), partial(restore_version, local, "capital@v3")):
        assert message(call).endswith("not a removal's end; the object was altered or damaged")
    assert contents(local) == before


class Interleaved(RuleBasedStateMachine):
    """Anything at any moment of anything else, in a catalog that grows old."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="raytune-ft-"))
        self.catalog = Catalog.at(str(self.folder / "catalog"))
        publish(self.catalog, self.folder, "run-1")

    @rule(first=st.sampled_from(sorted(ACTS)), second=st.sampled_from(sorted(ACTS)), at=st.integers(0, 30))
    def both(self, first: str, second: str, at: int) -> None:
        interrupted = InterruptedStorage(
            self.catalog.storage, at, lambda: attempt(ACTS[second], self.catalog, self.folder)
        )
        attempt(ACTS[first], Catalog(interrupted), self.folder)

    @rule(act=st.sampled_from(sorted(ACTS)))
    def one(self, act: str) -> None:
        attempt(ACTS[act], self.catalog, self.folder)

    @rule(minutes=st.integers(1, 90))
    def grows_old(self, minutes: int) -> None:
        age(self.catalog.storage, 60.0 * minutes)

    @invariant()
    def whole(self) -> None:
        check_whole(self.catalog, self.folder)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class TestCommands:
    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
        if result.exception is not None:
            raise result.exception
        return result.stdout

    def test_rm_restore_and_gc(self, local: Catalog) -> None:
        at = ("--catalog", local.uri)
        said = self.run("rm", "capital@v3", *at, "--reason", "too long")
        assert said == "capital@v3 is removed; until gc it can be restored\n"
        assert self.run("restore", "capital@v3", *at) == "capital@v3 is restored\n"
        removal = json.loads(self.run("rm", "capital@v3", *at, "--reason", "too long", "--json"))
        assert (removal["adapter"], removal["version"], removal["reason"]) == ("capital", 3, "too long")
        assert json.loads(self.run("restore", "capital@v3", *at, "--json")) == {
            "adapter": "capital",
            "version": 3,
        }
        self.run("rm", "capital@v3", *at)
        age(local.storage, 2 * HOUR_S)
        size_bytes = len(weights(b"bbbb"))
        planned = self.run("gc", *at, "--older-than", "90m", "--dry-run")
        counted = (
            f"{local.uri}: 1 contents, 0 pieces of tokenised data, 0 unfinished uploads, {size_bytes} bytes\n"
        )
        assert planned.endswith(f"would be removed from {counted}")
        told = json.loads(self.run("gc", *at, "--older-than", "1h", "--dry-run", "--json"))
        assert (told["size_bytes"], told["dry_run"], len(told["contents"])) == (size_bytes, True, 1)
        done = self.run("gc", *at, "--older-than", "1h")
        assert done == planned.replace("would be removed", "removed")
        assert "0 contents" in self.run("gc", *at, "--older-than", "1d")

    @pytest.mark.parametrize("age", ["", "7", "d", "7w", "-1d", "1.5h", "7 d", "7D", "1h\n", "999999d"])
    def test_ages_that_are_none(self, local: Catalog, age: str) -> None:
        with pytest.raises(CatalogError, match="write a number and m, h or d, such as 90m, 12h or 7d"):
            self.run("gc", "--catalog", local.uri, "--older-than", age)

    def test_an_age_that_is_too_little(self, local: Catalog) -> None:
        with pytest.raises(CatalogError, match=r"an age of 3,540 s is too little"):
            self.run("gc", "--catalog", local.uri, "--older-than", "59m")
