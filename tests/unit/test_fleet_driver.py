"""What the driver of a fleet keeps in the bucket, where that fails now and then."""

from pathlib import Path

import pytest
from stores import WrappedStorage

from raytune_ft.errors import StorageError
from raytune_ft.fleet import run
from raytune_ft.fleet.run import QUEUE_FILE, _Snapshots
from raytune_ft.storage import Storage, open_storage


class Away(WrappedStorage):
    """Takes no write for a while."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.away = True

    def write(self, key: str, data: bytes | Path) -> None:
        if self.away:
            raise StorageError(f"{self.uri}/{key}: no answer")
        super().write(key, data)


@pytest.mark.parametrize("changed_since", [False, True])
def test_a_state_that_could_not_be_written_is_written_later(
    tmp_path: Path, changed_since: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Away(open_storage(str(tmp_path)))
    snapshots = _Snapshots(home)
    snapshots.keep(b"job a has failed")
    snapshots.wait(10.0)
    assert not snapshots.due
    home.away = False
    # The desk has nothing new to say, or it has.
    snapshots.keep(None)
    assert home.read_or_none(QUEUE_FILE) is None, "not at every turn"
    monkeypatch.setattr(run, "_SNAPSHOT_EVERY_S", 0.0)
    snapshots.due_at = 0.0
    snapshots.keep(b"so has b" if changed_since else None)
    snapshots.wait(10.0)
    assert home.read(QUEUE_FILE) == (b"so has b" if changed_since else b"job a has failed")
    home.write(QUEUE_FILE, b"another's")
    snapshots.keep(None)
    snapshots.wait(10.0)
    assert home.read(QUEUE_FILE) == b"another's", "what was written is not written again"
