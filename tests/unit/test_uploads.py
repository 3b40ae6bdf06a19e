"""What stands on a worker's disk on its way to the store, and what counts as sent."""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from ray.train.v2._internal.execution.local_mode.utils import LocalController

from raytune_ft.errors import RaytuneError, RunHeld, StorageError
from raytune_ft.storage import open_storage
from raytune_ft.train.uploads import Uploads, send_folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def uploads(tmp_path: Path, *, rank: int = 0) -> Uploads:
    def fail(error: RaytuneError) -> None:
        raise AssertionError(error)

    return Uploads(open_storage(str(tmp_path / "run")), rank, may_write=lambda: None, on_failure=fail)


def write(folder: Path) -> None:
    (folder / "part").write_bytes(b"weights")


def test_a_folder_that_was_removed_is_not_sent(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(StorageError, match="gone: was removed before it was sent"):
        send_folder(open_storage(str(tmp_path)), scratch / "gone", "checkpoint_1", may_write=lambda: None)


def test_a_run_that_is_taken_over_while_the_last_file_is_sent_keeps_no_checkpoint(
    tmp_path: Path, scratch: Path
) -> None:
    sent = tmp_path / "run" / "checkpoint_1" / "part"

    def may_write() -> None:
        if sent.exists():
            raise RunHeld("another driver")

    write(scratch)
    with pytest.raises(RunHeld):
        send_folder(open_storage(str(tmp_path / "run")), scratch, "checkpoint_1", may_write=may_write)


def test_what_ended_workers_left_is_removed_and_what_others_hold_stays(tmp_path: Path, scratch: Path) -> None:
    first = uploads(tmp_path, rank=1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = first._local.name.rpartition("-")[0].rpartition("-")[0]
    for kept, removed in (
        (f"{name}-1-1", f"{name}-1-{ended.pid}"),
        (f"{name}0-1-1", f"{name}-7-{ended.pid}"),
    ):
        for folder in (kept, removed):
            (scratch / folder / "8").mkdir(parents=True)
    uploads(tmp_path, rank=3)
    assert {folder.name for folder in scratch.iterdir()} == {f"{name}-1-1", f"{name}0-1-1"}


def test_a_report_that_ray_drops_does_not_stop_the_next(tmp_path: Path, scratch: Path) -> None:
    """Without workers, Ray Train takes a report and sends nothing, as it does where a worker was lost."""
    found = uploads(tmp_path)

    def train() -> None:
        for step in (1, 2):
            found.send(lambda: write, {"step": step}, wait=True)

    # A daemon: where the second waits forever, the tests do not.
    thread = threading.Thread(target=lambda: LocalController("e").run(train), daemon=True)
    thread.start()
    thread.join(20.0)
    assert not thread.is_alive()
    assert list(scratch.iterdir()) == []
