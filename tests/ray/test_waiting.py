"""What a driver says while it waits for the cluster, and how it is ended."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import make_job  # type: ignore[import-not-found]  # this folder's
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from raytune_ft.catalog.layout import numbered
from raytune_ft.errors import BadInput, RunHeld
from raytune_ft.spec import ClusterSpec
from raytune_ft.train import room
from raytune_ft.train.launch import train
from raytune_ft.train.lease import LEASE, Holder, newest_entry
from raytune_ft.train.placement import Placement
from raytune_ft.train.room import BusyCluster, find_room
from raytune_ft.train.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

NEEDS = Placement(False, 1, 1.5, 1)


@contextmanager
def group(cpus: float, *, ready: bool) -> Iterator[PlacementGroup]:
    made = placement_group([{"CPU": cpus}])
    assert made.wait(10 if ready else 0.1) is ready
    try:
        yield made
    finally:
        remove_placement_group(made)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def busy(told: list[str], monkeypatch: pytest.MonkeyPatch) -> BusyCluster:
    monkeypatch.setattr(room, "TOLD_AFTER_S", 0.0)
    monkeypatch.setattr(room, "SILENT_S", 0.2)
    return BusyCluster(ClusterSpec(), NEEDS, lambda event: told.append(event["phase"]))


def test_each_wait_is_told_once(busy: BusyCluster, told: list[str]) -> None:
    said = "Waiting for room in the cluster: the run needs 1.5 CPU, and 1 are free"
    for spell in range(2):
        with group(1.0, ready=True), group(1.5, ready=False):
            for _ in range(3):
                busy.look(came=False)
        assert told == [said] * (spell + 1)
        with group(1.5, ready=True):
            busy.look(came=True)


def test_workers_that_do_not_start(busy: BusyCluster, told: list[str]) -> None:
    with group(1.5, ready=True):
        for _ in range(3):
            busy.look(came=False)
            time.sleep(0.25)
    assert len(told) == 1
    assert told[0].startswith("The workers have had room for 0 s, and none has started; their logs are")


def test_workers_that_have_started_are_left_alone(busy: BusyCluster, told: list[str]) -> None:
    with group(1.5, ready=True):
        for came in (False, True, False):
            busy.look(came=came)
            time.sleep(0.25)
    assert told == []


def test_another_job_that_waits_is_not_this_one(busy: BusyCluster, told: list[str], cluster: str) -> None:
    source = (
        "import sys, ray; from ray.util import placement_group; "
        "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); "
        "placement_group([{'CPU': 1.5}]).wait(0.1); print('there', flush=True); input()"
    )
    with (
        group(1.0, ready=True),
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", source, cluster],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other,
    ):
        assert other.stdout is not None
        assert other.stdout.readline() == b"there\n"
        busy.look(came=False)
        other.communicate(b"\n")
    assert told == []


def test_a_gpu_is_waited_for_before_the_cpu_is_taken(told: list[str]) -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")

    def tell(event: dict[str, Any]) -> None:
        told.append(event["phase"])

    assert not find_room(ClusterSpec(), 0.3, tell).use_gpu
    assert told == [
        "Waiting up to 0 s for more nodes: the cluster has no GPU",
        "No GPU has come within 0 s: training on CPU",
    ]
    for quiet in (ClusterSpec(device="cpu"), ClusterSpec()):
        assert not find_room(quiet, 30.0 if quiet.device == "cpu" else 0.0, tell).use_gpu
    assert len(told) == 2
    with pytest.raises(BadInput, match="the cluster has no GPU; add a GPU node"):
        find_room(ClusterSpec(device="gpu"), 0.3, tell)


def test_a_driver_that_lost_the_run_removes_nothing(base: Path, capitals: Path, tmp_path: Path) -> None:
    job = make_job(base, capitals, tmp_path / "catalog", evaluate={"metrics": []})
    storage = Run(job).storage
    storage.write("checkpoint_theirs/a", b"weights")

    def take_over(event: dict[str, Any]) -> None:
        entry = newest_entry(storage)
        if event["phase"] == "data" and entry:
            theirs = json.dumps(asdict(Holder.here("other"))).encode()
            storage.write_once(numbered(LEASE, entry.number + 5), theirs)

    with pytest.raises(RunHeld, match="took over its run, which goes on there"):
        train(job, tmp_path / "out", on_event=take_over)
    assert storage.read("checkpoint_theirs/a") == b"weights"


def test_sigterm_is_ctrl_c(cluster: str) -> None:
    source = (
        "import os, signal; from raytune_ft.train.launch import ray_session\n"
        "try:\n"
        "    with ray_session(): os.kill(os.getpid(), signal.SIGTERM); signal.pause()\n"
        "except KeyboardInterrupt: print('interrupted', signal.getsignal(signal.SIGTERM).name)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "interrupted SIG_DFL\n"), ended.stderr
