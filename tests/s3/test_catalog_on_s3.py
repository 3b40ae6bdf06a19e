"""The catalog on a real S3 server, and through a bad network. Many publishers: test_catalog_kills.py."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faultproxy import Fault, FaultProxy, Request
from stores import adapter_files, draft

from raytune_ft.catalog import Catalog, verify
from raytune_ft.errors import CatalogError

pytestmark = pytest.mark.s3


def test_publish_resolve_pull(bucket: str, tmp_path: Path) -> None:
    catalog = Catalog.at(f"s3://{bucket}/team/adapters")
    catalog.check()
    record = catalog.publish(draft(), adapter_files(tmp_path / "files"), publish_id="run-1")
    catalog.set_alias("capital", "candidate", 1)
    assert catalog.resolve("capital@candidate") == record
    assert catalog.aliases("capital") == {"candidate": 1}
    assert catalog.newest_versions() == {"capital": 1}
    assert record.uri(catalog.uri) == f"s3://{bucket}/team/adapters/adapters/capital/versions/9999999998.json"
    catalog.pull("capital", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "adapter_model.safetensors").read_bytes() == b"weights"


def test_one_promotion_wins_behind_a_bad_network(
    fault_proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    uri = f"s3://{bucket}"
    catalog = Catalog.at(uri)
    for number in range(1, 8):
        catalog.publish(draft(), adapter_files(tmp_path / "files"), publish_id=f"run-{number}")
    catalog.set_alias("capital", "production", 1)
    chance = random.Random(0)
    fault_proxy.plan = lambda _: chance.choice(list(Fault)) if chance.random() < 0.2 else None

    def promote(version: int) -> bool:
        try:
            Catalog.at(uri).set_alias("capital", "production", version, expect=1)
        except CatalogError:
            return False
        return True

    with ThreadPoolExecutor(6) as threads:
        won = list(threads.map(promote, range(2, 8)))
    fault_proxy.plan = lambda _: None
    assert won.count(True) == 1
    assert catalog.aliases("capital") == {"production": 2 + won.index(True)}
    assert list(catalog.alias_moves("capital", "production")) == [2, 1]
    # The content is no safetensors file; all else is sound after lost and repeated requests.
    (problem,) = verify(catalog).problems
    assert "adapter_model.safetensors" in problem


def test_every_answer_to_a_write_is_lost_once(fault_proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    """A lost answer to its own record or alias must not look like somebody else's."""
    seen: set[str] = set()

    def lose_first(request: Request) -> Fault | None:
        first = request.method == "PUT" and request.path not in seen
        seen.add(request.path)
        return Fault.LOST_ANSWER if first else None

    fault_proxy.plan = lose_first
    catalog = Catalog.at(f"s3://{bucket}")
    catalog.check()
    for number in range(2):
        files = adapter_files(tmp_path / "files", content=str(number).encode())
        assert catalog.publish(draft(), files, publish_id=f"run-{number}").version == number + 1
        catalog.set_alias("capital", "candidate", number + 1)
    assert list(catalog.versions("capital")) == [1, 2]
    assert catalog.aliases("capital") == {"candidate": 2}
    assert len(list(catalog.storage.list("adapters/capital/aliases/"))) == 2
