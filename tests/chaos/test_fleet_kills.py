"""A fleet on nodes that go, whichever and whenever: each adapter is there once, with the same bits."""

import random
from pathlib import Path

import pytest
import tiny
import yaml
from lanes import adapter, fleet_of, job_on, same, write_task
from nodes import Driver, Nodes, run_nodes

from raytune_ft.catalog import Catalog

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

JOBS = [f"task-{at}" for at in range(12)]
KILLS = 5


def fleet_file(folder: Path, catalog: str) -> Path:
    """Twelve jobs of different lengths, on two lanes."""
    jobs = {
        name: job_on(
            folder / f"{name}.jsonl",
            schedule={"steps": 60 + 20 * at},
            method={"rank": 2 + at, "dropout": 0.1 * (at % 2)},
            cluster={"max_restarts": 100},
        )
        for at, name in enumerate(JOBS)
    }
    fleet = fleet_of(
        folder / "base",
        folder / catalog,
        jobs,
        lanes={"max": 2, "slots": 4},
    )
    path = folder / f"{catalog}.yaml"
    path.write_text(yaml.safe_dump(fleet.model_dump(mode="json", exclude_defaults=True)))
    return path


def kept(folder: Path) -> set[Path]:
    """Checkpoints that are in the bucket, and results."""
    runs = folder / "killed" / "runs"
    return {*runs.glob("*/*/kept/*.json"), *runs.glob("*/*/result.json")}


def wait_until_further(driver: Driver, folder: Path, more: int) -> None:
    """Until so many checkpoints are new, or the fleet is done."""
    before = kept(folder)
    driver.wait_for(lambda: len(kept(folder) - before) >= more or driver.process.poll() == 0)


def take_away_some(nodes: Nodes, drivers: list[Driver], folder: Path, seed: int) -> None:
    """Kill nodes, and in between the driver, whenever the fleet has come a little further."""
    draw = random.Random(seed)
    there = [nodes.add() for _ in range(2)]
    for at in range(KILLS):
        wait_until_further(drivers[-1], folder, draw.randint(1, 12))
        if at == KILLS // 2:
            drivers[-1].end()
            drivers.append(Driver(folder / "killed.yaml", nodes.address, name="again", command="fleet"))
            continue
        nodes.kill(there.pop(draw.randrange(2)))
        there.append(nodes.add())


@pytest.mark.parametrize("seed", range(2))
def test_random_kills_leave_no_trace(tmp_path: Path, seed: int) -> None:
    tiny.save_base(tmp_path / "base")
    for name in JOBS:
        write_task(tmp_path, name)
    with run_nodes() as nodes:
        for _ in range(2):
            nodes.add()
        quiet = Driver(fleet_file(tmp_path, "quiet"), nodes.address, name="quiet", command="fleet")
        quiet.result(timeout_s=600)
    with run_nodes() as nodes:
        drivers = [Driver(fleet_file(tmp_path, "killed"), nodes.address, command="fleet")]
        take_away_some(nodes, drivers, tmp_path, seed)
        drivers[-1].result(timeout_s=900)
    for name in JOBS:
        versions = Catalog.at(str(tmp_path / "killed")).newest_versions()
        assert versions[name] == 1, "published once, however often it was killed"
        one = adapter(tmp_path / "quiet", name, tmp_path / "one" / name)
        assert same(one, adapter(tmp_path / "killed", name, tmp_path / "other" / name)), name
