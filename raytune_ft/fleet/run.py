"""The driver of a fleet: checks what needs no GPU, opens the desk, keeps lanes at work."""

import json
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from raytune_ft.catalog import Catalog, Signer
from raytune_ft.catalog.gate import as_of_now
from raytune_ft.errors import ModelError, RunHeld, SpecError, StorageError, TrainingError
from raytune_ft.fleet.desk import Desk, News, Order
from raytune_ft.fleet.entry import Entry
from raytune_ft.fleet.events import FleetResult
from raytune_ft.fleet.lanes import CHANNEL_CHARACTERS, LANES, Lanes, place_lanes
from raytune_ft.fleet.placement import Placed
from raytune_ft.fleet.plan import FleetPlan, plan_fleet
from raytune_ft.fleet.queue import Queue
from raytune_ft.fleet.story import OnFleetEvent, Story
from raytune_ft.model_files import base_identity, model_folder, read_facts
from raytune_ft.spec import FleetSpec, JobSpec
from raytune_ft.spec.problems import message
from raytune_ft.storage import Storage, disk_errors, join_uri, open_storage
from raytune_ft.train.budgets import cause
from raytune_ft.train.launch import inputs_of, ray_session
from raytune_ft.train.lease import Lease, hold
from raytune_ft.train.parts import missing_parts
from raytune_ft.train.run import Run, digest

LEASE_S = 30.0
"""How long after its last word a lane counts as lost. That its process is gone is known sooner."""
MOST_BARREN_LOSSES = 3
"""So many lanes may be lost one after another without having come to anything; see `Barren`."""
QUEUE_FILE = "queue.json"
SETTINGS_FILE = "settings.json"
_POLL_S = 0.2
_SNAPSHOT_EVERY_S = 5.0
_CLOSE_S = 15.0
_LEAVE_S = 3.0
_READERS = 16


def run_fleet(
    fleet: FleetSpec,
    output: Path,
    *,
    place_name: str = "fleet",
    retry_failed: bool = False,
    cache: bool = True,
    wait_s: float = 0.0,
    on_event: OnFleetEvent = lambda _: None,
) -> FleetResult:
    """Train all jobs of a fleet that are not done, or go on with it where it stopped.

    What was done is known from the bucket alone: from each job's own folder that it is done, from the fleet's
    what failed and how often lanes were lost. A job that changed since, or whose data or base did, runs anew.

    Args:
        fleet: the checked fleet file.
        output: local folder for what is kept of the fleet.
        place_name: the fleet's file, for messages.
        retry_failed: train what failed before once more.
        cache: keep tokenised data in the bucket, and take it from there.
        wait_s: how long to wait for an autoscaler to bring the first GPU.
        on_event: hears of everything, in this thread; see `raytune_ft.fleet.events`.

    Returns:
        What became of every job; that one failed is no error here.

    Raises:
        BadInput: found before anything was trained.
        RunHeld: another driver is at work on the fleet.
        TrainingError: lanes were lost again and again.
        StorageError: the store failed for longer than the retries last.
    """
    story = Story(on_event)
    plan = plan_fleet(
        fleet,
        lambda path: read_facts(model_folder(path, weights=False)),
        place_name=place_name,
        device_bytes=None,
        flops_per_s=None,
    )
    placed = [job for group in plan.groups for job in group.jobs]
    _check([job.spec for job in placed], place_name)
    _prepare_output(output)
    orders = _orders(placed)
    home = _home(fleet, placed)
    channel = uuid.uuid4().hex
    with hold(home, channel, on_wait=story.notice) as lease:
        queue, done = _open_queue(fleet, placed, orders, home, retry_failed=retry_failed)
        story.plan(plan, placed, queue, done)
        if not queue.ended:
            _train(plan, queue, orders, home, lease, channel, story, cache=cache, wait_s=wait_s)
    return story.result(fleet.name)


def _check(jobs: Sequence[JobSpec], place_name: str) -> None:
    """Refuse what would fail after hours.

    Raises:
        BadInput: jobs want different devices, name parts that their base does not have, or there is no key
            to sign with.
        StorageError: a catalog cannot be written.
    """
    devices = {job.cluster.device: job.name for job in jobs}
    if len(devices) > 1:
        named = ", ".join(f"{device} ({name})" for device, name in sorted(devices.items()))
        raise SpecError(
            f"{place_name}: cluster.device differs between jobs: {named}; lanes are all of one kind, so set "
            "it in defaults, or make two fleets"
        )
    if wrong := missing_parts(jobs):
        raise ModelError(message(place_name, [f"{name}: {error}" for name, error in wrong.items()]))
    for catalog in sorted({job.publish.catalog for job in jobs}):
        Catalog.at(catalog).check()
    if any(job.publish.sign for job in jobs):
        Signer.from_environment()


def _prepare_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise SpecError(f"--output {output}: is a file; name a folder")
    with disk_errors(str(output)):
        output.mkdir(parents=True, exist_ok=True)


def _orders(placed: Sequence[Placed]) -> dict[str, Order]:
    """Every job with the name of what it reads."""
    bases = {path: base_identity(path) for path in sorted({job.spec.model.path for job in placed})}
    with ThreadPoolExecutor(_READERS) as pool:
        inputs = pool.map(lambda job: inputs_of(job.spec, bases[job.spec.model.path]), placed)
        return {job.spec.name: Order(job.spec, found) for job, found in zip(placed, inputs, strict=True)}


def _home(fleet: FleetSpec, placed: Sequence[Placed]) -> Storage:
    """The fleet's folder: beside the runs of its jobs, in the catalog of the first by name."""
    catalog = min(placed, key=lambda job: job.spec.name).spec.publish.catalog
    return open_storage(join_uri(catalog.rstrip("/"), f"fleets/{fleet.name}"))


def _open_queue(
    fleet: FleetSpec,
    placed: Sequence[Placed],
    orders: Mapping[str, Order],
    home: Storage,
    *,
    retry_failed: bool,
) -> tuple[Queue, dict[str, dict[str, Any]]]:
    """The queue as the bucket tells it, and the results of what is done."""
    snapshot = home.read_or_none(QUEUE_FILE)
    known = Queue.restored(snapshot, join_uri(home.uri, QUEUE_FILE)).entries if snapshot else {}
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda job: _result_of(job.spec, orders[job.spec.name]), placed)
        done = {job.spec.name: result for job, result in zip(placed, found, strict=True) if result}
    jobs, previous = [], {}
    for job in placed:
        name = job.spec.name
        # Another content of the same files is another job: it has its losses and its failure behind it.
        queued = replace(job.queued, digest=digest([job.queued.digest, orders[name].inputs]))
        jobs.append(queued)
        if name in done:
            previous[name] = Entry(queued, "done")
        elif name in known and known[name].state != "done":
            previous[name] = known[name]
    queue = Queue(
        jobs, lanes=fleet.lanes.max, lease_s=LEASE_S, on_failure=fleet.on_failure, previous=previous
    )
    if retry_failed:
        queue.retry_failed()
    return queue, done


def _result_of(job: JobSpec, order: Order) -> dict[str, Any] | None:
    result = Run(job).finished(order.inputs)
    return None if result is None else as_of_now(result, Catalog.at(job.publish.catalog))


class _Snapshots:
    """The queue's state on its way to the bucket. It tells a restart what failed; no result rests on it.

    It is written in a thread: the fleet does not stand still for a store that is away.
    """

    def __init__(self, home: Storage) -> None:
        self._home = home
        self._unsent: bytes | None = None
        self._thread: threading.Thread | None = None
        self.due_at = 0.0

    @property
    def due(self) -> bool:
        return time.monotonic() >= self.due_at

    def keep(self, snapshot: bytes | None) -> None:
        """Write the newest one; what could not be written is tried again when the next is due."""
        self._unsent = snapshot or self._unsent
        under_way = self._thread is not None and self._thread.is_alive()
        if self._unsent is None or under_way or not (snapshot or self.due):
            return
        self.due_at = time.monotonic() + _SNAPSHOT_EVERY_S
        content, self._unsent = self._unsent, None
        self._thread = threading.Thread(target=self._write, args=(content,), daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Until nothing is on its way, or the time is over."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _write(self, content: bytes) -> None:
        try:
            self._home.write(QUEUE_FILE, content)
        except StorageError:
            self._unsent = self._unsent or content


def _train(
    plan: FleetPlan,
    queue: Queue,
    orders: Mapping[str, Order],
    home: Storage,
    lease: Lease,
    channel: str,
    story: Story,
    *,
    cache: bool,
    wait_s: float,
) -> None:
    """Keep lanes at work until the queue has ended."""
    device = next(iter(orders.values())).job.cluster.device

    def tell(event: dict[str, Any]) -> None:
        story.notice(event["phase"])

    with ray_session() as own:
        placement = place_lanes(device, plan.fleet.lanes.max, wait_s, tell)
        placement = replace(placement, threads=_threads(home, placement.threads))
        # Beside the driver, with which it ends.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        desk = (
            ray.remote(Desk)
            .options(num_cpus=0, label_selector=here)
            .remote(queue, orders, plan.groups, lease_s=LEASE_S, began_at=story.began_at)
        )
        lanes = Lanes(desk, placement, home.uri, channel, cache=cache, own_cluster=own, tell=tell)
        snapshots = _Snapshots(home)
        try:
            # At once: the desk is still on its way, as they are.
            lanes.start(min(plan.fleet.lanes.max, queue.counts.get("queued", 0)))
            _follow(desk, lanes, plan.fleet.lanes.max, lease, story, snapshots)
            if not own:
                # Those that still wait for room end by themselves.
                lanes.wait(_LEAVE_S)
        except ray.exceptions.RayError as error:
            raise TrainingError(
                f"the fleet's desk, a process beside this one, was lost: {cause(error)}; the same command "
                "goes on from the last checkpoints"
            ) from None
        finally:
            _close(desk, home, lease, channel, snapshots)


def _close(desk: Any, home: Storage, lease: Lease, channel: str, snapshots: _Snapshots) -> None:
    """Keep the queue's state, and remove what Ray Train wrote of the lanes."""
    try:
        lease.check()
    except RunHeld:
        # The fleet is another driver's, and so are its files.
        ray.kill(desk)
        return
    with suppress(ray.exceptions.RayError):
        snapshots.wait(_CLOSE_S)
        snapshots.due_at = 0.0
        snapshots.keep(ray.get(desk.news.remote(snapshot=True)).snapshot)
    ray.kill(desk)

    def remove() -> None:
        with suppress(StorageError):
            for found in list(home.list(f"{LANES}{channel[:CHANNEL_CHARACTERS]}")):
                home.delete(found.key)

    # Not for longer: who pressed Ctrl-C does not wait for a store that is away.
    removing = threading.Thread(target=remove, daemon=True)
    removing.start()
    removing.join(_CLOSE_S)
    snapshots.wait(_CLOSE_S)


def _follow(desk: Any, lanes: Lanes, most: int, lease: Lease, story: Story, snapshots: _Snapshots) -> None:
    while True:
        lease.check()
        lanes.look()
        news: News = ray.get(desk.news.remote(snapshot=snapshots.due))
        snapshots.keep(news.snapshot)
        story.take(news)
        if news.ended:
            break
        check_barren(news)
        if news.counts.get("queued", 0) and not news.stopped:
            lanes.start(min(most, news.counts.get("queued", 0) + news.counts.get("leased", 0)))
        lanes.tell_waiting(joined=story.lanes_joined > 0)
        time.sleep(_POLL_S)
    give_up_at = time.monotonic() + _CLOSE_S
    # All is done: who is lost now is not missed.
    with suppress(ray.exceptions.RayError):
        while story.at_work and time.monotonic() < give_up_at:
            time.sleep(_POLL_S)
            story.take(ray.get(desk.news.remote()))


def check_barren(news: News) -> None:
    """Give up where one lane after another is lost and none comes to train; several may be lost at once.

    Raises:
        TrainingError: so it is.
        StorageError: so it is, and it was the store that failed.
    """
    if news.barren.losses > max(MOST_BARREN_LOSSES, news.lanes):
        kind = StorageError if news.barren.cause == "store" else TrainingError
        raise kind(
            f"{news.barren.losses} lanes were lost one after another before any of them came to anything; "
            f"the last one: {news.barren.reason}; the same command goes on from the last checkpoints"
        )


def _threads(home: Storage, threads: int) -> int:
    """CPU threads of a lane, as they were when the fleet began: their number shows in the last bits."""
    home.write_once(SETTINGS_FILE, json.dumps({"threads": threads}).encode())
    try:
        return int(json.loads(home.read(SETTINGS_FILE))["threads"])
    except (ValueError, KeyError, TypeError):
        place = join_uri(home.uri, SETTINGS_FILE)
        raise StorageError(f"{place}: not the settings of a fleet; remove it, and run again") from None
