"""Checkpoints of a fleet's job: whole or not there, and no more of them than may stay."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import KeepingStorage

from raytune_ft.errors import StorageError, StorageFull, StorageMissing
from raytune_ft.fleet.keeping import JobKeeping
from raytune_ft.storage import Storage, open_storage
from raytune_ft.train.kept import PREFIX, JobCheckpoints, KeptCheckpoint, superfluous


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_text(text)
    (folder / "position.json").write_text("{}")
    return folder


def add(kept: JobCheckpoints, folder: Path, step: int, loss: float | None = None) -> None:
    measured = {} if loss is None else {"validation_loss": loss}
    kept.add(written(folder / f"at-{step}", f"of step {step}"), step, measured, may_write=lambda: None)


def restored(kept: JobCheckpoints, folder: Path) -> tuple[int | None, str]:
    folder.mkdir()
    step = kept.restore(folder)
    file = folder / "weights.safetensors"
    return step, file.read_text() if file.exists() else ""


def test_the_newest_comes_back_and_the_oldest_go(storage: Storage, tmp_path: Path) -> None:
    kept = JobCheckpoints(storage, keep=2)
    assert restored(kept, tmp_path / "none") == (None, "")
    for step in (2, 10, 4):
        add(kept, tmp_path, step)
    assert restored(kept, tmp_path / "back") == (10, "of step 10")
    assert {key.key[len(PREFIX) :][:10] for key in storage.list(PREFIX)} == {f"{4:010d}", f"{10:010d}"}


@pytest.mark.parametrize("gone", ["weights.safetensors", "list", "cut off"])
def test_one_that_is_not_whole_is_none(storage: Storage, tmp_path: Path, gone: str) -> None:
    kept = JobCheckpoints(storage, keep=2)
    add(kept, tmp_path, 1)
    add(kept, tmp_path, 2)
    newest = [found.key for found in storage.list(f"{PREFIX}{2:010d}")]
    weights = next(key for key in newest if key.endswith("weights.safetensors"))
    if gone == "cut off":
        storage.write(weights, b"of st")
    else:
        storage.delete(weights if gone != "list" else next(key for key in newest if key.count("/") == 1))
    assert restored(kept, tmp_path / "back") == (1, "of step 1")
    if gone == "list":
        assert not list(storage.list(f"{PREFIX}{2:010d}")), "nobody will ask for its files"


@pytest.mark.parametrize(
    "content",
    [
        b"no JSON",
        b'{"name": "0000000009-00000000", "step": 9, "validation_loss": null, "size_bytes": {"../x": 1}}',
        b'{"name": "../../0000000009", "step": 9, "validation_loss": null, "size_bytes": {}}',
        b'{"name": "0000000009-00000000", "step": 9, "validation_loss": null, "size_bytes": {}, "more": 1}',
    ],
)
def test_a_list_that_leads_elsewhere_is_none(storage: Storage, tmp_path: Path, content: bytes) -> None:
    kept = JobCheckpoints(storage, keep=2)
    add(kept, tmp_path, 1)
    storage.write(f"{PREFIX}0000000009-00000000.json", content)
    assert restored(kept, tmp_path / "back") == (1, "of step 1")


@given(st.lists(st.floats(0, 10) | st.none(), min_size=1, max_size=8), st.integers(1, 4), st.booleans())
def test_what_may_go(losses: list[float | None], keep: int, keep_best: bool) -> None:
    kept = [KeptCheckpoint(f"{at:010d}-{at:08x}", at, loss, {}) for at, loss in enumerate(losses)]
    stay = [
        one for one in kept if one not in superfluous(kept, keep, "validation_loss" if keep_best else None)
    ]
    assert kept[-1] in stay
    if not keep_best:
        assert stay == kept[-keep:]
        return
    assert min(keep, len(kept)) <= len(stay) <= keep + 1
    gone = [one.validation_loss for one in kept if one not in stay and one.validation_loss is not None]
    best = sorted(one.validation_loss for one in stay if one.validation_loss is not None)[:keep]
    assert not gone or len(best) < keep or max(best) <= min(gone) or kept[-1].validation_loss in best
    measured = [loss for loss in losses if loss is not None]
    assert not measured or losses.index(min(measured)) in {one.step for one in stay}, "of equals the earlier"


class Gated(JobCheckpoints):
    """Adds nothing before a gate opens."""

    def __init__(self, storage: Storage, gate: threading.Event) -> None:
        super().__init__(storage, keep=9)
        self._gate = gate

    def add(self, *given: Any, **named: Any) -> int:
        self._gate.wait()
        return super().add(*given, **named)


class TestKeeping:
    def keeping(self, kept: Any, threads: ThreadPoolExecutor, folder: Path, told: list[int]) -> JobKeeping:
        return JobKeeping(kept, threads, folder, may_write=lambda: None, on_kept=told.append)

    def write(self, folder: Path) -> None:
        (folder / "weights.safetensors").write_text("weights")

    def test_who_comes_while_one_is_on_its_way_is_left_out_unless_it_matters(
        self, storage: Storage, tmp_path: Path
    ) -> None:
        gate, told = threading.Event(), list[int]()
        with ThreadPoolExecutor(2) as threads:
            keeping = self.keeping(Gated(storage, gate), threads, tmp_path, told)
            for step, wait in ((1, False), (2, False), (3, True)):
                keeping.send(lambda: self.write, {"step": step}, wait=wait)
            gate.set()
            keeping.drain()
        assert told == [1, 3]
        assert [upload.step for upload in keeping.finished()] == [1, 3]
        assert not list(tmp_path.glob("tmp*"))

    def test_the_best_so_far_is_not_left_out_and_gives_way_to_a_better_one(
        self, storage: Storage, tmp_path: Path
    ) -> None:
        gate, told = threading.Event(), list[int]()
        with ThreadPoolExecutor(4) as threads:
            keeping = self.keeping(Gated(storage, gate), threads, tmp_path, told)
            sent = ((1, False, True), (2, False, True), (3, False, False), (4, False, True), (5, True, False))
            keeping.send(lambda: self.write, {"step": 0}, wait=False)
            while keeping._waiting:
                pass
            for step, wait, needed in sent:
                keeping.send(lambda: self.write, {"step": step}, wait=wait, needed=needed)
            assert [one.step for one in keeping._waiting] == [4, 5]
            gate.set()
            assert sorted(keeping.kept()) == [0, 4, 5]
        assert told == [0, 4, 5]

    def test_nothing_is_kept_after_the_best_so_far_was_lost(self, storage: Storage, tmp_path: Path) -> None:
        """A later checkpoint would be gone on from, without the one that is published."""
        gate, told = threading.Event(), list[int]()

        class FullOnce(JobCheckpoints):
            def add(self, folder: Path, step: int, *given: Any, **named: Any) -> int:
                gate.wait()
                if step == 1:
                    raise StorageFull("no space")
                return super().add(folder, step, *given, **named)

        with ThreadPoolExecutor(4) as threads:
            keeping = self.keeping(FullOnce(storage, keep=9), threads, tmp_path, told)
            keeping.send(lambda: self.write, {"step": 1}, wait=False, needed=True)
            keeping.send(lambda: self.write, {"step": 2}, wait=True)
            gate.set()
            with pytest.raises(StorageFull, match="no space"), keeping.fetch(1):
                pass
            with pytest.raises(StorageFull, match="no space"):
                keeping.send(lambda: self.write, {"step": 3}, wait=True)
        assert not told
        assert not JobCheckpoints(storage, keep=9).steps()

    def test_a_kept_one_is_fetched_and_leaves_nothing_on_this_machine(
        self, storage: Storage, tmp_path: Path
    ) -> None:
        with ThreadPoolExecutor(2) as threads:
            keeping = self.keeping(JobCheckpoints(storage, keep=2), threads, tmp_path, [])
            keeping.send(lambda: self.write, {"step": 4, "validation_loss": 1.5}, wait=False)
            with keeping.fetch(4) as folder:
                assert (folder / "weights.safetensors").read_text() == "weights"
            with (
                pytest.raises(StorageMissing, match="the checkpoint of step 5 is not there"),
                keeping.fetch(5),
            ):
                pass
        assert not list(tmp_path.glob("tmp*"))

    def test_a_store_that_failed_ends_the_job_at_its_next_checkpoint(
        self, storage: Storage, tmp_path: Path
    ) -> None:
        class Full(JobCheckpoints):
            def add(self, *_: Any, **__: Any) -> int:
                raise StorageFull("no space")

        with ThreadPoolExecutor(1) as threads:
            keeping = self.keeping(Full(storage, keep=2), threads, tmp_path, [])
            keeping.send(lambda: self.write, {"step": 1}, wait=False)
            keeping.drain()
            with pytest.raises(StorageError, match="no space"):
                keeping.send(lambda: self.write, {"step": 2}, wait=False)


@pytest.mark.parametrize("may_delete", [True, False])
def test_one_that_is_of_no_use_makes_way_for_the_one_before(
    storage: Storage, tmp_path: Path, may_delete: bool
) -> None:
    kept = JobCheckpoints(storage if may_delete else KeepingStorage(storage), keep=3)
    for step in (1, 2, 3):
        add(kept, tmp_path, step)
    folder = tmp_path / "back"
    assert restored(kept, folder) == (3, "of step 3")
    assert kept.restore_older(folder) == 2
    assert (folder / "weights.safetensors").read_text() == "of step 2"
    assert kept.restore_older(folder) == 1
    assert kept.restore_older(folder) is None
    assert list(folder.iterdir()) == []
    assert bool(list(storage.list(PREFIX))) is not may_delete


def test_a_list_of_an_older_program_is_read(storage: Storage) -> None:
    listed = b'{"name": "0000000009-00000000", "step": 9, "validation_loss": 1.5, "size_bytes": {"x": 1}}'
    storage.write(f"{PREFIX}0000000009-00000000.json", listed)
    storage.write(f"{PREFIX}0000000009-00000000/x", b"x")
    assert JobCheckpoints(storage, keep=1).steps() == {9: f"{PREFIX}0000000009-00000000"}


def test_the_best_by_a_score_stay(storage: Storage, tmp_path: Path) -> None:
    kept = JobCheckpoints(storage, keep=1, best_by="exact_match")
    for step, value in ((2, 0.25), (4, 0.75), (6, 0.75), (8, 0.5)):
        measured = {"validation_loss": 1.0 / step, "exact_match": value}
        kept.add(written(tmp_path / f"{step}", ""), step, measured, may_write=lambda: None)
    assert sorted(kept.steps()) == [4, 8]


def test_a_list_that_was_written_after_its_files_were_removed_is_none(
    storage: Storage, tmp_path: Path
) -> None:
    kept = JobCheckpoints(storage, keep=1)
    add(kept, tmp_path, 5)
    (listed,) = [
        found.key
        for found in storage.list(PREFIX)
        if found.key.endswith(".json") and found.key.count("/") == 1
    ]
    late = listed.replace("0000000005", "0000000007")
    storage.write(late, storage.read(listed).replace(b"0000000005", b"0000000007").replace(b":5,", b":7,"))
    assert restored(kept, tmp_path / "there") == (5, "of step 5")
    add(kept, tmp_path, 9)
    assert restored(kept, tmp_path / "here") == (9, "of step 9")
