"""Which files of a base's folder transformers reads the weights from, checked before it does."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from raytune_ft.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD, _INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
_NAMED_IN_CONFIG = "transformers_weights"


def shards_in(folder: Path, path: str, present: Collection[str] | None) -> list[str] | None:
    """The names of the weight files that transformers reads, sorted.

    A shard whose name ends otherwise would be unpickled, and one with a folder in its name is no file of this
    base.

    Args:
        folder: holds config.json and the index, if there is one; the weights need not be there yet.
        path: the base as the job names it, for messages.
        present: names of all files of the base; None where they are not known, so none can be missed.

    Returns:
        None where nothing tells which: transformers says what is missing.

    Raises:
        ModelError: a name is no plain name of a safetensors file, or its file is not there.
    """
    explicit = _named_in_config(folder)
    if explicit is not None:
        _check_plain(path, f"config.json: {_NAMED_IN_CONFIG}", explicit, (_SHARD, _INDEX_SUFFIX))
        if not explicit.endswith(_INDEX_SUFFIX):
            return _there(path, "config.json", [explicit], present)
    elif _SINGLE in (present or ()) or (folder / _SINGLE).is_file():
        return [_SINGLE]
    index = index_in(folder)
    if index is None:
        return None if explicit is None else _there(path, "config.json", [explicit], present)
    return _there(path, index.name, _named_shards(index, path), present)


def index_in(folder: Path) -> Path | None:
    """The index by which transformers finds the shards of the base in a folder, if it reads one."""
    explicit = _named_in_config(folder)
    if explicit is None and (folder / _SINGLE).is_file():
        return None
    name = _INDEX if explicit is None else explicit
    plain = isinstance(name, str) and name.endswith(_INDEX_SUFFIX) and _is_plain(name)
    return folder / name if plain and (folder / name).is_file() else None


def _named_in_config(folder: Path) -> Any:
    """What config.json names in place of the usual files. Whether it is a config, `read_facts` checks."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return config.get(_NAMED_IN_CONFIG) if isinstance(config, dict) else None


def _named_shards(index: Path, path: str) -> list[str]:
    try:
        shards = json.loads(index.read_bytes())["weight_map"].values()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        shards = ()
    if not shards:
        raise ModelError(
            f"model.path = {path}: {index.name} is no index of weights; copy the whole model again"
        )
    for shard in shards:
        _check_plain(path, index.name, shard, (_SHARD,))
    return sorted(set(shards))


def _check_plain(path: str, place: str, name: object, suffixes: tuple[str, ...]) -> None:
    if not (isinstance(name, str) and name.endswith(suffixes) and _is_plain(name)):
        raise ModelError(
            f"model.path = {path}: {place} names {name!r:.100}, and weights may only stand in .safetensors "
            "files of the folder itself; write the model again with save_pretrained"
        )


def _is_plain(name: str) -> bool:
    return name.isprintable() and not set(name) & set("/\\") and not name.startswith(".")


def _there(path: str, place: str, names: list[str], present: Collection[str] | None) -> list[str]:
    missing = [] if present is None else [name for name in names if name not in present]
    if missing:
        raise ModelError(
            f"model.path = {path}: {missing[0]} is not there, and {place} names it ({len(missing)} of "
            f"{len(names)} weight files are missing); copy the whole model again"
        )
    return names
