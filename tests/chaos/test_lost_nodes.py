"""Nodes that go, with a notice and without, and nodes that come."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from nodes import Driver, Nodes, run_nodes
from safetensors.torch import load_file

from raytune_ft.catalog import Catalog

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

STEPS = 700
GROWING_STEPS = 6000
"""A node that comes is looked for once a minute."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with run_nodes() as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[Nodes]:
    """Each test has only the nodes that it adds."""
    yield cluster
    cluster.clear()


def job_file(
    folder: Path,
    every_steps: int,
    cluster: dict[str, Any],
    *,
    steps: int = STEPS,
    catalog: str = "catalog",
    **changes: Any,
) -> Path:
    tiny.save_base(folder / "base")
    lines = [json.dumps({"prompt": f"Count to {n}:", "completion": f" {n % 9}{n % 7}"}) for n in range(60)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    job = {
        "name": "nodes",
        "model": {"path": str(folder / "base"), "weight_bits": 32},
        "data": {"sources": [{"uri": str(folder / "data.jsonl")}], "max_tokens": 64},
        "schedule": {"steps": steps},
        "batch": {"sequences": 8},
        "checkpoint": {"every_steps": every_steps},
        "cluster": cluster,
        "evaluate": {"metrics": []},
        "publish": {"catalog": str(folder / catalog)},
        **changes,
    }
    path = folder / f"{catalog}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def position(folder: Path) -> dict[str, Any]:
    """Where the newest complete checkpoint stands."""
    (listed,) = folder.rglob("checkpoint_manager_snapshot.json")
    newest = json.loads(listed.read_text())["latest_checkpoint_result"]["checkpoint_dir_name"]
    found: dict[str, Any] = json.loads((listed.parent / newest / "position.json").read_text())
    return found


def has_checkpoint(folder: Path, workers: int | None = None) -> bool:
    """Whether there is one, of so many workers."""
    try:
        found = position(folder)["workers"]
    except (ValueError, FileNotFoundError):
        return False  # None yet, or another took its place between two looks.
    return workers in (None, found)


def weights(catalog: Path, to: Path) -> dict[str, torch.Tensor]:
    Catalog.at(str(catalog)).pull("nodes@v1", to)
    tensors: dict[str, torch.Tensor] = load_file(to / "model.safetensors")
    return tensors


def test_a_node_that_is_taken_away_with_notice_costs_no_step(nodes: Nodes, tmp_path: Path) -> None:
    # Without a checkpoint before, and without a restart to spend.
    job = job_file(tmp_path, 10 * STEPS, {"max_restarts": 0, "max_preemptions": 1})
    first = nodes.add()
    driver = Driver(job, nodes.address)
    driver.wait_for(lambda: driver.said("Training"))
    nodes.add()
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


def test_an_elastic_run_that_loses_a_node_goes_on_with_fewer_workers(nodes: Nodes, tmp_path: Path) -> None:
    job = job_file(tmp_path, 20, {"elastic": [1, 2]})
    _, goes = nodes.add(), nodes.add()
    driver = Driver(job, nodes.address)
    driver.wait_for(lambda: has_checkpoint(tmp_path, workers=2))
    nodes.kill(goes)
    result = driver.result()
    assert (result["steps"], result["version"]) == (STEPS, 1)
    assert position(tmp_path)["workers"] == 1


def test_an_elastic_run_takes_up_a_node_that_comes(nodes: Nodes, tmp_path: Path) -> None:
    job = job_file(tmp_path, 100, {"elastic": [1, 2], "max_restarts": 0}, steps=GROWING_STEPS)
    nodes.add()
    driver = Driver(job, nodes.address)
    driver.wait_for(lambda: has_checkpoint(tmp_path, workers=1))
    nodes.add()
    driver.wait_for(lambda: has_checkpoint(tmp_path, workers=2))
    result = driver.result()
    assert (result["steps"], result["version"]) == (GROWING_STEPS, 1)
    assert position(tmp_path)["workers"] == 2


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_from_four_workers_to_two_to_three(nodes: Nodes, tmp_path: Path, zero_stage: int) -> None:
    changes: dict[str, Any] = {
        "method": {"kind": "full"},
        # Adam divides by the gradient's own size, so a small epsilon would blow up the rounding of tiny ones.
        "optimizer": {"learning_rate": 1e-4, "epsilon": 1e-4},
        "steps": GROWING_STEPS // 3,
    }
    there = [nodes.add() for _ in range(4)]
    quiet = job_file(tmp_path, 500, {"zero_stage": zero_stage}, catalog="quiet", **changes)
    Driver(quiet, nodes.address).result()
    cluster = {"elastic": [2, 4], "zero_stage": zero_stage}
    driver = Driver(job_file(tmp_path, 20, cluster, catalog="elastic", **changes), nodes.address)
    elastic = tmp_path / "elastic"
    driver.wait_for(lambda: has_checkpoint(elastic, workers=4))
    for node in there[2:]:
        nodes.kill(node)
    driver.wait_for(lambda: has_checkpoint(elastic, workers=2))
    nodes.add()
    driver.wait_for(lambda: has_checkpoint(elastic, workers=3))
    assert driver.result()["version"] == 1
    ours, expected = weights(elastic, tmp_path / "ours"), weights(tmp_path / "quiet", tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)
