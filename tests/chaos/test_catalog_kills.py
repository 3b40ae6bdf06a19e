"""Publishers that are killed again and again, on each kind of store; and a store killed under them."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import publishers
import pytest
from faultproxy import Fault, FaultProxy, Request
from publishers import DEATHS, Race
from servers import S3Server, run_ceph

pytestmark = pytest.mark.chaos

SAMPLE = pytest.param((4, 12), id="sample")
SMALLER_SAMPLE = pytest.param((4, 6), id="sample")
ALL = pytest.param((16, 200), id="all", marks=pytest.mark.slow)


@pytest.mark.parametrize("size", [SAMPLE, ALL])
def test_killed_publishers_on_a_folder(tmp_path: Path, size: tuple[int, int]) -> None:
    race = Race(str(tmp_path / "catalog"), tmp_path / "work", *size)
    died = publishers.run(race)
    publishers.check(race)
    assert set(died) == set(DEATHS)


@pytest.mark.s3
@pytest.mark.parametrize("size", [ALL])
def test_killed_publishers_on_s3(bucket: str, tmp_path: Path, size: tuple[int, int]) -> None:
    race = Race(f"s3://{bucket}/team", tmp_path / "work", *size)
    died = publishers.run(race)
    publishers.check(race)
    assert set(died) == set(DEATHS)


@pytest.mark.s3
@pytest.mark.parametrize("size", [SMALLER_SAMPLE, ALL])
def test_killed_publishers_behind_a_bad_network(
    fault_proxy: FaultProxy, bucket: str, tmp_path: Path, size: tuple[int, int]
) -> None:
    chance = random.Random(0)

    def plan(request: Request) -> Fault | None:
        return chance.choice(list(Fault)) if chance.random() < 0.03 else None

    fault_proxy.plan = plan
    race = Race(f"s3://{bucket}/team", tmp_path / "work", *size)
    died = publishers.run(race)
    assert set(fault_proxy.faults) == set(Fault)
    fault_proxy.plan = lambda _: None
    publishers.check(race)
    assert set(died) == set(DEATHS)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("size", "kills"),
    [((4, 8), 2), pytest.param((4, 100), 10, marks=pytest.mark.slow)],
    ids=["sample", "all"],
)
def test_a_killed_gateway(
    s3_server: S3Server, bucket: str, tmp_path: Path, size: tuple[int, int], kills: int
) -> None:
    publish_while_the_store_dies(s3_server, bucket, tmp_path, size, kills)


@pytest.mark.s3
@pytest.mark.slow
def test_a_killed_store(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Monitor, disk and gateway at once."""
    if s3_server.kind != "ceph":
        pytest.skip(f"{s3_server.kind} cannot be killed")
    with run_ceph(tmp_path / "ceph", on_disk=True) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="catalog")
        client.close()
        publish_while_the_store_dies(server, "catalog", tmp_path, (4, 100), 4)


def publish_while_the_store_dies(
    server: S3Server, bucket: str, folder: Path, size: tuple[int, int], kills: int
) -> None:
    if not server.daemons:
        pytest.skip(f"{server.kind} cannot be killed")
    race = Race(f"s3://{bucket}", folder / "work", *size, kills=False)
    publishes, draw = race.publishers * race.each, random.Random(0)
    with ThreadPoolExecutor(1) as thread:
        # Not the kills: a daemon ends with the thread that started it.
        running = thread.submit(publishers.run, race)
        for kill in range(kills):
            while len(race.acknowledged()) <= publishes * kill / kills and not running.done():
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.1))
            assert not running.done(), "the publishers were done before the kill, or failed"
            server.kill()
            time.sleep(draw.uniform(0.0, 1.0))
            server.start()
        running.result()
    server.kill()
    server.start()
    publishers.check(race)
    assert len(race.acknowledged()) == publishes
