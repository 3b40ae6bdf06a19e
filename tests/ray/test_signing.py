"""`publish.sign`: the key is asked for before any work, on each side."""

from pathlib import Path

import pytest
from conftest import make_job  # type: ignore[import-not-found]  # this folder's

from raytune_ft.catalog import Catalog
from raytune_ft.errors import BadInput
from raytune_ft.spec import JobSpec
from raytune_ft.train.launch import train

pytestmark = pytest.mark.ray


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
def test_a_worker_without_a_key(
    job: JobSpec, tmp_path: Path, signing_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster was started without it, and only this process has it now."""
    monkeypatch.setenv("RAYTUNE_SIGNING_KEY", signing_key)
    with pytest.raises(BadInput, match=r"^RAYTUNE_SIGNING_KEY on .*: is not set; it must hold the PEM text"):
        train(job, tmp_path / "out")
    assert Catalog.at(job.publish.catalog).newest_versions() == {}
    assert not list(Path(job.publish.catalog).glob("runs/*/*/checkpoint_*"))
