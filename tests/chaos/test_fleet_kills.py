"""A fleet on nodes that go, whichever and whenever: each adapter is there once, with the same bits.

An autoscaler brings the first nodes, and others for those that are gone.
"""

import random
from pathlib import Path

import pytest
import tiny
import yaml
from autoscaled import Autoscaled, run_autoscaled
from lanes import adapter, fleet_of, job_on, same, write_task
from nodes import Driver

from raytune_ft.catalog import Catalog

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

STEPS = {f"task-{at}": 60 + 20 * at for at in range(12)}
LANES = 2
KILLS = 5


def fleet_file(folder: Path, catalog: str) -> Path:
    """Twelve jobs of different lengths, on two lanes."""
    jobs = {
        name: job_on(
            folder / f"{name}.jsonl",
            schedule={"steps": steps},
            method={"rank": 2 + at, "dropout": 0.1 * (at % 2)},
            cluster={"max_restarts": 100},
        )
        for at, (name, steps) in enumerate(STEPS.items())
    }
    fleet = fleet_of(folder / "base", folder / catalog, jobs, lanes={"max": LANES, "slots": 4})
    path = folder / f"{catalog}.yaml"
    path.write_text(yaml.safe_dump(fleet.model_dump(mode="json", exclude_defaults=True)))
    return path


def steps_kept(folder: Path) -> int:
    """Steps that need not be done again: by the newest checkpoints of all jobs."""
    newest: dict[Path, int] = {}
    for file in (folder / "killed" / "runs").glob("*/*/kept/*.json"):
        newest[file.parent] = max(newest.get(file.parent, 0), int(file.name.partition("-")[0]))
    return sum(newest.values())


def kill_some(cluster: Autoscaled, folder: Path, draw: random.Random) -> tuple[Driver, list[str]]:
    """Kill nodes, and in between the driver, whenever the fleet has come a little further.

    Returns:
        The driver that goes on, and the nodes that are gone.
    """
    driver, gone = Driver(folder / "killed.yaml", cluster.address, command="fleet"), []
    for at in range(KILLS):
        further = steps_kept(folder) + draw.randint(1, sum(STEPS.values()) // (KILLS + 1))
        driver.wait_for(lambda further=further: steps_kept(folder) >= further)
        if at == KILLS // 2:
            driver.end()
            driver = Driver(folder / "killed.yaml", cluster.address, name="again", command="fleet")
        elif (node := cluster.kill_one(draw)) is not None:
            gone.append(node)
    return driver, gone


@pytest.mark.parametrize("seed", range(2))
def test_random_kills_leave_no_trace(tmp_path: Path, seed: int) -> None:
    tiny.save_base(tmp_path / "base")
    for name in STEPS:
        write_task(tmp_path, name)
    with run_autoscaled(LANES) as cluster:
        quiet = Driver(fleet_file(tmp_path, "quiet"), cluster.address, name="quiet", command="fleet")
        quiet.result(timeout_s=900)
    with run_autoscaled(LANES) as cluster:
        fleet_file(tmp_path, "killed")
        driver, gone = kill_some(cluster, tmp_path, random.Random(seed))
        driver.result(timeout_s=900)
    assert len(gone) >= KILLS // 2, "else nothing was put to the test"
    assert Catalog.at(str(tmp_path / "killed")).newest_versions() == dict.fromkeys(STEPS, 1)
    for name in STEPS:
        one = adapter(tmp_path / "quiet", name, tmp_path / "one" / name)
        assert same(one, adapter(tmp_path / "killed", name, tmp_path / "other" / name)), name
