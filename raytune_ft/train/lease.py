"""The lease on a run: of several drivers that start the same run, one at a time works on it.

The lease is a log of entries in the run's folder. Taking it, renewing it and giving it back each append the
next entry, and put-if-absent lets one writer alone create it. So a driver that was paused, and whose lease
another took meanwhile, cannot renew it: it finds the other's entry in the place of its own, and stops. The
store's own clock measures the age of an entry, so that the clocks of two machines need not agree.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from raytune_ft.catalog.layout import numbered, numbers
from raytune_ft.errors import RunHeld, StorageDenied, StorageError
from raytune_ft.storage import Storage

LEASE = "lease/"
RENEW_S = 10.0
EXPIRES_S = 60.0
"""A holder that was killed is waited for so long after its last renewal."""
_POLL_S = 2.0
_RELEASE_S = 10.0
_LOOK_AGAIN_S = 0.1
_JOIN_S = 5.0
"""A renewal may be waiting for a store that is away."""
_LISTED = 100


@dataclass(frozen=True)
class Holder:
    """A driver, as an entry of the log names it."""

    token: str
    """Another for each launch."""
    host: str
    pid: int
    process_started_at: float
    """Of the process with this number, which another process may have later; seconds since the epoch."""
    process_space: str | None
    """Names the machine's boot and the container in which the process has its number; None: not known."""
    since: str
    released: bool = False

    @classmethod
    def here(cls, token: str) -> "Holder":
        """This process."""
        return cls(
            token=token,
            host=socket.gethostname(),
            pid=os.getpid(),
            process_started_at=psutil.Process().create_time(),
            process_space=_process_space(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}, since {self.since}"

    def alive(self) -> bool | None:
        """Whether the process is still there; None where that cannot be seen from here."""
        if self.process_space is None or self.process_space != _process_space() or self.pid == os.getpid():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_started_at) < 1.0
            return same and bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return _hidden_or_gone(self.pid)
        except psutil.AccessDenied:
            return None


def _hidden_or_gone(pid: int) -> bool | None:
    """None where /proc hides other users' processes, and this one may be one of them."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return None
    except OSError:
        return False
    return None


def _process_space() -> str | None:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # A link that cannot be resolved, only read.
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


@dataclass(frozen=True)
class Entry:
    """The newest entry of the log."""

    number: int
    written_at: float
    """By the store's clock, in seconds since the epoch; a bucket gives whole seconds."""
    holder: Holder


class Lease:
    """A lease that this process holds, and renews in a thread until it is given back."""

    def __init__(self, storage: Storage, holder: Holder, *, renew_s: float, expires_s: float) -> None:
        self._storage = storage
        self._holder = holder
        self._renew_s = renew_s
        self._expires_s = expires_s
        self._number = 0
        self._lost: RunHeld | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def check(self) -> None:
        """Do nothing while the lease is held, as far as this process knows; it makes no request.

        Raises:
            RunHeld: another driver took it, for this one was away for too long.
        """
        if self._lost is not None:
            raise self._lost

    def take(self, on_wait: Callable[[str], None]) -> None:
        """Wait for a holder that may be lost, and take its place.

        Raises:
            RunHeld: the holder is at work.
            StorageError: the store failed.
        """
        watched: int | None = None
        while True:
            entry = newest_entry(self._storage)
            left_s = self._left_s(entry)
            if entry is None or left_s <= 0:
                if self._append(entry.number + 1 if entry else 1, self._holder):
                    self._thread.start()
                    return
                continue
            if entry.holder.alive() or watched not in (None, entry.number):
                raise self._refusal(entry.holder)
            if watched is None:
                on_wait(f"Waiting up to {max(left_s, 1):.0f} s for {entry.holder}, which may be lost")
            watched = entry.number
            time.sleep(min(_POLL_S, self._renew_s / 4))

    def _left_s(self, entry: Entry | None) -> float:
        """For how long an entry still keeps others away."""
        if entry is None or entry.holder.released or entry.holder.alive() is False:
            return 0.0
        return self._expires_s - (_now(self._storage, self._holder.token) - entry.written_at)

    def give_back(self) -> None:
        """Stop renewing, and let others take the lease at once, unless they have."""
        self._ended.set()
        self._thread.join(_JOIN_S)
        if self._lost is None:
            # Who pressed Ctrl-C does not wait for a store that is away.
            last = threading.Thread(target=self._release, name="release", daemon=True)
            last.start()
            last.join(_RELEASE_S)

    def _release(self) -> None:
        # Where the store fails it expires by itself.
        with suppress(StorageError):
            self._append(self._number + 1, Holder(**{**asdict(self._holder), "released": True}))

    def _renew(self) -> None:
        while not self._ended.wait(self._renew_s):
            # A store that is away takes no run from its driver: nobody else can take the lease either.
            with suppress(StorageError):
                if not self._append(self._number + 1, self._holder):
                    self._lost = _lost_to(self._storage, newest_entry(self._storage))
                    return

    def _append(self, number: int, holder: Holder) -> bool:
        """Whether this very entry is the log's newest one. Older ones are removed."""
        key, content = numbered(LEASE, number), json.dumps(asdict(holder)).encode()
        # The store's answer to an earlier attempt may have been lost.
        if not self._storage.write_once(key, content) and self._storage.read_or_none(key) != content:
            return False
        entries = list(self._storage.list(LEASE, limit=_LISTED))
        # A number that was removed long ago can be created again by somebody who looked before that.
        if max((listed for _, listed in numbers(entries)), default=0) != number:
            return False
        self._number = number
        with suppress(StorageDenied):
            for entry in entries:
                if any(older < number for _, older in numbers([entry])):
                    self._storage.delete(entry.key)
        return True

    def _refusal(self, holder: Holder) -> RunHeld:
        return RunHeld(
            f"{self._storage.uri}: {holder} is at work on this run; wait until it has ended, or end it. "
            f"Once it is lost, the same command takes over within {self._expires_s:.0f} s"
        )


@contextmanager
def hold(
    storage: Storage,
    token: str,
    *,
    on_wait: Callable[[str], None],
    renew_s: float = RENEW_S,
    expires_s: float = EXPIRES_S,
) -> Iterator[Lease]:
    """Hold the lease on a run.

    Args:
        storage: the run's folder.
        token: names this launch; see `check_holds`.
        on_wait: told once, where a holder may be lost and is waited for.
        renew_s: how often it is renewed.
        expires_s: how long after the last renewal others may take it.

    Raises:
        RunHeld: another driver is at work on the run.
        StorageError: the store failed.
    """
    lease = Lease(storage, Holder.here(token), renew_s=renew_s, expires_s=expires_s)
    lease.take(on_wait)
    try:
        yield lease
    finally:
        lease.give_back()


def check_holds(storage: Storage, token: str) -> None:
    """Ask the store whether a launch holds the lease; a worker does, before it writes what others read.

    Raises:
        RunHeld: another launch took the lease, or it was given back.
        StorageError: the store failed.
    """
    give_up_at = time.monotonic() + EXPIRES_S
    pause_s = _LOOK_AGAIN_S
    # A folder is not listed at one moment: a renewal may replace one name by another meanwhile.
    while (entry := newest_entry(storage)) is None and time.monotonic() < give_up_at:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_S)
    if entry is None or entry.holder.token != token or entry.holder.released:
        raise _lost_to(storage, entry)


def _lost_to(storage: Storage, entry: Entry | None) -> RunHeld:
    if entry is None or entry.holder.released:
        return RunHeld(f"{storage.uri}: the driver of this run has ended; the same command goes on with it")
    return RunHeld(
        f"{storage.uri}: this driver was away for more than {EXPIRES_S:.0f} s, and {entry.holder}, took over "
        "its run, which goes on there"
    )


def newest_entry(storage: Storage) -> Entry | None:
    """The entry that counts; None where nobody ever held the run."""
    while True:
        found = next(iter(storage.list(LEASE, limit=1)), None)
        number = next((number for _, number in numbers([found])), None) if found else None
        if found is None or number is None:
            return None
        content = storage.read_or_none(found.key)
        # None: it was renewed between the two requests.
        if content is not None:
            return Entry(number, found.modified_at, Holder(**json.loads(content)))


def _now(storage: Storage, token: str) -> float:
    """The time by the store's clock, in seconds since the epoch."""
    key = f"{LEASE}now-{token}"
    storage.write(key, b"")
    found = storage.info(key)
    with suppress(StorageDenied):
        storage.delete(key)
    if found is None:
        raise StorageError(f"{storage.uri}/{key}: was removed while it was read; run again")
    return found.modified_at
