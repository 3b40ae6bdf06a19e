"""What only folders can get wrong, and what a uri means."""

import doctest
import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.catalog import layout
from raytune_ft.errors import (
    BadInput,
    StorageChanged,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageMissing,
)
from raytune_ft.spec import values
from raytune_ft.storage import FolderStorage, base, join_uri, local_path, open_parent, open_storage, split_uri


def test_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    storage = open_storage(str(small_disk))
    storage.write("a", b"old")
    content = b"x" * ((1 << 20) + 1)
    expected = (
        f"{small_disk}/a: the disk is full: 1,048,577 bytes were not written; nothing of it is visible; "
        "free space and run again"
    )
    for write in (storage.write, storage.write_once):
        with pytest.raises(StorageFull) as caught:
            write("a", content)
        assert str(caught.value) == expected
    assert storage.read("a") == b"old"
    assert [name for name in os.listdir(small_disk) if name.startswith(".tmp")] == []


def test_a_writer_that_dies_leaves_nothing_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))

    def die(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(StorageError, match=rf"^{tmp_path}/a: input/output error; check the disk or mount"):
        storage.write("a", b"1")
    assert os.listdir(tmp_path) == []


def test_writes_under_way_are_not_listed(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("a", b"1")
    (tmp_path / ".tmp-123").write_bytes(b"half")
    assert [found.key for found in storage.list()] == ["a"]


def test_the_first_write_creates_the_folder_and_opening_does_not(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "a" / "b"))
    storage.check()
    assert list(storage.list()) == []
    assert os.listdir(tmp_path) == []
    storage.write("c/d", b"1")
    assert (tmp_path / "a" / "b" / "c" / "d").read_bytes() == b"1"


def test_a_file_that_is_rewritten_while_it_is_read(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("a", b"1" * 1_000_000)
    found = storage.info("a")
    assert found is not None
    for stop in (None, 900_000):
        with storage.open("a", 10, stop, etag=found.etag) as stream:
            assert stream.read(10) == b"1" * 10
            with (tmp_path / "a").open("r+b") as file:
                file.write(b"2" * 1_000_000)
            with pytest.raises(
                StorageChanged, match=rf"^{tmp_path}/a: changed: not version {found.etag} any"
            ):
                stream.read()
        storage.write("a", b"1" * 1_000_000)
        found = storage.info("a")
        assert found is not None


def test_a_file_that_is_replaced_or_removed_is_read_to_its_end(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("a", b"1" * 1_000_000)
    found = storage.info("a")
    assert found is not None
    with storage.open("a", etag=found.etag) as one, storage.open("a", 10, etag=found.etag) as other:
        storage.write("a", b"2" * 1_000_000)
        assert one.read() == b"1" * 1_000_000
        storage.delete("a")
        assert other.read() == b"1" * 999_990


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = open_storage(str(tmp_path / "file"))
    expected = "a file stands where a folder is needed; name another folder$"
    with pytest.raises(StorageError, match=expected):
        storage.check()
    with pytest.raises(StorageError, match=expected):
        storage.write("a", b"1")


def test_a_folder_is_no_object(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("a/b", b"1")
    assert storage.info("a") is None
    with pytest.raises(StorageMissing, match=rf"^{tmp_path}/a: a folder, not a file; check the name$"):
        storage.read("a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_right_to_write(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageDenied, match=r"permission denied; give this user the right"):
        open_storage(str(tmp_path / "locked")).write("a", b"1")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=r"has no hard links, and without them two"):
        open_storage(str(tmp_path)).write_once("a", b"1")
    assert os.listdir(tmp_path) == []


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"1")
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "circle").symlink_to(data)
    (data / "dangling").symlink_to(tmp_path / "nowhere")
    (data / "file").symlink_to(tmp_path / "elsewhere" / "x")
    assert [found.key for found in open_storage(str(data)).list()] == ["file", "linked/x"]


def test_a_name_that_cannot_be_a_key_is_told(tmp_path: Path) -> None:
    (tmp_path / "a\\b").write_bytes(b"")
    with pytest.raises(StorageError, match=r"the file name 'a\\\\b' holds a backslash or a NUL; rename"):
        list(open_storage(str(tmp_path)).list())


@given(st.sets(st.text("ab./-", min_size=1, max_size=6).filter(lambda key: base.key_problem(key) is None)))
def test_listing_equals_a_sorted_dictionary(tmp_path_factory: pytest.TempPathFactory, keys: set[str]) -> None:
    storage = open_storage(str(tmp_path_factory.mktemp("keys")))
    # A folder cannot hold both `a` and `a/b`.
    keys = {key for key in keys if not any(other.startswith(f"{key}/") for other in keys)}
    for key in keys:
        storage.write(key, b"")
    for prefix in ["", *keys, *(key[:2] for key in keys if base.key_problem(key[:2]) is None)]:
        expected = sorted(key for key in keys if key.startswith(prefix))
        assert [found.key for found in storage.list(prefix)] == expected


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a/b", "/a/b"),
        ("/a/../b/", "/b"),
        ("file:///a/b%20c", "/a/b c"),
        ("file://localhost/a", "/a"),
        ("file:///a/what?#1", "/a/what?#1"),
        ("a", "{cwd}/a"),
        ("~/a", "{home}/a"),
    ],
)
def test_local_paths(uri: str, expected: str) -> None:
    expected = expected.format(cwd=Path.cwd(), home=Path.home())
    assert local_path(uri) == Path(expected)
    assert open_storage(uri).uri == expected
    assert isinstance(open_storage(uri), FolderStorage)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bkt", ("s3://bkt", "")),
        ("s3://bkt/", ("s3://bkt", "")),
        ("s3://bkt/x.json", ("s3://bkt", "x.json")),
        ("s3://bkt/d/*/x-?.json", ("s3://bkt/d", "*/x-?.json")),
        ("s3://bkt/d[0-9]/x", ("s3://bkt", "d[0-9]/x")),
        ("/d/x.json", ("/d", "x.json")),
        ("/d/", ("/d", "")),
        ("/*.json", ("/", "*.json")),
        ("file:///d/e/**/x", ("/d/e", "**/x")),
    ],
)
def test_uris_split_at_the_last_literal_folder(uri: str, expected: tuple[str, str]) -> None:
    assert split_uri(uri) == expected
    storage, key = open_parent(uri)
    assert (storage.uri, key) == expected


def test_join_uri() -> None:
    assert join_uri("/", "a") == "/a"
    assert join_uri("s3://bkt/", "a/b") == "s3://bkt/a/b"
    assert join_uri("s3://bkt", "") == "s3://bkt"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "'': not a folder; name a folder, file:///folder or s3://bucket/prefix"),
        ("file:///a%00", "'file:///a%00': not a folder; name a folder, file:///folder or s3://bucket/prefix"),
        ("gs://b/x", "gs://b/x: scheme 'gs' is not supported; use a folder, file:// or s3://"),
        ("file://host/a", "file://host/a: files of host 'host' are out of reach; write file:///host/a"),
        (
            "s3:///x",
            "'s3:///x' is no uri; did you mean s3://x?",
        ),
        (
            "s3://bkt/a/../c",
            "s3://bkt/a/../c: the prefix is absolute or has an empty, '.' or '..' part; write s3://bucket/prefix",
        ),
        (
            "s3://KEY:SECRET/PART@bucket/x",
            "an s3:// uri holds credentials or a host; write s3://bucket/prefix, and set AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL",
        ),
    ],
)
def test_bad_uris(uri: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        open_storage(uri)
    assert str(caught.value) == message


@pytest.mark.parametrize("module", [base, layout, values])
def test_examples_in_docstrings(module: object) -> None:
    results = doctest.testmod(module)  # type: ignore[arg-type]  # a module, as parametrize cannot say
    assert results.attempted
    assert not results.failed


def test_a_prefix_is_listed_without_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))
    for name in ("a", "ab", "b"):
        storage.write(f"adapters/{name}/versions/1", b"1")
    (tmp_path / "adapters/a/back").symlink_to(tmp_path / "adapters")
    looked: list[str] = []
    scandir = os.scandir

    def counted(folder: Path) -> object:
        looked.append(Path(folder).name)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counted)
    assert [found.key for found in storage.list("adapters/a/versions/")] == ["adapters/a/versions/1"]
    assert looked == ["versions"]
    assert [found.key for found in storage.list("adapters/a/v")] == ["adapters/a/versions/1"]
    # What the whole listing does not follow, no prefix leads into.
    for prefix in ("adapters/a/back/", "adapters/a/back/b/", "adapters/a/versions/1/", "none/at/all/"):
        assert list(storage.list(prefix)) == []


def test_what_a_killed_writer_left_is_found(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("blobs/a", b"1")
    for folder, touched in (("", 100.0), ("runs/job", 100.0), ("blobs", 300.0)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (left := tmp_path / folder / ".tmp-dead").write_bytes(b"half")
        os.utime(left, (touched, touched))
    os.utime(tmp_path / "blobs/a", (100.0, 100.0))
    old = [f"{tmp_path}/.tmp-dead", f"{tmp_path}/runs/job/.tmp-dead"]
    assert storage.discard_unfinished(200.0, dry_run=True) == old
    assert storage.discard_unfinished(200.0) == old
    assert storage.discard_unfinished(200.0) == []
    assert (storage.read("blobs/a"), (tmp_path / "blobs/.tmp-dead").exists()) == (b"1", True)
