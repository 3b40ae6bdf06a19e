"""`publish.sign`: the key is asked for before any work, on each side, and signs what is published."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_job  # type: ignore[import-not-found]  # this folder's
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from raytune_ft.catalog import Catalog, Signer, Trust
from raytune_ft.errors import BadInput
from raytune_ft.spec import JobSpec
from raytune_ft.train.launch import train

pytestmark = pytest.mark.ray

PEM = (
    Ed25519PrivateKey.from_private_bytes(bytes(32))
    .private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    .decode()
)


@pytest.fixture
def job(base: Path, capitals: Path, tmp_path: Path) -> JobSpec:
    """A job of two steps that signs."""
    return make_job(
        base,
        capitals,
        tmp_path / "catalog",
        schedule={"steps": 2},
        evaluate={"metrics": []},
        publish={"catalog": str(tmp_path / "catalog"), "sign": True},
    )


def test_a_driver_without_a_key(job: JobSpec, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^RAYTUNE_SIGNING_KEY on .*: is not set; it must hold the PEM text"):
        train(job, tmp_path / "out")
    assert not list(Path(job.publish.catalog).glob("runs/*"))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_without_a_key(job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster was started without it, and only this process has it now."""
    monkeypatch.setenv("RAYTUNE_SIGNING_KEY", PEM)
    with pytest.raises(BadInput, match=r"^RAYTUNE_SIGNING_KEY on .*: is not set; it must hold the PEM text"):
        train(job, tmp_path / "out")
    assert Catalog.at(job.publish.catalog).newest_versions() == {}
    assert not list(Path(job.publish.catalog).glob("runs/*/*/checkpoint_*"))


def test_a_signed_version(job: JobSpec, tmp_path: Path) -> None:
    """In a cluster of its own, whose workers have the key as the driver has."""
    (tmp_path / "job.yaml").write_text(json.dumps(job.resolved()))
    subprocess.run(
        [Path(sys.executable).with_name("raytune-ft"), "train", "job.yaml", "--json"],
        cwd=tmp_path,
        env={**os.environ, "RAYTUNE_SIGNING_KEY": PEM},
        capture_output=True,
        check=True,
        timeout=300,
    )
    signer = Signer.from_pem(PEM, "test")
    catalog = Catalog.at(job.publish.catalog)
    catalog.pull("capitals", tmp_path / "pulled", trust=Trust(frozenset({signer.public_key}), required=True))
    secret = PEM.split("\n")[1]
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret.encode() in content for content in kept)
