"""What others read: PEFT a pulled adapter, and Ray's functions for adapters the folder of serve-dir."""

import asyncio
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from stores import draft

from raytune_ft.catalog import BaseModelRef, Catalog, update_serve_dir
from raytune_ft.methods.lora import add_lora, save_lora
from raytune_ft.spec import LoraSpec
from raytune_ft.storage import open_storage

IDS_BT = torch.arange(3, 19)[None]


def publish(catalog: Catalog, folder: Path, adapter: str, seed: int) -> torch.Tensor:
    """Publish an adapter that changes the base's answers; its logits."""
    model, spec = tiny.llama(), LoraSpec(rank=4)
    add_lora(model, spec, seed=seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    files = folder / f"{adapter}-{seed}"
    files.mkdir()
    save_lora(model, spec, files, "base")
    record = catalog.publish(
        draft(
            adapter=adapter,
            base=BaseModelRef(path="base", digest="d"),
            job={"data": {"max_tokens": 100 + seed}},
        ),
        {path.name: path for path in files.iterdir()},
        publish_id=f"{adapter}-{seed}",
    )
    catalog.set_alias(adapter, "production", record.version)
    with torch.no_grad():
        logits_BTV: torch.Tensor = model(IDS_BT).logits
    return logits_BTV


def logits_of(folder: Path) -> torch.Tensor:
    """What the base answers with the adapter that PEFT finds in a folder."""
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(folder)).eval()
    with torch.no_grad():
        logits_BTV: torch.Tensor = loaded(IDS_BT).logits
    return logits_BTV


def test_peft_loads_what_was_pulled(tmp_path: Path) -> None:
    catalog = Catalog.at(str(tmp_path / "catalog"))
    expected = [publish(catalog, tmp_path, "capital", seed) for seed in (1, 2)]
    assert not torch.allclose(*expected, atol=1e-3)
    for version, logits_BTV in enumerate(expected, start=1):
        catalog.pull(f"capital@v{version}", tmp_path / f"v{version}")
        assert torch.allclose(logits_of(tmp_path / f"v{version}"), logits_BTV, atol=1e-5)


@pytest.fixture
def ray_lora() -> Any:
    """Ray's functions for adapters. What they download goes below HOME, which is new for each test run."""
    reason = "this Ray has no functions for adapters"
    return pytest.importorskip("ray.llm._internal.common.utils.lora_utils", reason=reason)


@pytest.mark.s3
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'max_length':UserWarning")
def test_ray_lists_and_downloads_the_folder_for_servers(ray_lora: Any, bucket: str, tmp_path: Path) -> None:
    catalog, served = Catalog.at(f"s3://{bucket}/catalog"), f"s3://{bucket}/served"
    expected = {
        name: publish(catalog, tmp_path, name, seed) for seed, name in enumerate(("capital", "river"))
    }
    update_serve_dir(catalog, "production", open_storage(served))
    assert sorted(ray_lora.get_lora_model_ids(served, "tiny")) == ["tiny:capital", "tiny:river"]
    for seed, (name, logits_BTV) in enumerate(expected.items()):
        length = asyncio.run(ray_lora.get_lora_finetuned_context_length(f"{served}/{name}"))
        assert length == 100 + seed
        folder = ray_lora.download_lora_adapter(name, served)
        assert torch.allclose(logits_of(Path(folder)), logits_BTV, atol=1e-5)


@pytest.mark.s3
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'max_length':UserWarning")
def test_ray_fetches_what_was_promoted_and_misses_what_was_removed(
    ray_lora: Any, bucket: str, tmp_path: Path
) -> None:
    catalog, served = Catalog.at(f"s3://{bucket}/catalog"), f"s3://{bucket}/served"
    for name in ("capital", "river"):
        publish(catalog, tmp_path, name, 1)
    update_serve_dir(catalog, "production", open_storage(served))
    logits_BTV = publish(catalog, tmp_path, "capital", 2)
    for key in [found.key for found in catalog.storage.list("adapters/river/aliases/")]:
        catalog.storage.delete(key)
    update_serve_dir(catalog, "production", open_storage(served))
    assert ray_lora.get_lora_model_ids(served, "tiny") == ["tiny:capital"]
    ray_lora.sync_files_with_lock(f"{served}/capital", str(tmp_path / "fetched"))
    assert torch.allclose(logits_of(tmp_path / "fetched"), logits_BTV, atol=1e-5)
