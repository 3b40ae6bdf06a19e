"""Five hundred jobs of two steps in one fleet: each is published once, and memory does not grow with them."""

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import tiny
import yaml
from nodes import Driver

from raytune_ft.catalog import Catalog

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

JOBS = 500
SETTLED = 100
"""Jobs after which caches are filled."""
MOST_GROWTH_BYTES = {"driver": 24 << 20, "lane": 64 << 20, "desk": 24 << 20}


@dataclass
class Sizes:
    """Resident memory of the driver and of what it started, while the fleet goes on."""

    settled: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def look(self, driver: int, done: int) -> None:
        found = {"driver": 0}
        with contextlib.suppress(psutil.NoSuchProcess):
            found["driver"] = psutil.Process(driver).memory_info().rss
            for process in psutil.Process(driver).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    name = process.name()
                    kind = "lane" if "RayTrainWor" in name else "desk" if "Desk" in name else ""
                    if kind:
                        found[kind] = process.memory_info().rss
        if done >= SETTLED and found.keys() == MOST_GROWTH_BYTES.keys():
            self.settled = self.settled or found
            self.last = found


def fleet_file(folder: Path) -> Path:
    tasks = folder / "tasks"
    tasks.mkdir()
    for number in range(JOBS):
        lines = (
            json.dumps({"prompt": f"{number} and {n}:", "completion": f" {(number + n) % 97}"})
            for n in range(8)
        )
        (tasks / f"task-{number:03}.jsonl").write_text("\n".join(lines))
    fleet = {
        "name": "many",
        "defaults": {
            "model": {"path": str(folder / "base"), "weight_bits": 32},
            "data": {"max_tokens": 64, "split": {"validation": 0, "test": 0}},
            "method": {"rank": 2},
            "schedule": {"steps": 2},
            "batch": {"sequences": 4},
            "cluster": {"device": "cpu"},
            "evaluate": {"metrics": []},
            "publish": {"catalog": str(folder / "catalog")},
        },
        "for_each": {"glob": str(tasks / "*.jsonl")},
        "lanes": {"slots": 8},
    }
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump(fleet))
    return path


def test_five_hundred_jobs(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base")
    driver = Driver(fleet_file(tmp_path), "local", command="fleet")
    sizes, runs = Sizes(), tmp_path / "catalog" / "runs"
    while driver.process.poll() is None:
        sizes.look(driver.process.pid, sum(1 for _ in runs.glob("*/*/result.json")))
        time.sleep(1.0)
    result = driver.result()
    names = [f"task-{number:03}" for number in range(JOBS)]
    assert (result["done"], result["failed"], result["queued"]) == (JOBS, 0, 0)
    assert [(job["name"], job["version"], job["steps"]) for job in result["jobs"]] == [
        (name, 1, 2) for name in names
    ]
    assert Catalog.at(str(tmp_path / "catalog")).newest_versions() == dict.fromkeys(names, 1)
    assert sizes.last, "never were all of them seen"
    for kind, most_bytes in MOST_GROWTH_BYTES.items():
        assert sizes.last[kind] - sizes.settled[kind] < most_bytes, (kind, sizes)
