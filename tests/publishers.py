"""Processes that publish into one catalog and are killed on the way, readers beside them, and what must hold.

A publisher does its list of publishes in children. A child goes on where the list stands until it is killed:
before or after a write of each kind in turn, or by a timer in the midst of anything. The next child repeats
the same publish id, but for a few that nobody ever repeats.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path

from stores import WrappedStorage, adapter_files, draft

from raytune_ft.catalog import AdapterRecord, Catalog, CatalogView, alias_history, list_catalog, verify
from raytune_ft.storage import Storage, open_storage

KINDS = ("publishes", "blobs", "versions", "aliases")
DEATHS = (*((when, kind) for kind in KINDS for when in ("before", "after")), ("during", "anything"))
SHARED = ("shared-a", "shared-b")
READERS = 2
_ABANDONED = 0.05


@dataclass(frozen=True)
class Race:
    """Who publishes how much, and where."""

    uri: str
    folder: Path
    """For the files to publish and what each process notes down."""
    publishers: int
    each: int
    kills: bool = True
    """False: the publishers live; something else is killed."""

    def publish_id(self, publisher: int, number: int) -> str:
        """Name of one publish."""
        return f"run-{publisher}-{number}"

    def adapter(self, publisher: int, number: int) -> str:
        """Two of three publishes go where all others publish too."""
        return (*SHARED, f"own-{publisher}")[number % 3]

    @property
    def stopped(self) -> Path:
        """Is there once the readers should stop."""
        return self.folder / "stopped"

    def acknowledged(self, publisher: int | None = None) -> dict[str, tuple[str, int]]:
        """Adapter and version of each publish id that a publisher, or any, was told to be published."""
        pattern = "acknowledged-*" if publisher is None else f"acknowledged-{publisher}"
        lines = [line for path in self.folder.glob(pattern) for line in path.read_text().splitlines()]
        return {publish_id: (adapter, int(version)) for publish_id, adapter, version in map(str.split, lines)}

    def abandoned(self) -> set[str]:
        """Publish ids that were begun and never repeated."""
        return {line for path in self.folder.glob("abandoned-*") for line in path.read_text().splitlines()}


def weights(publish_id: str) -> bytes:
    """The least that is a safetensors file, another for each publish."""
    header = json.dumps({"__metadata__": {"publish_id": publish_id}}).encode()
    return len(header).to_bytes(8, "little") + header


def run(race: Race) -> Counter[tuple[str, str]]:
    """Let all publishers finish, with readers beside them all the while.

    Returns:
        How often a publisher was killed, by when and at what.
    """
    race.folder.mkdir(parents=True)
    with readers(race), _processes(race.publishers) as pool:
        parts = list(pool.map(publish_all, [race] * race.publishers, range(race.publishers)))
    return sum(parts, Counter())


@contextmanager
def readers(race: Race) -> Iterator[None]:
    """Two processes that read all the while, until the end of the context; what they see must be whole."""
    with _processes(READERS) as pool:
        looks = [pool.submit(read_all_the_while, race, number) for number in range(READERS)]
        try:
            yield
        finally:
            race.stopped.touch()
        assert all(each.result() > 0 for each in looks), "a reader saw no version at all"


def _processes(number: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))


def publish_all(race: Race, publisher: int) -> Counter[tuple[str, str]]:
    """One publisher's list, through as many children as it takes; how they died."""
    draw = random.Random(publisher)
    died: Counter[tuple[str, str]] = Counter()
    fates = islice(cycle(DEATHS), 2 * publisher, None)
    abandoned: list[str] = []
    while (at := len(race.acknowledged(publisher)) + len(abandoned)) < race.each:
        fate, spared, after_s = next(fates), draw.randint(0, 2), draw.uniform(0.001, 0.3)
        child = os.fork()
        if not child:
            _live_and_die(race, publisher, at, fate if race.kills else None, spared, after_s)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "a publisher failed by itself; see the captured stderr"
            continue
        died[fate] += 1
        begun = race.publish_id(publisher, len(race.acknowledged(publisher)) + len(abandoned))
        if draw.random() < _ABANDONED:
            abandoned.append(begun)
            (race.folder / f"abandoned-{publisher}").write_text("\n".join(abandoned))
    return died


def _live_and_die(
    race: Race, publisher: int, start: int, fate: tuple[str, str] | None, spared: int, after_s: float
) -> None:
    """In a child: publish from `start` on until the end of the list or of this process."""
    status = 1
    try:
        storage = open_storage(race.uri)
        if fate is not None and fate[0] == "during":
            signal.setitimer(signal.ITIMER_REAL, after_s)  # SIGALRM, which ends a process that minds it not.
        elif fate is not None:
            storage = DyingStorage(storage, fate, spared)
        for number in range(start, race.each):
            _publish(race, Catalog(storage), publisher, number)
        status = 0
    finally:
        os._exit(status)


def _publish(race: Race, catalog: Catalog, publisher: int, number: int) -> None:
    publish_id, adapter = race.publish_id(publisher, number), race.adapter(publisher, number)
    files = adapter_files(race.folder / publish_id, content=weights(publish_id))
    version = catalog.publish(draft(adapter=adapter), files, publish_id=publish_id).version
    catalog.set_alias(adapter, "candidate", version, forward_only=True)
    if number % 4 == 0:
        catalog.set_alias(adapter, "production", version)
    with (race.folder / f"acknowledged-{publisher}").open("ab", buffering=0) as notes:
        notes.write(f"{publish_id} {adapter} {version}\n".encode())


class DyingStorage(WrappedStorage):
    """Kills this process before or after a write of one kind, sparing the first few."""

    def __init__(self, inner: Storage, fate: tuple[str, str], spared: int) -> None:
        super().__init__(inner)
        self.when, self.kind = fate
        self.spared = spared

    def write(self, key: str, data: bytes | Path) -> None:
        self._meet("before", key)
        super().write(key, data)
        self._meet("after", key)

    def write_once(self, key: str, data: bytes) -> bool:
        self._meet("before", key)
        created = super().write_once(key, data)
        self._meet("after", key)
        return created

    def _meet(self, when: str, key: str) -> None:
        if when == self.when and self.kind in key.split("/"):
            self.spared -= 1
            if self.spared < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def read_all_the_while(race: Race, reader: int) -> int:
    """Resolve, list, pull and check until the race is over; how many versions were pulled."""
    catalog, draw, pulled = CatalogView(open_storage(race.uri)), random.Random(reader), 0
    seen: dict[tuple[str, str], int] = {}
    for look in count():
        over = race.stopped.exists()
        newest = catalog.newest_versions()
        for adapter in draw.sample(sorted(newest), min(3, len(newest))):
            latest = catalog.resolve(adapter)
            _never_back(seen, (adapter, "newest"), newest[adapter], latest.version)
            aliases = catalog.aliases(adapter)
            if "candidate" in aliases:
                candidate = catalog.resolve(f"{adapter}@candidate").version
                _never_back(seen, (adapter, "candidate"), aliases["candidate"], candidate)
            reference = draw.choice([adapter, f"{adapter}@v{draw.randint(1, latest.version)}"])
            _pull(catalog, reference)
            pulled += 1
        if look % 5 == 0 or over:
            listing = list_catalog(catalog)
            assert not listing.damaged, listing.damaged
            assert {record.adapter for record, _ in listing.rows} >= set(newest)
        if over:
            return pulled
    raise AssertionError


def _never_back(seen: dict[tuple[str, str], int], what: tuple[str, str], *versions: int) -> None:
    """What one reader sees one after the other never gets older."""
    for version in versions:
        assert version >= seen.get(what, 0), f"{what} went back to {version}"
        seen[what] = version


def _pull(catalog: CatalogView, reference: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        record = catalog.pull(reference, Path(folder) / "pulled")
        found = {path.name: path.read_bytes() for path in (Path(folder) / "pulled").iterdir()}
    assert len(found) == 3
    assert found["adapter_model.safetensors"] == weights(record.publish_id)


def check(race: Race) -> None:
    """Nothing lost, nothing twice, no gap, nothing half visible."""
    catalog = Catalog.at(race.uri)
    acknowledged, abandoned = race.acknowledged(), race.abandoned()
    assert len(acknowledged) + len(abandoned) == race.publishers * race.each
    records = _records(catalog)
    found = {record.publish_id: (record.adapter, record.version) for record in records}
    assert len(found) == len(records), "a publish made two versions"
    assert acknowledged.items() <= found.items()
    assert found.keys() - acknowledged.keys() <= abandoned
    for adapter in catalog.newest_versions():
        versions = sorted(record.version for record in records if record.adapter == adapter)
        assert versions == list(range(1, len(versions) + 1))
        _check_aliases(
            catalog, adapter, [version for name, version in acknowledged.values() if name == adapter]
        )
    sound = verify(catalog)
    assert sound.problems == ()
    assert sound.versions == len(records)
    left = {sha256 for publish_id in abandoned for sha256 in _names_of(publish_id)}
    assert {Path(note.partition(": ")[0]).stem for note in sound.notes} <= left


def _records(catalog: Catalog) -> list[AdapterRecord]:
    references = [
        (adapter, version) for adapter in catalog.newest_versions() for version in catalog.versions(adapter)
    ]
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda at: catalog.read(*at), references))


def _check_aliases(catalog: Catalog, adapter: str, acknowledged: list[int]) -> None:
    moves = alias_history(catalog, adapter, "candidate")
    assert list(moves) == list(range(len(moves), 0, -1))
    versions = [move.version for move in moves.values()]
    assert versions == sorted(set(versions), reverse=True), "a forward move went back"
    assert versions[0] >= max(acknowledged)


def _names_of(publish_id: str) -> tuple[str, str]:
    """Under what a publish that made no version may have left something."""
    return publish_id, hashlib.sha256(weights(publish_id)).hexdigest()
