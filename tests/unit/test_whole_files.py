"""What Ray Train writes into a folder: a file of it is whole or not there."""

import pickle
from pathlib import Path

import pyarrow.fs
import pytest

from raytune_ft.errors import StorageError
from raytune_ft.storage import arrow_filesystem


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    filesystem, root = arrow_filesystem(str(tmp_path))
    path = tmp_path / "list.json"
    for content in (b"old", b"new and longer"):
        before = path.read_bytes() if path.exists() else None
        with filesystem.open_output_stream(f"{root}/list.json") as stream:
            stream.write(content)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["list.json"]


def test_a_writer_that_fails_or_forgets_changes_nothing(tmp_path: Path) -> None:
    filesystem, root = arrow_filesystem(str(tmp_path))
    path = tmp_path / "list.json"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), filesystem.open_output_stream(str(path)) as stream:
        stream.writelines([b"half", "no bytes"])
    filesystem.open_output_stream(str(path)).write(b"half")
    assert path.read_bytes() == b"old"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="stands where a folder is needed"):
        filesystem.open_output_stream(f"{root}/file/list.json").close()


def test_ray_knows_it_as_local_in_every_process(tmp_path: Path) -> None:
    filesystem, _ = arrow_filesystem(str(tmp_path))
    again = pickle.loads(pickle.dumps(filesystem))
    assert type(again) is type(filesystem)
    assert isinstance(again, pyarrow.fs.LocalFileSystem)
