"""Of several drivers one holds a run: who is refused, who takes over, who has to stop."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import WrappedStorage

from raytune_ft.catalog.layout import numbered
from raytune_ft.errors import RunHeld, StorageError
from raytune_ft.storage import FolderStorage, ObjectInfo, Storage, open_storage
from raytune_ft.train import lease as lease_module
from raytune_ft.train.lease import LEASE, Holder, Lease, check_holds, hold, newest_entry

RENEW_S = 0.05
EXPIRES_S = 2.0
"""Long beside a renewal, so that a busy machine expires none."""


def holding(storage: Storage, token: str, **times: float) -> Lease:
    return Lease(storage, Holder.here(token), **{"renew_s": RENEW_S, "expires_s": EXPIRES_S, **times})


def quiet(_: str) -> None:
    raise AssertionError("nobody was to be waited for")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def left_by(storage: Storage, holder: Holder, number: int = 1) -> None:
    storage.write_once(numbered(LEASE, number), json.dumps(asdict(holder)).encode())


def elsewhere(token: str = "theirs") -> Holder:
    return replace(Holder.here(token), host="node-7", process_space="another machine")


def is_lost(lease: Lease) -> bool:
    try:
        lease.check()
    except RunHeld:
        return True
    return False


def test_one_after_another_holds_it_at_once(storage: Storage) -> None:
    for token in ("first", "second"):
        with hold(storage, token, on_wait=quiet) as lease:
            lease.check()
            check_holds(storage, token)
        with pytest.raises(RunHeld, match="the driver of this run has ended; the same command goes on"):
            check_holds(storage, token)
    assert [found.key for found in storage.list()] == [numbered(LEASE, 4)], "the log is kept short"


def test_the_second_is_refused_as_soon_as_the_first_renews(storage: Storage) -> None:
    told: list[str] = []
    with (
        hold(storage, "first", on_wait=quiet, renew_s=RENEW_S, expires_s=60),
        pytest.raises(
            RunHeld, match=r"process \d+, since 20.* is at work on this run; wait until it has ended"
        ),
        hold(storage, "second", on_wait=told.append, renew_s=RENEW_S, expires_s=60),
    ):
        pass
    assert [line[:13] for line in told] == ["Waiting up to"]


def test_of_many_at_once_one_holds_it(storage: Storage) -> None:
    together = threading.Barrier(6)

    def take(token: str) -> str | None:
        together.wait()
        try:
            with hold(storage, token, on_wait=lambda _: None, renew_s=RENEW_S, expires_s=60):
                time.sleep(1)
                return token
        except RunHeld:
            return None

    with ThreadPoolExecutor(6) as threads:
        held = [token for token in threads.map(take, map(str, range(6))) if token]
    assert len(held) == 1


def test_a_lost_holder_elsewhere_is_waited_for_and_no_longer(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    left_by(storage, elsewhere())
    told: list[str] = []
    began = time.monotonic()
    with hold(storage, "ours", on_wait=told.append, renew_s=RENEW_S, expires_s=0.5):
        assert time.monotonic() - began >= 0.3
        check_holds(storage, "ours")
    (line,) = told
    assert line.startswith("Waiting up to 1 s for node-7, process ")


def test_a_holder_that_died_on_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    source = (
        "import sys, os, signal; from raytune_ft.storage import open_storage; "
        "from raytune_ft.train.lease import hold\n"
        "with hold(open_storage(sys.argv[1]), 'theirs', on_wait=print): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", source, str(tmp_path)], check=False)
    storage = open_storage(str(tmp_path))
    check_holds(storage, "theirs")
    with hold(storage, "ours", on_wait=quiet):
        check_holds(storage, "ours")


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    left_by(storage, replace(Holder.here("theirs"), pid=1, process_started_at=0.0))
    with hold(storage, "ours", on_wait=quiet):
        pass


def test_a_live_process_of_this_machine_is_refused_at_once(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = psutil.Process(other.pid).create_time()
        left_by(storage, replace(Holder.here("theirs"), pid=other.pid, process_started_at=started))
        with pytest.raises(RunHeld, match=f"process {other.pid}, "), hold(storage, "ours", on_wait=quiet):
            pass
        other.kill()
        other.communicate()


def test_who_was_paused_finds_out_and_writes_no_more(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    paused = holding(storage, "paused", renew_s=1.5, expires_s=60)
    paused.take(quiet)
    with hold(storage, "ours", on_wait=lambda _: None, renew_s=RENEW_S, expires_s=0.2):
        with pytest.raises(
            RunHeld, match=r"this driver was away for more than 60 s, and .* took over its run"
        ):
            check_holds(storage, "paused")
        paused.check()
        wait_until(lambda: is_lost(paused))
        entry = newest_entry(storage)
        paused.give_back()
        check_holds(storage, "ours")
        assert entry is not None
        assert entry.holder.token == "ours"


class AwayStorage(WrappedStorage):
    """Answers nothing for a while."""

    away = False

    def write_once(self, key: str, data: bytes) -> bool:
        if self.away:
            raise StorageError("the store is away")
        return super().write_once(key, data)


def test_a_store_that_is_away_takes_no_run_from_its_driver(tmp_path: Path) -> None:
    inner = open_storage(str(tmp_path))
    away = AwayStorage(inner)
    with hold(away, "ours", on_wait=quiet, renew_s=RENEW_S, expires_s=0.2) as lease:
        away.away = True
        before = newest_entry(inner)
        time.sleep(0.5)
        lease.check()
        assert newest_entry(inner) == before
        away.away = False
        wait_until(lambda: newest_entry(inner) != before)
        lease.check()
        check_holds(inner, "ours")


class LostAnswerStorage(WrappedStorage):
    """Does what it is asked, and says that it was done before."""

    def write_once(self, key: str, data: bytes) -> bool:
        super().write_once(key, data)
        return False


def test_a_lost_answer_is_no_refusal(tmp_path: Path) -> None:
    storage = LostAnswerStorage(FolderStorage(tmp_path))
    with hold(storage, "ours", on_wait=quiet, renew_s=RENEW_S) as lease:
        first = newest_entry(storage)
        wait_until(lambda: newest_entry(storage) != first)
        lease.check()


class HalfSeenStorage(WrappedStorage):
    """Is listed as a folder in the moment of a renewal: one entry is not seen yet, the other is gone."""

    hidden = 1

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        if self.hidden:
            self.hidden -= 1
            return iter(())
        return super().list(prefix, limit)


def test_a_look_in_the_moment_of_a_renewal_is_no_loss(tmp_path: Path) -> None:
    storage = HalfSeenStorage(FolderStorage(tmp_path))
    with hold(storage, "ours", on_wait=quiet):
        storage.hidden = 1
        check_holds(storage, "ours")
        assert not storage.hidden


def test_an_old_number_that_is_created_again_holds_nothing(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))

    class Late(WrappedStorage):
        """Between our look and our entry, the holder comes back, renews twice and removes old entries."""

        def write_once(self, key: str, data: bytes) -> bool:
            if key == numbered(LEASE, 2):
                left_by(storage, elsewhere(), 3)
                storage.delete(numbered(LEASE, 1))
            return super().write_once(key, data)

    left_by(storage, replace(elsewhere(), released=True))
    with (
        pytest.raises(RunHeld),
        hold(Late(storage), "ours", on_wait=lambda _: left_by(storage, elsewhere(), 4)),
    ):
        pass
    entry = newest_entry(storage)
    assert entry is not None
    assert entry.holder.token == "theirs"


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["take", "renew", "give back"])), max_size=30))
@settings(max_examples=60)
def test_nobody_renews_what_another_took(actions: list[tuple[int, str]]) -> None:
    """Whatever three drivers do in whatever order, without any of them hearing of the others."""
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        newest = 0
        written: list[tuple[str, str]] = [("", "")]
        seen = [0, 0, 0]
        for driver, action in actions:
            token = f"driver {driver}"
            lease = holding(storage, token)
            number = newest + 1 if action == "take" else seen[driver] + 1
            holder = replace(Holder.here(token), since="then", released=action == "give back")
            took = lease._append(number, holder)
            assert took == (number > newest or (number == newest and written[-1] == (token, action)))
            if took:
                newest, seen[driver] = number, number
                written.append((token, action))
            entry = newest_entry(storage)
            assert (entry.number if entry else 0) == newest


def test_a_process_that_is_hidden_may_be_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        holder = replace(Holder.here("theirs"), pid=other.pid)
        monkeypatch.setattr(psutil, "Process", hidden)
        assert holder.alive() is None
        other.kill()
        other.communicate()
    assert holder.alive() is False


def hidden(pid: int) -> psutil.Process:
    """As where /proc shows a user its own processes alone."""
    raise psutil.NoSuchProcess(pid)


def test_a_store_that_hangs_keeps_nobody_who_wants_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_RELEASE_S", 0.1)
    goes_on = threading.Event()

    class Hanging(WrappedStorage):
        def write_once(self, key: str, data: bytes) -> bool:
            assert key == numbered(LEASE, 1) or goes_on.wait(20)
            return super().write_once(key, data)

    storage = open_storage(str(tmp_path))
    began = time.monotonic()
    with hold(Hanging(storage), "ours", on_wait=quiet):
        pass
    assert time.monotonic() - began < 15
    check_holds(storage, "ours")
    goes_on.set()
    wait_until(lambda: bool((entry := newest_entry(storage)) and entry.holder.released))
