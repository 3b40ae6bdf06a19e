"""Base models and tokenizers from a folder, a bucket or the Hub. Weights come from safetensors only."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from raytune_ft.errors import ModelError
from raytune_ft.planner import ModelFacts
from raytune_ft.spec import ModelSpec
from raytune_ft.storage import open_storage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_DESCRIPTION = (".json", ".model", ".txt", ".jinja")
_SAMPLE_BYTES = 64 * 1024
_SAMPLES = 64


def model_folder(path: str, *, weights: bool = True) -> Path:
    """A local folder with the model: as it is, copied from the bucket, or the Hub's snapshot.

    Copies are kept in `$RAYTUNE_CACHE` (default `~/.cache/raytune_ft`) under the objects' etags.

    Args:
        path: a folder, `file://`, `s3://` or a Hub id.
        weights: False leaves the weights where they are: enough for the config and the tokenizer.

    Raises:
        ModelError: there is no such model, or it holds no safetensors.
        StorageError: the bucket cannot be read.
    """
    if path.startswith("s3://"):
        return _from_bucket(path, weights)
    if path.startswith("file://") or Path(path).expanduser().exists():
        folder = Path(urlsplit(path).path if path.startswith("file://") else path).expanduser()
        if not folder.is_dir():
            raise ModelError(f"model.path = {path}: no such folder")
        check_files(path, [file.name for file in folder.iterdir()])
        return folder
    return _from_hub(path, weights)


def check_files(path: str, names: Iterable[str]) -> None:
    """Refuse a folder that is no model, or has only pickled weights.

    Raises:
        ModelError: says which file is missing or refused.
    """
    found = sorted(names)
    if "config.json" not in found:
        raise ModelError(f"model.path = {path}: no config.json; name the folder that holds the model's files")
    if any(name.endswith(_WEIGHTS) for name in found):
        return
    pickled = [name for name in found if name.endswith(_PICKLED)]
    if pickled:
        raise ModelError(
            f"model.path = {path}: only pickled weights ({', '.join(pickled)}), "
            "which can run code when loaded; convert them with save_pretrained(safe_serialization=True)"
        )
    raise ModelError(f"model.path = {path}: no .safetensors file")


def _wanted(weights: bool) -> tuple[str, ...]:
    return (*_DESCRIPTION, _WEIGHTS) if weights else _DESCRIPTION


def _from_bucket(uri: str, weights: bool) -> Path:
    storage = open_storage(uri)
    objects = [found for found in storage.list() if "/" not in found.key]
    check_files(uri, [found.key for found in objects])
    identity = "\n".join(f"{found.key} {found.size_bytes} {found.etag}" for found in objects)
    root = Path(os.environ.get("RAYTUNE_CACHE", "~/.cache/raytune_ft")).expanduser()
    cache = root / "models" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    cache.mkdir(parents=True, exist_ok=True)
    for found in objects:
        target = cache / found.key
        if found.key.endswith(_wanted(weights)) and not target.is_file():
            partial = cache / f".{found.key}.{os.getpid()}"
            storage.download(found.key, partial)
            partial.replace(target)
    return cache


def _from_hub(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in _wanted(weights)]))
    except HFValidationError:
        raise ModelError(f"model.path = {name}: no such folder, and not a Hub id") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model.path = {name}: no such folder, and the Hub did not give it ({type(error).__name__}); "
            "check the name, HF_TOKEN and HF_HUB_OFFLINE"
        ) from None
    if weights:
        check_files(name, [file.name for file in folder.iterdir()])
    return folder


def read_facts(folder: Path) -> ModelFacts:
    """Dimensions of the model in `folder`."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: not JSON: {error}") from None
    return ModelFacts.from_config(config)


def base_digest(folder: Path) -> str:
    """Identity of a base: sha256 over its config and, per weight file, name, size and 64 samples of 64 KiB.

    Samples keep this quick for large models; another model, revision or dtype gives another digest. It is not
    a defence against somebody who alters single weights on purpose.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob(f"*{_WEIGHTS}")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@lru_cache(maxsize=4)
def load_tokenizer(spec: ModelSpec) -> "PreTrainedTokenizerBase":
    """The base's tokenizer; one without a pad token pads with its EOS, which no label ever learns as padding.

    Raises:
        ModelError: there is none, it needs remote code, or it has no EOS token to learn.
    """
    from transformers import AutoTokenizer

    folder = model_folder(spec.path, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.path = {spec.path}: the tokenizer does not load: {_first_line(error)}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.path = {spec.path}: the tokenizer has no EOS token, so no answer could learn to end"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def load_base(spec: ModelSpec, *, device: "torch.device", dequantised: bool = False) -> "PreTrainedModel":
    """The base on `device`, frozen, in eval mode, quantised as the spec says.

    Args:
        spec: the model section of the job.
        device: where it is to be resident.
        dequantised: hold a 4-bit base as the plain values of its quantised weights.

    Raises:
        ModelError: the folder is no causal language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from raytune_ft.quantise import compute_dtype, dequantise, keep_weights_trainable, quantisation_config

    folder = model_folder(spec.path)
    transformers_logging.disable_progress_bar()
    # It offers optional kernels on every load.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=compute_dtype(spec),
            quantization_config=quantisation_config(spec),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.path = {spec.path}: the model does not load: {_first_line(error)}") from None
    if spec.weight_bits == 4:
        keep_weights_trainable(model)
        if dequantised:
            dequantise(model, compute_dtype(spec))
    model.requires_grad_(False)
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]
