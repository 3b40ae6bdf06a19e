"""The best checkpoint, published by a whole job on a real cluster; and any other that is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kill_once_kept  # type: ignore[import-not-found]  # this folder's
from overfitting import overfitting_job, write_keys
from safetensors.torch import load_file

from raytune_ft.catalog import Catalog
from raytune_ft.errors import SpecError
from raytune_ft.spec import JobSpec
from raytune_ft.train.launch import train
from raytune_ft.train.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_keys(tmp_path_factory.mktemp("data") / "keys.jsonl")


def published(job: JobSpec, version: int, to: Path) -> dict[str, torch.Tensor]:
    Catalog.at(job.publish.catalog).pull(f"keys@v{version}", to)
    tensors: dict[str, torch.Tensor] = load_file(to / "model.safetensors")
    return tensors


def kept(job: JobSpec, step: int, to: Path) -> dict[str, torch.Tensor]:
    run = Run(job)
    to.mkdir()
    run.fetch(run.kept_steps()[step], to)
    tensors: dict[str, torch.Tensor] = load_file(to / "trainable.safetensors")
    return tensors


def assert_equal(model: dict[str, torch.Tensor], checkpoint: dict[str, torch.Tensor]) -> None:
    assert checkpoint.keys() >= model.keys()
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in model.items())


def test_the_best_is_published_and_any_kept_step_on_request(base: Path, keys: Path, tmp_path: Path) -> None:
    job = overfitting_job(base, keys, tmp_path / "catalog")
    phases: list[dict[str, Any]] = []
    result = train(job, tmp_path / "out", on_event=phases.append)
    best = result["best"]
    assert result["steps"] == 16
    assert result["published_step"] == best["step"] < 15
    assert best["metric"] == "validation_loss"
    assert any(event["phase"].startswith(f"Going back to step {best['step']}") for event in phases)
    assert set(Run(job).kept_steps()) == {best["step"], 16}
    assert_equal(published(job, 1, tmp_path / "v1"), kept(job, best["step"], tmp_path / "best"))
    catalog = Catalog.at(job.publish.catalog)
    record = catalog.resolve("keys@v1")
    assert (record.steps, record.published_step) == (16, best["step"])
    assert record.scores_after == result["scores_after"]
    said = f"{best['step']} of 16, with the best validation_loss: {best['value']:.4g}"
    for page in (tmp_path / "v1" / "README.md", tmp_path / "out" / "report.html"):
        assert said in page.read_text()
    assert json.loads((tmp_path / "out" / "result.json").read_text())["best"] == best

    # Done stays done; another step is another version, and the run's own result stays.
    assert train(job, tmp_path / "out2")["version"] == 1
    last = train(job, tmp_path / "out3", publish_step=16)
    assert (last["version"], last["steps"], last["published_step"]) == (2, 16, 16)
    assert "best" not in last
    assert last["scores_after"] != result["scores_after"]
    assert_equal(published(job, 2, tmp_path / "v2"), kept(job, 16, tmp_path / "last"))
    assert train(job, tmp_path / "out5")["version"] == 1
    with pytest.raises(SpecError) as caught:
        train(job, tmp_path / "out6", publish_step=7)
    assert f"keeps no checkpoint of that step; kept are steps {best['step']} and 16; name one" in str(
        caught.value
    )


@pytest.mark.slow
def test_a_run_that_stops_early_on_two_workers_stops_there_also_after_a_kill(
    base: Path, keys: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    sections = {
        "schedule": {"steps": 60, "decay": "constant", "early_stopping": {"patience": 2}},
        "checkpoint": {"keep_best": False},
        "cluster": {"workers": 2, "zero_stage": 2},
        "optimizer": {"epsilon": 1.0e-4},
    }
    whole = overfitting_job(base, keys, tmp_path / "whole", **sections)
    broken = overfitting_job(base, keys, tmp_path / "broken", **sections)
    expected = train(whole, tmp_path / "out")
    result = train(
        broken, tmp_path / "out2", on_event=kill_once_kept(broken.publish.catalog, killed, workers=1)
    )
    assert len(killed) == 1
    for field in ("steps", "published_step", "best", "stopped_early"):
        assert result[field] == expected[field]
    assert expected["stopped_early"]["step"] == expected["steps"] < 60
    one, other = published(whole, 1, tmp_path / "one"), published(broken, 1, tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)
