"""Copies between a folder and a bucket behind a bad network, repeated until they succeed."""

import random
from pathlib import Path

import pytest
from faultproxy import Fault, FaultProxy, Request
from stores import adapter_files, draft

from raytune_ft.catalog import Catalog, copy_all_versions

pytestmark = pytest.mark.s3


def test_to_a_bucket_and_back(fault_proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    here, there, back = (
        Catalog.at(uri) for uri in (str(tmp_path / "here"), f"s3://{bucket}/there", str(tmp_path / "back"))
    )
    for number in range(3):
        files = adapter_files(tmp_path / "files", content=str(number).encode() * 500_000)
        here.publish(draft(steps=number), files, publish_id=f"run-{number}")
    chance = random.Random(0)

    def plan(request: Request) -> Fault | None:
        return chance.choice(list(Fault)) if chance.random() < 0.2 else None

    fault_proxy.plan = plan
    for source, target in ((here, there), (there, back), (here, there)):
        copies = copy_all_versions(source, target, "capital", alias="production")
        assert [copy.copied.version for copy in copies] == [1, 2, 3]
    fault_proxy.plan = lambda _: None
    assert set(fault_proxy.faults) == set(Fault)
    assert list(there.versions("capital")) == list(back.versions("capital")) == [1, 2, 3]
    assert list(there.alias_moves("capital", "production")) == [1]
    for number in range(3):
        record = back.pull(f"capital@v{number + 1}", tmp_path / str(number))
        assert record.origin is not None
        assert (record.origin.catalog, record.steps) == (here.uri, number)
        assert (tmp_path / str(number) / "adapter_model.safetensors").read_bytes() == b"%d" % number * 500_000
