"""Base models and tokenizers from a folder, a bucket or the Hub. Weights come from safetensors only."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raytune_ft.classes import check_classes, check_head, classes_config
from raytune_ft.errors import DataError, ModelError
from raytune_ft.planner import ModelFacts
from raytune_ft.spec import ModelSpec
from raytune_ft.storage import local_path, open_storage

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["causal", "seq2seq", "classification"]
"""What a model does: continue a text, answer a text that an encoder read, or name the class of a text."""

_WEIGHTS = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_DESCRIPTION = (".json", ".model", ".txt", ".jinja")
_SAMPLE_BYTES = 64 * 1024
_LOST_WORKER = ("gloo", "Gloo", "NCCL", "onnection closed by peer", "onnection reset by peer")
"""What a collective says whose other side is gone."""
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
    if _is_folder(path):
        folder = local_path(path).expanduser()
        if not folder.is_dir():
            raise ModelError(f"model.path = {path}: no such folder")
        check_files(path, [file.name for file in folder.iterdir()])
        return folder
    return _from_hub(path, weights)


def _is_folder(path: str) -> bool:
    """Whether a model's path means this machine's disk, and neither a bucket nor the Hub."""
    return path.startswith("file://") or Path(path).expanduser().exists()


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
    with _alone(cache):
        for partial in cache.glob(".*.partial"):
            # Whoever wrote it has ended: it would hold the lock.
            partial.unlink()
        for found in objects:
            target = cache / found.key
            if found.key.endswith(_wanted(weights)) and not target.is_file():
                partial = cache / f".{found.key}.partial"
                storage.download(found.key, partial)
                partial.replace(target)
    return cache


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other process of this machine does the same: all workers of a node want one base at once."""
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        # The system gives it back when the process ends, however that may be.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    """Dimensions of the model in `folder`.

    Raises:
        ModelError: its config.json is not that of a language model.
    """
    place = folder / "config.json"
    try:
        config = json.loads(place.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{place}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{place}: not a model's config: holds a {type(config).__name__}, not an object")
    try:
        return ModelFacts.from_config(config, str(place))
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"{place}: not a model's config: {error}") from None


def base_identity(path: str) -> str:
    """Which base stands at `path` now, without fetching its weights.

    Of a bucket's objects the etags, of the Hub the revision, of a folder a digest of the base and of what
    describes it, its tokenizer above all. All machines say the same, whatever of it they have in
    their caches.
    """
    folder = model_folder(path, weights=False)
    if not _is_folder(path):
        return folder.name
    digest = hashlib.sha256(base_digest(folder).encode())
    for file in sorted(file for file in folder.iterdir() if file.suffix in _DESCRIPTION):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


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

    BERT begins a text with CLS and ends it with SEP, which are a classifier's BOS and EOS.

    Raises:
        ModelError: there is none, it needs remote code, or it has no EOS token to learn.
    """
    from transformers import AutoTokenizer

    folder = model_folder(spec.path, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"model.path = {spec.path}: the tokenizer does not load: {_reason(error)}") from None
    if spec.labels and tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token_id is None:
        classifier = tokenizer.sep_token_id is not None and not spec.labels
        raise ModelError(
            f"model.path = {spec.path}: the tokenizer has no EOS token, so no answer could learn to end"
            + ("; to train a classifier, name its classes in model.labels" if classifier else "")
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def load_base(
    spec: ModelSpec, *, device: "torch.device | None", dequantised: bool = False
) -> "PreTrainedModel":
    """The base on `device`, frozen, in eval mode, quantised as the spec says.

    Args:
        spec: the model section of the job.
        device: where it is to be resident; None where a context around the call divides it.
        dequantised: hold a 4-bit base as the plain values of its quantised weights.

    Raises:
        ModelError: the folder is no model of the kind that the job trains.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    from raytune_ft.quantise import compute_dtype, dequantise, keep_weights_trainable

    folder = model_folder(spec.path)
    transformers_logging.disable_progress_bar()
    # Its report of odd weights goes to a log that nobody may see; they are refused below.
    transformers_logging.set_verbosity_error()
    try:
        config: dict[str, Any] = dict(json.loads((folder / "config.json").read_bytes()))
        check_classes(spec, config)
        if device is None:
            check_head(spec, config)
        # A classifier's head begins at random: with the same numbers on all workers.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, loading = _auto_model(spec, config).from_pretrained(
                folder,
                dtype=compute_dtype(spec),
                quantization_config=_quantisation(spec, folder, config),
                device_map=None if device is None else {"": device},
                use_safetensors=True,
                trust_remote_code=spec.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **classes_config(spec),
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        # Workers that divide a base talk to each other meanwhile: a lost one is no fault of the model.
        if device is None and _tells_of_a_lost_worker(error):
            raise
        raise ModelError(f"model.path = {spec.path}: the model does not load: {_reason(error)}") from None
    _check_loaded(spec, model, loading)
    if spec.weight_bits == 4:
        keep_weights_trainable(model)
        if dequantised:
            dequantise(model, compute_dtype(spec))
    model.requires_grad_(False)
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def _tells_of_a_lost_worker(error: Exception) -> bool:
    from torch import distributed

    # Ray takes the group away from those that are left before it starts anew.
    if not distributed.is_initialized() or isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_WORKER)


def unknown_token(least: int, most: int, vocabulary: int) -> DataError | None:
    """Why a base with embeddings for so many tokens cannot compute tokens from `least` to `most`.

    A GPU would answer to such a token by ending all that computes on it.
    """
    if least >= 0 and most < vocabulary:
        return None
    wrong = least if least < 0 else most
    return DataError(
        f"the tokenizer makes token {wrong}, and the base has embeddings for 0 to {vocabulary - 1}; give "
        "the base the tokenizer that it was trained with"
    )


def task_of(model: "PreTrainedModel") -> Task:
    """What a loaded model does."""
    if model.get_output_embeddings() is None:
        return "classification"
    return "seq2seq" if model.config.is_encoder_decoder else "causal"


def head_paths(model: "nn.Module") -> list[str]:
    """Paths of the modules by which a classifier's body becomes a classifier; none of another model.

    They are trained whole, by every method. BERT's pooler is one of them: bases that learned from masked
    words alone never trained it, or have none.
    """
    if model.get_output_embeddings() is not None:  # type: ignore[operator]  # a PreTrainedModel
        return []
    body: Any = model.base_model
    paths = [path for path, child in model.named_children() if child is not body and list(child.parameters())]
    if getattr(body, "pooler", None) is not None:
        paths.append(f"{model.base_model_prefix}.pooler")
    return paths


def decoder_start_id(model: "PreTrainedModel") -> int:
    """The token with which a decoder begins every answer.

    Raises:
        ModelError: the config does not say.
    """
    start = model.config.decoder_start_token_id
    if start is None:
        raise ModelError(
            f"{type(model).__name__}: config.json has no decoder_start_token_id, so no answer could begin; "
            "add it (T5 begins with its pad_token_id)"
        )
    return int(start)


def question_ids(prompt_ids: Sequence[int] | np.ndarray[Any, Any], eos_id: int) -> np.ndarray[Any, Any]:
    """What an encoder reads of a prompt: its tokens, and EOS at the end."""
    ids = np.asarray(prompt_ids, dtype=np.int64)
    return ids if ids.size and ids[-1] == eos_id else np.append(ids, eos_id)


def _auto_model(spec: ModelSpec, config: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    if spec.labels:
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM


def _quantisation(spec: ModelSpec, folder: Path, config: Mapping[str, Any]) -> Any | None:
    """How to quantise; never a classifier's head, which is trained."""
    import torch
    from transformers import AutoConfig

    from raytune_ft.quantise import quantisation_config

    settings = quantisation_config(spec)
    if settings is not None and spec.labels:
        own = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        with torch.device("meta"):
            outline = _auto_model(spec, config).from_config(own, trust_remote_code=spec.trust_remote_code)
        settings.llm_int8_skip_modules = head_paths(outline)
    return settings


def _check_loaded(spec: ModelSpec, model: "PreTrainedModel", loading: Mapping[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers: training would go on from those."""
    new = tuple(f"{path}." for path in head_paths(model))
    if mismatched := sorted(
        found
        for found in [*loading["mismatched_keys"], *_mismatched_linear(model)]
        if not found[0].startswith(new)
    ):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"model.path = {spec.path}: {len(mismatched)} weights have another shape than config.json says, "
            f"the first {name}: {list(found)}, not {list(expected)}; put the config of these weights back"
        )
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith(new)):
        raise ModelError(
            f"model.path = {spec.path}: {len(missing)} weights are missing, the first {missing[0]}; "
            "copy the whole model again"
        )


def _mismatched_linear(model: "PreTrainedModel") -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """Name, found and expected shape of weights that do not fit their layer: nobody checks quantised ones."""
    from torch import nn

    from raytune_ft.quantise import whole_shape

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            packed = getattr(module.weight, "quant_state", None)
            found = tuple(whole_shape(module.weight) if packed is None else packed.shape)
            if found != (module.out_features, module.in_features):
                yield f"{name}.weight", found, (module.out_features, module.in_features)


def _reason(error: BaseException) -> str:
    """The first line of what a library says, or our own words where it speaks of its own options."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it needs Python code of its own; read that code, then set model.trust_remote_code: true"
    return text.partition("\n")[0][:300].rstrip(" :")
