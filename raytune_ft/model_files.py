"""The files of a base model, in a folder, a bucket or the Hub: where they are, and which base they are."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from raytune_ft.errors import ModelError
from raytune_ft.planner import ModelFacts
from raytune_ft.spec.values import looked_for, uri_mistake
from raytune_ft.storage import ObjectInfo, Storage, local_path, open_storage
from raytune_ft.weight_index import index_in, shards_in

_WEIGHTS = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_ADAPTER = "adapter_config.json"
_DESCRIPTION = (".json", ".model", ".txt", ".jinja")
_TOKENIZER = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*.jinja",
)
"""Names of the files by which tokenizers are told and their chat templates."""
_SAMPLE_BYTES = 64 * 1024
_SAMPLES = 64


def model_folder(path: str, *, weights: bool = True) -> Path:
    """A local folder with the model: as it is, copied from the bucket, or the Hub's snapshot.

    Copies are kept in `$RAYTUNE_CACHE` (default `~/.cache/raytune_ft`) under the objects' etags.

    Args:
        path: a folder, `file://`, `s3://` or a Hub id.
        weights: False leaves the weights where they are: enough for the config and the tokenizer.

    Raises:
        ModelError: there is no such model, it holds no safetensors, or what says where its weights are leads
            elsewhere.
        StorageError: the bucket cannot be read.
    """
    if mistake := uri_mistake(path):
        raise ModelError(f"model.path: {mistake}")
    if path.startswith("s3://"):
        return _from_bucket(path, weights)
    if _is_folder(path):
        folder = local_path(path).expanduser()
        if not folder.is_dir():
            raise ModelError(f"model.path = {path}: no such folder")
        names = [file.name for file in folder.iterdir()]
        check_files(path, names)
        shards_in(folder, path, names)
        return folder
    return _from_hub(path, weights)


def _is_folder(path: str) -> bool:
    """Whether a model's path means this machine's disk, and neither a bucket nor the Hub."""
    return path.startswith("file://") or Path(path).expanduser().exists()


def check_files(path: str, names: Iterable[str]) -> None:
    """Refuse a folder that is no model, has only pickled weights, or sends transformers to another base.

    Raises:
        ModelError: says which file is missing or refused.
    """
    found = sorted(names)
    if "config.json" not in found:
        raise ModelError(f"model.path = {path}: no config.json; name the folder that holds the model's files")
    if _ADAPTER in found:
        # transformers would load the base that it names, and the adapter, which may be a pickle.
        raise ModelError(
            f"model.path = {path}: holds {_ADAPTER}, by which transformers would load another base; "
            "remove that file, or merge the adapter with raytune-ft catalog merge"
        )
    if any(name.endswith(_WEIGHTS) for name in found):
        return
    pickled = [name for name in found if name.endswith(_PICKLED)]
    if pickled:
        raise ModelError(
            f"model.path = {path}: only pickled weights ({', '.join(pickled)}), "
            "which can run code when loaded; convert them with save_pretrained(safe_serialization=True)"
        )
    raise ModelError(f"model.path = {path}: no .safetensors file")


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
        _copy(storage, objects, _DESCRIPTION, cache)
        shards_in(cache, uri, {found.key for found in objects})
        if weights:
            _copy(storage, objects, (_WEIGHTS,), cache)
    return cache


def _copy(storage: Storage, objects: Iterable[ObjectInfo], suffixes: tuple[str, ...], cache: Path) -> None:
    for found in objects:
        target = cache / found.key
        if found.key.endswith(suffixes) and not target.is_file():
            partial = cache / f".{found.key}.partial"
            storage.download(found.key, partial)
            partial.replace(target)


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

    wanted = (*_DESCRIPTION, _WEIGHTS) if weights else _DESCRIPTION
    try:
        folder = Path(snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in wanted]))
    except HFValidationError:
        raise ModelError(f"model.path = {name}: no such folder{looked_for(name)}, and not a Hub id") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model.path = {name}: no such folder{looked_for(name)}, and the Hub did not give it "
            f"({type(error).__name__}); check the name, HF_TOKEN and HF_HUB_OFFLINE"
        ) from None
    names = [file.name for file in folder.iterdir()]
    if weights:
        check_files(name, names)
    shards_in(folder, name, names if weights else None)
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
        digest.update(_named_content(file))
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Identity of a base's tokenizer: sha256 over names and contents of its files and chat template."""
    described = (file for file in folder.iterdir() if file.suffix in _DESCRIPTION)
    digest = hashlib.sha256()
    for file in sorted(described):
        if any(fnmatchcase(file.name, pattern) for pattern in _TOKENIZER):
            digest.update(_named_content(file))
    return digest.hexdigest()


def check_tokenizer(reference: str, path: str, digest: str | None) -> None:
    """Refuse a base whose tokenizer is not the one that a version was trained with.

    Args:
        reference: of the version, for messages.
        path: where the base is.
        digest: `tokenizer_digest` of then; None, as in records of earlier versions, says nothing.

    Raises:
        ModelError: the tokenizer's files are others, or there is no such base.
    """
    if digest is None:
        return
    found = tokenizer_digest(model_folder(path, weights=False))
    if found != digest:
        raise ModelError(
            f"{reference} was trained with another tokenizer than {path} holds now (digest {digest[:12]}…, "
            f"found {found[:12]}…); put the tokenizer and chat template of then back, or train again"
        )


def _named_content(file: Path) -> bytes:
    content = file.read_bytes()
    return f"{file.name} {len(content)}\n".encode() + content


def base_digest(folder: Path) -> str:
    """Identity of a base: sha256 over its config and, per weight file, name, size and 64 samples of 64 KiB.

    The weight files are those that transformers reads. Where the folder holds other safetensors too, the
    index that tells which are read is covered as well; elsewhere it says nothing that the shards do not.

    Samples keep this quick for large models; another model, revision or dtype gives another digest. It is not
    a defence against somebody who alters single weights on purpose.

    Raises:
        ModelError: what says where the weights are leads out of the folder, or to a file that is not there.
    """
    present = sorted(folder.glob(f"*{_WEIGHTS}"))
    shards = shards_in(folder, str(folder), {file.name for file in present})
    read = present if shards is None else [folder / name for name in shards]
    index = index_in(folder)
    return _digest(folder, index if index and read != present else None, read)


def is_base(folder: Path, digest: str, *, earlier: bool) -> bool:
    """Whether the base in a folder is the one whose digest a record holds.

    Args:
        folder: holds a base.
        digest: what the record says.
        earlier: the record is of an earlier version, whose digests cover all safetensors files in the folder,
            read or not.

    Raises:
        ModelError: as `base_digest`.
    """
    if digest == base_digest(folder):
        return True
    return earlier and digest == _digest(folder, None, folder.glob(f"*{_WEIGHTS}"))


def _digest(folder: Path, index: Path | None, weights: Iterable[Path]) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if index is not None:
        digest.update(_named_content(index))
    for file in sorted(weights):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
