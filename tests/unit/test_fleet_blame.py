"""Whose fault it is: what ends a job, what sends it elsewhere, what ends the lane; what outlives a lane."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from desks import desk_of
from lanes import Locked
from ray.exceptions import RayError

from raytune_ft.errors import (
    DataError,
    DeviceFailed,
    ModelError,
    OutOfMemory,
    RunHeld,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageMissing,
)
from raytune_ft.fleet import blame
from raytune_ft.fleet.attendance import Attendance, DeskGone, LaneUnfit, LeaseLost
from raytune_ft.fleet.blame import (
    Blame,
    DoesNotFit,
    UnusableCheckpoint,
    may_load_elsewhere,
    reading_checkpoint,
)
from raytune_ft.fleet.scratch import scratch_folder


class Panic(BaseException):
    """What libraries written in Rust raise."""


def settled(error: BaseException, *, store: Exception | None = None) -> tuple[str, BaseException | None]:
    """The state of a job that a lane met with an error on, and what the lane itself ends with."""
    desk, _ = desk_of("a")
    attendance = Attendance(Locked(desk), "lane-1", "node", "cpu")
    desk.take("lane-1", "base-1", 1)

    def ask_store() -> None:
        if store is not None:
            raise store

    Blame(attendance, ask_store).settle("a", error)
    try:
        attendance.check()
    except Exception as trouble:  # noqa: BLE001  whatever the lane ends with
        return desk._queue.entries["a"].state, trouble
    return desk._queue.entries["a"].state, None


@pytest.mark.parametrize(
    "error",
    [
        DataError("bad.jsonl: not JSON"),
        ModelError("no such layer"),
        ValueError("anything else"),
        StorageDenied("s3://private: denied"),
        Panic("index out of bounds"),
    ],
    ids=repr,
)
def test_what_a_job_is_to_blame_for(error: BaseException) -> None:
    assert settled(error) == ("failed", None)


@pytest.mark.parametrize(
    "error",
    [
        StorageFull("/tmp: the disk is full"),
        DeviceFailed("the device does not work any more"),
        LaneUnfit("no key to sign with"),
        RunHeld("another driver"),
        LeaseLost("lane-1"),
        DeskGone(),
        RayError("an object was lost"),
    ],
    ids=repr,
)
def test_what_it_is_not_to_blame_for(error: Exception) -> None:
    assert settled(error) == ("leased", error)


@pytest.mark.parametrize("kind", [StorageError, StorageDenied, StorageMissing])
def test_a_store_that_fails_whatever_it_is_asked_is_no_jobs(kind: type[StorageError]) -> None:
    error = kind("s3://adapters: no answer")
    assert settled(error, store=kind("s3://adapters: no answer")) == ("leased", error)


@pytest.mark.parametrize(
    "error",
    [
        DoesNotFit("needs 40 GiB"),
        OutOfMemory("full"),
        torch.OutOfMemoryError("CUDA out of memory"),
        StorageError("s3://adapters: its list is damaged"),
        StorageMissing("s3://adapters/x: no such object"),
    ],
    ids=repr,
)
def test_what_another_lane_may_do_is_queued_again(error: Exception) -> None:
    assert settled(error) == ("queued", None)


class Store:
    """Fails some times, and says whether it is away then or only fails what it is asked for."""

    def __init__(self, *answers: Any, away: bool) -> None:
        self.answers = list(answers)
        self.away = away
        self.paused: list[float] = []

    def act(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self) -> None:
        if self.away:
            raise StorageError("no answer")

    def insist(self) -> Any:
        desk, _ = desk_of("a")
        attendance = Attendance(Locked(desk), "lane-1", "node", "cpu")
        return Blame(attendance, self.ask).insist(self.act, self.paused.append)


def test_a_store_that_is_away_is_asked_again() -> None:
    store = Store(*[StorageError("away")] * 8, "found", away=True)
    assert store.insist() == "found"
    assert store.paused == [blame.PAUSE_S] * 8


def test_a_store_that_is_away_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "OUTAGE_S", -1.0)
    with pytest.raises(StorageError, match="away"):
        Store(StorageError("away"), "found", away=True).insist()


def test_what_a_store_that_answers_has_against_a_job_does_not_end_by_waiting() -> None:
    store = Store(*[StorageError("the list is damaged")] * 3, "found", away=False)
    with pytest.raises(StorageError, match="damaged"):
        store.insist()
    assert len(store.paused) == 2


@pytest.mark.parametrize("kind", [StorageDenied, StorageFull, StorageMissing, DataError])
def test_what_waiting_does_not_mend_is_not_waited_for(kind: type[Exception]) -> None:
    store = Store(kind("no"), "found", away=True)
    with pytest.raises(kind):
        store.insist()
    assert store.paused == []


def caused_by(error: Exception) -> ModelError:
    """As `load_base` says it."""
    try:
        try:
            raise error
        except Exception as inner:  # noqa: BLE001  the same
            raise ModelError(f"the model does not load: {inner}") from None
    except ModelError as found:
        return found


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (OSError(28, "No space left on device"), True),
        (OSError("Error no file named model.safetensors"), False),
        (FileNotFoundError(2, "No such file"), False),
        (ValueError("not a weight"), False),
    ],
    ids=repr,
)
def test_a_base_that_did_not_load_for_want_of_room(error: Exception, elsewhere: bool) -> None:
    assert may_load_elsewhere(caused_by(error)) is elsewhere


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (KeyError("step"), UnusableCheckpoint),
        (ModelError("the checkpoint is of another model"), UnusableCheckpoint),
        (DataError("the data changed"), UnusableCheckpoint),
        (FileNotFoundError("position.json"), UnusableCheckpoint),
        (OutOfMemory("full"), OutOfMemory),
        (StorageError("away"), StorageError),
    ],
    ids=repr,
)
def test_a_checkpoint_that_nobody_can_go_on_from(error: Exception, found: type[Exception]) -> None:
    with pytest.raises(found), reading_checkpoint():
        raise error


STUCK = """
import sys, time
from raytune_ft.fleet import attendance

class Desk:
    def join(self, *_): pass
    def beat(self, *_): return True
    def lose(self, lane, *, announced, reason): print(lane, announced, reason, flush=True)

attendance.BEAT_S, attendance.HANGS_AFTER_S = 0.02, 0.6
with attendance.Attendance(Desk(), "lane-1", "node", "cpu") as here:
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        time.sleep(0.005)
        time.sleep(0.01)
    with here.standing_still():
        time.sleep(1.5)
    print("alive", flush=True)
    time.sleep(60)
"""


def test_a_lane_that_hangs_ends_its_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 1
    assert ended.stdout.splitlines() == [
        "alive",
        "lane-1 False it stood in one place for 0 min; its log says where",
    ]
    assert "attendance.py" in ended.stderr


HOLD = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from raytune_ft.fleet.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "weights").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_killed_lanes_left_is_removed_and_what_others_hold_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lanes = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = [Path(lane.stdout.readline().strip()) for lane in lanes if lane.stdout]
    lanes[0].kill()
    lanes[0].wait()
    assert all(folder.is_dir() for folder in folders)
    with scratch_folder():
        assert folders[0].is_dir(), "as young as one that is not locked yet"
    for folder in folders:
        os.utime(folder, (time.time() - 3600,) * 2)
    with scratch_folder() as own:
        assert own.is_dir()
        assert not folders[0].exists()
        assert folders[1].is_dir()
    assert not own.exists()
    lanes[1].kill()
    for lane in lanes:
        lane.communicate()


def test_an_upload_does_not_wait_for_a_store_that_the_lane_has_given_up() -> None:
    desk, _ = desk_of("a")
    attendance = Attendance(Locked(desk), "lane-1", "node", "cpu")
    attendance.may_write()
    attendance.trouble(StorageError("s3://adapters: no answer"))
    with pytest.raises(LeaseLost):
        attendance.may_write()
    with pytest.raises(StorageError, match="no answer"):
        attendance.check()
