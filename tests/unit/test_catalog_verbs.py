"""One promotion of many wins, rollbacks go back and not to and fro, and every damage is found."""

import json
import multiprocessing
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stores import CarelessStorage, Crash, CrashingStorage, ForgetfulStorage, adapter_files, draft
from typer.testing import CliRunner

from raytune_ft.catalog import (
    Catalog,
    alias_history,
    roll_back,
    verify,
)
from raytune_ft.cli.catalog import app
from raytune_ft.errors import CatalogError, RaytuneError, StorageError
from raytune_ft.storage import Storage

V1 = "adapters/capital/versions/9999999998.json"
MOVE_1 = "adapters/capital/aliases/production/9999999998.json"


def weights(content: bytes = b"\0" * 8, **tensor: Any) -> bytes:
    """A safetensors file of one tensor, unless a field says otherwise."""
    told = {"dtype": "F32", "shape": [len(content) // 4], "data_offsets": [0, len(content)], **tensor}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": told}).encode()
    return struct.pack("<Q", len(header)) + header + content


@pytest.fixture
def catalog(storage: Storage) -> Catalog:
    return Catalog(storage)


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Path]:
    return adapter_files(tmp_path / "files", content=weights())


@pytest.fixture
def local(tmp_path: Path, files: Mapping[str, Path]) -> Catalog:
    """Two versions in a folder, of which `production` means the first."""
    catalog = Catalog.at(str(tmp_path / "catalog"))
    publish(catalog, files, 2)
    catalog.set_alias("capital", "production", 1)
    return catalog


def publish(catalog: Catalog, files: Mapping[str, Path], count: int) -> None:
    for number in range(1, count + 1):
        catalog.publish(draft(), files, publish_id=f"run-{number}")


def change(storage: Storage, key: str, **fields: Any) -> None:
    """Alter an object, as somebody with access to the store could."""
    storage.write(key, json.dumps({**json.loads(storage.read(key)), **fields}).encode())


def run(*arguments: str, exit_code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a command."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if isinstance(result.exception, RaytuneError):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


def promote_once(catalog: Catalog, version: int, expect: int) -> bool:
    try:
        catalog.set_alias("capital", "production", version, expect=expect)
    except CatalogError:
        return False
    return True


def promote_from_process(uri: str, version: int) -> bool:
    return promote_once(Catalog.at(uri), version, 1)


class TestPromote:
    def test_one_of_many_wins(self, catalog: Catalog, files: Mapping[str, Path]) -> None:
        publish(catalog, files, 9)
        for expect in (0, 1):
            barrier = threading.Barrier(8)

            def move(version: int, expect: int = expect, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return promote_once(catalog, version, expect)

            if expect:
                catalog.set_alias("capital", "production", 1)
            before = len(catalog.alias_moves("capital", "production"))
            with ThreadPoolExecutor(8) as threads:
                won = list(threads.map(move, range(2, 10)))
            assert won.count(True) == 1
            assert catalog.aliases("capital") == {"production": 2 + won.index(True)}
            assert len(catalog.alias_moves("capital", "production")) == before + 1

    def test_one_of_many_processes_wins(self, local: Catalog, files: Mapping[str, Path]) -> None:
        publish(local, files, 5)
        with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as processes:
            won = list(processes.map(partial(promote_from_process, local.uri), range(2, 6)))
        assert won.count(True) == 1

    def test_a_lost_answer_is_no_lost_race(self, local: Catalog) -> None:
        forgetful = Catalog(ForgetfulStorage(local.storage))
        assert promote_once(forgetful, 2, expect=1)
        assert list(local.alias_moves("capital", "production")) == [2, 1]

    def test_a_user_of_any_name_can_move_it(self, local: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOGNAME", "\x1b[2J" + "x" * 300)
        assert local.set_alias("capital", "production", 2).moved_by == "[2J" + "x" * 197
        assert alias_history(local, "capital", "production")[2].version == 2

    def test_the_message_says_who_moved_it(self, local: Catalog) -> None:
        entry = local.newest_alias_entry("capital", "production")[1]
        assert entry is not None
        assert "@" in entry.moved_by
        with pytest.raises(CatalogError) as caught:
            local.set_alias("capital", "production", 2, expect=0)
        assert str(caught.value) == (
            f"{local.uri}: capital@production means v1 (moved by {entry.moved_by} at {entry.created_at}), "
            "not nothing as expected; it was not moved; look at it with catalog history, and promote again"
        )

    def test_command(self, local: Catalog) -> None:
        at = ("--catalog", local.uri)
        assert run("promote", "capital@v2", "production", "--expect", "v1", *at)[0] == (
            "capital@production means v2; before it meant v1\n"
        )
        assert run("promote", "capital@production", "stable", "--expect", "none", *at)[0] == (
            "capital@stable means v2\n"
        )
        moved = json.loads(run("promote", "capital@v1", "stable", "--json", *at)[0])
        assert (moved["alias"], moved["version"], moved["previous"], "token" in moved) == (
            "stable",
            1,
            2,
            False,
        )
        for expect in ("2", "v", "v0", "v00", "", "v" + "1" * 5000):
            with pytest.raises(CatalogError, match=r"^--expect .*: write a version such as v2, or none$"):
                run("promote", "capital@v1", "stable", "--expect", expect, *at)

    def test_a_store_that_could_lose_the_move_is_refused(
        self, local: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        careless = Catalog(CarelessStorage(local.storage))
        monkeypatch.setattr("raytune_ft.cli.catalog.move.open_catalog", lambda _: careless)
        for command in (
            ("promote", "capital@v2", "best"),
            ("rollback", "capital", "best"),
            ("rm", "capital@v2"),
        ):
            with pytest.raises(StorageError, match="ignores If-None-Match"):
                run(*command, "--catalog", local.uri)
        assert (local.aliases("capital"), local.removed_versions("capital")) == ({"production": 1}, set())


@pytest.mark.parametrize(
    "command",
    [
        ("promote", "capital@v1", "best"),
        ("rollback", "capital", "best"),
        ("rm", "capital@v1"),
        ("restore", "capital@v1"),
        ("verify",),
        ("gc", "--older-than", "1h", "--dry-run"),
        ("gc", "--older-than", "1h"),
    ],
)
def test_a_catalog_that_is_not_there_is_neither_sound_nor_made(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    with pytest.raises(CatalogError) as caught:
        run(*command, "--catalog", str(tmp_path / "typo"))
    assert str(caught.value) == f"{tmp_path}/typo: no such folder; name one that holds a catalog"
    assert not list(tmp_path.iterdir())
    with pytest.raises(CatalogError) as caught:
        run(*command, "--catalog", str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: holds no adapter; check the name"
    assert not list(tmp_path.iterdir())


class TestRollback:
    def test_goes_back_and_not_to_and_fro(self, catalog: Catalog, files: Mapping[str, Path]) -> None:
        publish(catalog, files, 4)
        for version in (2, 1, 2, 3):
            catalog.set_alias("capital", "production", version)
        assert [roll_back(catalog, "capital", "production").version for _ in range(2)] == [2, 1]
        catalog.set_alias("capital", "production", 4)
        assert [roll_back(catalog, "capital", "production").version for _ in range(2)] == [1, 2]
        with pytest.raises(CatalogError, match=r"@production means v2 .*, and meant nothing before; move it"):
            roll_back(catalog, "capital", "production")
        moves = alias_history(catalog, "capital", "production")
        assert list(moves) == list(range(9, 0, -1))
        assert [entry.version for entry in moves.values()] == [2, 1, 4, 1, 2, 3, 2, 1, 2]
        assert verify(catalog, quick=True).problems == ()

    def test_of_two_at_once_one_goes_back(self, local: Catalog) -> None:
        local.set_alias("capital", "production", 2)

        class Overtaken(CrashingStorage):
            def write_once(self, key: str, data: bytes) -> bool:
                local.set_alias("capital", "production", 1)
                return super().write_once(key, data)

        with pytest.raises(CatalogError, match=r"@production was moved by somebody else at the same moment"):
            roll_back(Catalog(Overtaken(local.storage, 0, written=False)), "capital", "production")
        assert list(local.alias_moves("capital", "production")) == [3, 2, 1]

    def test_names_that_are_not_there(self, local: Catalog) -> None:
        for call in (roll_back, alias_history):
            with pytest.raises(CatalogError, match=r"capital has no alias best; it has production$"):
                call(local, "capital", "best")
            with pytest.raises(CatalogError, match=r"no adapter capitol; did you mean capital\?$"):
                call(local, "capitol", "best")
            with pytest.raises(
                CatalogError, match=r"^alias 'v1': must be 1 to 63 of .* and not be a version"
            ):
                call(local, "capital", "v1")
            for names in (("../x", "best"), ("capital", "../x")):
                with pytest.raises(CatalogError, match=r"not an adapter's alias; write NAME ALIAS$"):
                    call(local, *names)

    @pytest.mark.parametrize("restores", [2, 3, 99])
    def test_a_damaged_log_leads_in_no_circle(self, local: Catalog, restores: int) -> None:
        local.set_alias("capital", "production", 2)
        change(local.storage, "adapters/capital/aliases/production/9999999997.json", restores=restores)
        with pytest.raises(CatalogError, match=r"restores move \d+, which cannot be; the log was altered"):
            roll_back(local, "capital", "production")

    def test_commands(self, local: Catalog) -> None:
        local.set_alias("capital", "production", 2)
        at = ("--catalog", local.uri)
        assert run("rollback", "capital", "production", *at)[0] == (
            "capital@production means v1; before it meant v2\n"
        )
        shown = run("history", "capital", "production", *at)[0]
        assert "rollback to move 1" in shown
        moves = json.loads(run("history", "capital", "production", "--json", *at)[0])
        assert [(move["move"], move["version"], move["previous"], move["restores"]) for move in moves] == [
            (3, 1, 2, 1),
            (2, 2, 1, None),
            (1, 1, None, None),
        ]


class TestVerify:
    def test_what_is_published_is_sound(self, catalog: Catalog, files: Mapping[str, Path]) -> None:
        publish(catalog, files, 2)
        catalog.set_alias("capital", "production", 2)
        for quick in (False, True):
            found = verify(catalog, quick=quick)
            assert (found.versions, found.files, found.problems, found.notes) == (2, 3, (), ())
            assert found.size_bytes == sum(path.stat().st_size for path in files.values())
        assert verify(catalog, "capital").versions == 2
        assert verify(catalog, "capital@production").versions == 1
        with pytest.raises(CatalogError, match="no adapter capitol"):
            verify(catalog, "capitol")

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (None, "is gone; publish the adapter again"),
            (b"", "has 0 bytes, and the record says "),
            (weights(b"\1" * 8), "the content is not that of its sha256; it was altered or damaged"),
        ],
    )
    def test_content(
        self, catalog: Catalog, files: Mapping[str, Path], content: bytes | None, problem: str
    ) -> None:
        publish(catalog, files, 2)
        (entry,) = (e for e in catalog.resolve("capital").files if e.name.endswith(".safetensors"))
        key = f"blobs/{entry.sha256}"
        catalog.storage.delete(key) if content is None else catalog.storage.write(key, content)
        (found,) = verify(catalog).problems
        place = f"capital@v1 and in 1 more: adapter_model.safetensors ({catalog.uri}/{key}): "
        assert found.startswith(place + problem)

    def test_one_byte_of_a_header_shows_in_the_quick_check(self, local: Catalog, tmp_path: Path) -> None:
        broken = adapter_files(tmp_path / "broken", content=weights(dtype="F16"))
        local.publish(draft(adapter="broken"), broken, publish_id="broken")
        (found,) = verify(local, quick=True).problems
        assert found.startswith("broken@v1: adapter_model.safetensors (")
        assert found.endswith("its tensor 'w' has the bytes 0 to 8, and its shape takes 4")

    @pytest.mark.parametrize(
        ("key", "fields", "problem"),
        [
            (V1, {"version": 3}, f"{V1}: holds the record of capital@v3, not of capital@v1; it was moved"),
            (V1, {"steps": -1}, f"{V1}: not a record of this catalog: steps: "),
            (
                V1,
                {"files": [{"name": "x.pt", "sha256": "a" * 64, "size_bytes": 1}]},
                f"{V1}: not a record of ",
            ),
            (MOVE_1, {"version": 7}, ": capital@production: move 1 goes to v7, which is not there"),
            (MOVE_1, {"previous": 2}, "move 1 says that it came from v2, and it came from nothing"),
            (MOVE_1, {"restores": 1}, "move 1 restores move 1, which did not go to v1"),
            (MOVE_1, {"moved_by": "\x1b[2J"}, f"{MOVE_1}: not an alias's entry; the object was altered"),
            (MOVE_1, {"created_at": "\x1b[2J"}, f"{MOVE_1}: not an alias's entry; the object was altered"),
            (MOVE_1, {"other": 1}, f"{MOVE_1}: not an alias's entry; the object was altered or damaged"),
        ],
    )
    def test_records_and_aliases(
        self, local: Catalog, key: str, fields: dict[str, Any], problem: str
    ) -> None:
        change(local.storage, key, **fields)
        found = verify(local)
        assert len(found.problems) == 1
        assert problem in found.problems[0]
        # What a damaged record names might look like an orphan.
        assert found.notes == ("what no record names is not listed while records or aliases have problems",)

    def test_gaps(self, local: Catalog, files: Mapping[str, Path]) -> None:
        publish(local, files, 5)
        for number in (2, 4):
            local.storage.delete(f"adapters/capital/versions/{9_999_999_999 - number}.json")
        assert verify(local, "capital").problems == (
            f"{local.uri}: capital: version v2 is not there, nor are 1 more, and later ones are; the objects "
            "were removed or moved",
        )

    def test_a_foreign_number_takes_no_time(self, local: Catalog) -> None:
        local.storage.write("adapters/capital/versions/0000000000.json", local.storage.read(V1))
        gap, moved = sorted(verify(local).problems, key=lambda problem: "moved" in problem.split()[-1])
        assert "it was moved" in gap + moved
        assert "nor are 9,999,999,995 more" in gap + moved

    def test_what_crashes_leave_is_a_note(self, local: Catalog, tmp_path: Path) -> None:
        other = adapter_files(tmp_path / "other", content=weights(b"\2" * 8))
        with pytest.raises(Crash):
            Catalog(CrashingStorage(local.storage, 2, written=True)).publish(
                draft(), other, publish_id="died"
            )
        local.storage.write("adapters/notes.txt", b"mine")
        local.storage.write("adapters/capital/aliases/v1/9999999998.json", b"{}")
        found = verify(local)
        assert found.problems == ()
        assert [note.removeprefix(f"{local.uri}/").partition(": ")[2] for note in found.notes] == [
            "not the catalog's",
            "not the catalog's",
            f"{len(weights())} bytes that no record names",
            "a publish that has made no version",
        ]

    def test_command(self, local: Catalog) -> None:
        out, err = run("verify", "--catalog", local.uri)
        assert out.startswith(f"{local.uri} is sound: 2 versions, 3 files, ")
        assert err == ""
        change(local.storage, V1, adapter="evil\n\x1b[2J")
        out, err = run("verify", "capital", "--catalog", local.uri, exit_code=2)
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"raytune-ft: {local.uri}/{V1}: ")
        assert "\x1b" not in err
        found = json.loads(run("verify", "--quick", "--json", "--catalog", local.uri, exit_code=2)[0])
        assert (found["versions"], len(found["problems"]), len(found["notes"])) == (1, 1, 1)
