"""Nodes that go, with a notice and without, and nodes that come."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from nodes import Driver, Nodes, run_nodes

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

STEPS = 700


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with run_nodes() as nodes:
        yield nodes


def job_file(folder: Path, every_steps: int, cluster: dict[str, Any]) -> Path:
    tiny.save_base(folder / "base")
    lines = [json.dumps({"prompt": f"Count to {n}:", "completion": f" {n % 9}{n % 7}"}) for n in range(60)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    job = {
        "name": "nodes",
        "model": {"path": str(folder / "base"), "weight_bits": 32},
        "data": {"sources": [{"uri": str(folder / "data.jsonl")}], "max_tokens": 64},
        "schedule": {"steps": STEPS},
        "batch": {"sequences": 8},
        "checkpoint": {"every_steps": every_steps},
        "cluster": cluster,
        "evaluate": {"metrics": []},
        "publish": {"catalog": str(folder / "catalog")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def position(folder: Path) -> dict[str, Any]:
    """Where the newest complete checkpoint stands."""
    (listed,) = folder.rglob("checkpoint_manager_snapshot.json")
    newest = json.loads(listed.read_text())["latest_checkpoint_result"]["checkpoint_dir_name"]
    found: dict[str, Any] = json.loads((listed.parent / newest / "position.json").read_text())
    return found


def has_checkpoint(folder: Path) -> bool:
    return any(folder.rglob("checkpoint_manager_snapshot.json"))


def test_a_node_that_is_taken_away_with_notice_costs_no_step(nodes: Nodes, tmp_path: Path) -> None:
    # Without a checkpoint before, and without a restart to spend.
    job = job_file(tmp_path, 10 * STEPS, {"max_restarts": 0, "max_preemptions": 1})
    first = nodes.add()
    driver = Driver(job, nodes.address)
    driver.wait_for(lambda: driver.said("Training"))
    second = nodes.add()
    nodes.announce(first, deadline_s=6)
    driver.wait_for(lambda: driver.said("A node will be taken away: keeping a checkpoint of step"))
    driver.wait_for(lambda: has_checkpoint(tmp_path))
    kept = position(tmp_path)["step"]
    time.sleep(6)
    nodes.kill(first)
    result = driver.result()
    assert (result["steps"], result["version"]) == (STEPS, 1)
    assert 0 < kept < STEPS
    assert driver.said(f"Training  step {kept}/{STEPS}")
    nodes.kill(second)


def test_an_elastic_run_that_loses_a_node_goes_on_with_fewer_workers(nodes: Nodes, tmp_path: Path) -> None:
    job = job_file(tmp_path, 20, {"elastic": [1, 2]})
    stays, goes = nodes.add(), nodes.add()
    driver = Driver(job, nodes.address)
    driver.wait_for(lambda: has_checkpoint(tmp_path), timeout_s=240)
    assert position(tmp_path)["workers"] == 2
    nodes.kill(goes)
    result = driver.result(timeout_s=600)
    assert (result["steps"], result["version"]) == (STEPS, 1)
    assert position(tmp_path)["workers"] == 1
    nodes.kill(stays)
