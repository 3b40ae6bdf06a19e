"""Base models in a bucket: copied once, and never mistaken for what stood there before."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from faultproxy import FaultProxy

from raytune_ft.errors import ModelError
from raytune_ft.model_files import base_digest, base_identity, model_folder
from raytune_ft.models import load_base, load_tokenizer
from raytune_ft.spec import ModelSpec
from raytune_ft.storage import Storage, open_storage

pytestmark = pytest.mark.s3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "saved")


@pytest.fixture
def base(bucket: str, saved: Path) -> Storage:
    """A base model in a new bucket."""
    storage = open_storage(f"s3://{bucket}/models/tiny")
    for file in saved.iterdir():
        storage.write(file.name, file)
    return storage


def downloads(proxy: FaultProxy) -> list[str]:
    """Names of the objects that were fetched so far; listings have a query and no name."""
    paths = [request.path.partition("?")[0] for request in proxy.requests if request.method == "GET"]
    return sorted(path.rpartition("/")[2] for path in paths if "." in path.rpartition("/")[2])


def test_a_copy_equals_its_original(cache: Path, base: Storage, saved: Path) -> None:
    folder = model_folder(base.uri)
    assert folder.parent == cache / "models"
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
        f.name: f.read_bytes() for f in saved.iterdir()
    }
    assert base_digest(folder) == base_digest(saved)
    spec = ModelSpec(path=base.uri, weight_bits=32)
    assert load_base(spec, device=torch.device("cpu")).num_parameters() == 94_528
    assert load_tokenizer(spec).eos_token == "</s>"


def test_it_is_copied_once(cache: Path, fault_proxy: FaultProxy, base: Storage, saved: Path) -> None:
    first = model_folder(base.uri)
    assert downloads(fault_proxy) == sorted(file.name for file in saved.iterdir())
    fault_proxy.requests.clear()
    assert model_folder(base.uri) == model_folder(base.uri, weights=False) == first
    assert fault_proxy.requests
    assert downloads(fault_proxy) == []


def test_the_weights_wait_until_they_are_needed(
    cache: Path, fault_proxy: FaultProxy, base: Storage, saved: Path
) -> None:
    described = model_folder(base.uri, weights=False)
    assert "model.safetensors" not in downloads(fault_proxy)
    assert {file.name for file in described.iterdir()} == {f.name for f in saved.iterdir()} - {
        "model.safetensors"
    }
    assert base_identity(base.uri) == described.name
    fault_proxy.requests.clear()
    assert model_folder(base.uri) == described
    assert downloads(fault_proxy) == ["model.safetensors"]


def test_objects_that_no_model_needs_stay_there(cache: Path, base: Storage) -> None:
    for name in ("pytorch_model.bin", "modeling_own.py", "checkpoints/model.safetensors"):
        base.write(name, b"x" * 100)
    copied = {file.name for file in model_folder(base.uri).iterdir()}
    assert not {"pytorch_model.bin", "modeling_own.py", "checkpoints"} & copied


@pytest.mark.parametrize("weights", [True, False])
def test_an_object_that_changed_is_another_model(cache: Path, base: Storage, weights: bool) -> None:
    before, identity = model_folder(base.uri, weights=weights), base_identity(base.uri)
    config = json.loads(base.read("config.json"))
    base.write("config.json", json.dumps({**config, "rms_norm_eps": 1e-5}).encode())
    after = model_folder(base.uri, weights=weights)
    assert after != before
    assert base_identity(base.uri) != identity
    assert json.loads((before / "config.json").read_text()) == config
    assert json.loads((after / "config.json").read_text())["rms_norm_eps"] == 1e-5


def test_a_copy_that_broke_off_goes_on(
    cache: Path, fault_proxy: FaultProxy, base: Storage, saved: Path
) -> None:
    folder = model_folder(base.uri)
    (folder / "model.safetensors").rename(folder / ".model.safetensors.partial")
    fault_proxy.requests.clear()
    assert base_digest(model_folder(base.uri)) == base_digest(saved)
    assert downloads(fault_proxy) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        ("config.json", None, "no config.json; name the folder that holds the model's files"),
        ("model.safetensors", None, "no .safetensors file"),
        (
            "model.safetensors",
            "pytorch_model.bin",
            "only pickled weights (pytorch_model.bin), which can run code when loaded; "
            "convert them with save_pretrained(safe_serialization=True)",
        ),
    ],
)
def test_what_is_no_model_is_not_copied(
    cache: Path, base: Storage, removed: str, added: str | None, message: str
) -> None:
    base.delete(removed)
    if added:
        base.write(added, b"x")
    with pytest.raises(ModelError) as caught:
        model_folder(base.uri)
    assert str(caught.value) == f"model.path = {base.uri}: {message}"
    assert not cache.exists()
