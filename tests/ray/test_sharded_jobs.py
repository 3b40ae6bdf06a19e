"""Sharded jobs from the file to the published model on a real cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kill_once_kept, make_job  # type: ignore[import-not-found]  # this folder's
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_ft.catalog import Catalog, Signer, Trust
from raytune_ft.spec import JobSpec
from raytune_ft.train.launch import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def sharded_job(
    base: Path, capitals: Path, catalog: Path, *, steps: int = 12, sign: bool = False, **cluster: Any
) -> JobSpec:
    return make_job(
        base,
        capitals,
        catalog,
        method={"kind": "full"},
        # Adam divides by the gradient's own size, so a small epsilon would blow up the rounding of tiny ones.
        optimizer={"learning_rate": 1.0e-3, "epsilon": 1.0e-4},
        schedule={"steps": steps},
        cluster=cluster,
        publish={"catalog": str(catalog), "sign": sign},
    )


def published(job: JobSpec, to: Path, trust: Trust = Trust()) -> dict[str, torch.Tensor]:
    Catalog.at(job.publish.catalog).pull("capitals@v1", to, trust=trust)
    tensors: dict[str, torch.Tensor] = load_file(to / "model.safetensors")
    return tensors


@pytest.mark.slow
def test_divided_weights_become_the_model_that_whole_ones_become_also_when_a_worker_is_killed(
    base: Path, capitals: Path, tmp_path: Path
) -> None:
    whole = sharded_job(base, capitals, tmp_path / "whole")
    divided = sharded_job(base, capitals, tmp_path / "divided", elastic=[1, 2], zero_stage=3)
    killed: list[int] = []
    expected = train(whole, tmp_path / "out0")
    result = train(
        divided, tmp_path / "out3", on_event=kill_once_kept(divided.publish.catalog, killed, workers=1)
    )
    assert len(killed) == 1
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert result["scores_before"] == pytest.approx(expected["scores_before"], abs=1e-5)
    assert result["scores_after"]["token_loss"] < result["scores_before"]["token_loss"]
    ours, theirs = published(divided, tmp_path / "pulled3"), published(whole, tmp_path / "pulled0")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "pulled3")


def test_divided_weights_are_published_as_one_signed_model(
    base: Path, capitals: Path, tmp_path: Path, signing_key: str
) -> None:
    """By command, in a cluster of its own, whose workers have the key as the driver has."""
    job = sharded_job(base, capitals, tmp_path / "catalog", steps=4, workers=2, zero_stage=3, sign=True)
    (tmp_path / "job.yaml").write_text(json.dumps(job.resolved()))
    ended = subprocess.run(
        [Path(sys.executable).with_name("raytune-ft"), "train", "job.yaml", "--json"],
        cwd=tmp_path,
        env={**os.environ, "RAYTUNE_SIGNING_KEY": signing_key},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["scores_after"]["token_loss"] < result["scores_before"]["token_loss"]
    trust = Trust(frozenset({Signer.from_pem(signing_key, "test").public_key}), required=True)
    ours, start = published(job, tmp_path / "pulled", trust), load_file(base / "model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in start.items()}
    AutoModelForCausalLM.from_pretrained(tmp_path / "pulled")
    secret = signing_key.split("\n")[1].encode()
    assert not any(secret in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
