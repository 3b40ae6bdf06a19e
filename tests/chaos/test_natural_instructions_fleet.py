"""Sixty tasks of Natural Instructions as the sixty jobs of one fleet, on two lanes."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from nodes import Driver, run_nodes

from raytune_ft.catalog import Catalog
from raytune_ft.spec.expand import job_name

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

TASKS = 60
STEPS = 4


@pytest.fixture
def tasks(shared_data: Path, tmp_path: Path) -> Path:
    """A folder with the tasks, each named by its number."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for file in shared_data.glob("tasks/natural_instructions*/task*.json"):
        shutil.copy(file, folder / f"{file.name.partition('_')[0]}.json")
    assert len(list(folder.iterdir())) == TASKS
    return folder


def fleet_file(folder: Path, tasks: Path) -> Path:
    fleet = {
        "name": "natural-instructions",
        "defaults": {
            "model": {"path": str(folder / "base"), "weight_bits": 32},
            "data": {"max_tokens": 512, "too_long": "cut", "split": {"validation": 0.0}},
            "method": {"rank": 4},
            "schedule": {"steps": STEPS},
            "batch": {"sequences": 4},
            "cluster": {"device": "cpu"},
            "evaluate": {"metrics": []},
            "publish": {"catalog": str(folder / "catalog")},
        },
        "for_each": {"glob": str(tasks / "*.json")},
        "lanes": {"max": 2, "slots": 4},
    }
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet))
    return path


def test_each_task_is_a_job_of_its_own(tasks: Path, tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", tiny.llama(positions=512))
    with run_nodes() as nodes:
        nodes.add(cpus=2)
        driver = Driver(fleet_file(tmp_path, tasks), nodes.address, command="fleet")
        result = driver.result()
    instances = {
        job_name("{stem}", file.name): len(json.loads(file.read_text())["Instances"])
        for file in tasks.iterdir()
    }
    assert (result["done"], len(result["jobs"])) == (TASKS, TASKS)
    assert {job["name"]: (job["version"], job["steps"]) for job in result["jobs"]} == dict.fromkeys(
        instances, (1, STEPS)
    )
    assert driver.said("lane-1: holds")
    assert driver.said("lane-2: holds")
    catalog = Catalog.at(str(tmp_path / "catalog"))
    assert catalog.newest_versions() == dict.fromkeys(instances, 1)
    for name, records in instances.items():
        counts = catalog.resolve(name).data["counts"]
        (source,), total = counts["sources"], counts["total"]
        assert source["uri"] == str(tasks / f"{name}.json")
        assert (total["records"], counts["estimated"]) == (records, False), name
        used = sum(total[split] for split in ("train", "validation", "test", "dropped", "bad"))
        assert used == records, name
