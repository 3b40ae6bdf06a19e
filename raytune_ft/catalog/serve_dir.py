"""A flat folder of the adapters that an alias means, kept in step, for servers that load adapters by name.

    <to>/<adapter>/adapter_config.json          with `max_length`; written last, since loaders look for it
    <to>/<adapter>/adapter_model.safetensors
    <to>/<adapter>/.raytune_ft.json             the marker: which version stands there, from which catalog

Each file is replaced at once, an adapter's two files are not. A folder without this catalog's marker is
somebody else's, and nothing in it is touched.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, ValidationError

from raytune_ft.catalog.aliases import check_alias
from raytune_ft.catalog.layout import ADAPTERS, BLOBS, CACHE, PUBLISHES
from raytune_ft.catalog.lookup import CatalogView
from raytune_ft.catalog.record import MAX_RECORD_BYTES, AdapterRecord, Entry, FileEntry
from raytune_ft.catalog.signing import Trust
from raytune_ft.errors import CatalogError
from raytune_ft.spec.job import NAME
from raytune_ft.storage import Storage, disk_errors, join_uri

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MARKER = ".raytune_ft.json"


class ServedMark(Entry):
    """What the marker says."""

    schema_version: Literal[1] = 1
    catalog: str
    alias: str
    adapter: str
    version: PositiveInt
    publish_id: str
    """Tells a version of a catalog that was emptied and filled again."""
    config_bytes: int
    weights_bytes: int
    complete: bool
    """False from before the first file is touched until the last one stands."""


@dataclass(frozen=True)
class ServeDirResult:
    """What a call found and did; references by `name@v3`, removed adapters by name."""

    copied: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Notes: what the alias means and no server of adapters can load."""
    problems: list[str] = field(default_factory=list)
    """What could not be brought in step, and stands as it was."""


def update_serve_dir(
    catalog: CatalogView, alias: str, to: Storage, *, trust: Trust = Trust()
) -> ServeDirResult:
    """Bring a folder in step with an alias. One call at a time for each folder.

    An adapter with a problem keeps what stands there; the others are brought in step all the same.

    Args:
        catalog: whose adapters.
        alias: which version of each; adapters without it are not served.
        to: the flat folder.
        trust: what is asked of a version's signature; one that is refused is a problem of its adapter.

    Raises:
        CatalogError: no alias may be called so, the catalog is empty, or the folder is the catalog's own.
        StorageError: a store failed; the same call goes on.
    """
    check_alias(alias)
    _check_apart(catalog, to)
    result = ServeDirResult()
    wanted: set[str] = set()
    adapters = catalog.newest_versions()
    if not adapters:
        # More likely a wrong name or a disk that is not mounted than a catalog that shall serve nothing.
        raise CatalogError(
            f"{catalog.uri}: holds no adapter; nothing in {to.uri} was touched; check the name"
        )
    for adapter in adapters:
        try:
            _, entry = catalog.newest_alias_entry(adapter, alias)
            if entry is None:
                continue
            wanted.add(adapter)
            record = catalog.read_living(adapter, entry.version)
            trust.check(record)
            reason = _unfit(record)
            if reason is not None:
                wanted.discard(adapter)
                result.skipped.append(f"{record.reference}: {reason}")
                continue
            done = result.copied if _serve(catalog, record, alias, to) else result.unchanged
            done.append(record.reference)
        except CatalogError as error:
            wanted.add(adapter)
            result.problems.append(str(error))
    result.removed.extend(_remove_others(catalog, alias, to, wanted))
    return result


def _check_apart(catalog: CatalogView, to: Storage) -> None:
    for folder in ("", ADAPTERS, BLOBS, CACHE, PUBLISHES, "runs/"):
        taken = join_uri(catalog.uri, folder).rstrip("/")
        if to.uri == taken or (folder and to.uri.startswith(f"{taken}/")):
            raise CatalogError(f"{to.uri}: the catalog keeps its own things there; name another folder")


def _unfit(record: AdapterRecord) -> str | None:
    """Why no server of adapters can load a version, or None."""
    if record.kind != "adapter":
        return "a whole model; serve it by itself"
    names = {entry.name for entry in record.files}
    missing = [name for name in (CONFIG, WEIGHTS) if name not in names]
    return f"has no {' and no '.join(missing)}" if missing else None


def _serve(catalog: CatalogView, record: AdapterRecord, alias: str, to: Storage) -> bool:
    """Let a version stand in its folder. False where it did already.

    Raises:
        CatalogError: the folder is somebody else's, or the version's content is damaged.
    """
    folder = f"{record.adapter}/"
    entries = {entry.name: entry for entry in record.files}
    mark = _read_mark(to, record.adapter)
    if mark is None and next(to.list(folder, 1), None) is not None:
        raise CatalogError(
            f"{join_uri(to.uri, folder)}: holds files and no {MARKER} of this command; nothing there was "
            "touched; remove them or name another folder"
        )
    if mark is not None and (mark.catalog, mark.alias) != (catalog.uri, alias):
        raise CatalogError(
            f"{join_uri(to.uri, folder)}: serves {mark.adapter}@{mark.alias} of {mark.catalog}; nothing "
            "there was touched; name another folder"
        )
    if mark is not None and _stands(to, mark, record):
        return False
    with tempfile.TemporaryDirectory(prefix="raytune-ft-") as temporary:
        for name in (CONFIG, WEIGHTS):
            catalog.fetch(record, entries[name], Path(temporary) / name)
        config = _config(record, entries[CONFIG], Path(temporary) / CONFIG)
        mark = ServedMark(
            catalog=catalog.uri,
            alias=alias,
            adapter=record.adapter,
            version=record.version,
            publish_id=record.publish_id,
            config_bytes=len(config),
            weights_bytes=entries[WEIGHTS].size_bytes,
            complete=False,
        )
        _write_mark(to, mark)
        if to.read_or_none(folder + CONFIG) not in (None, config):
            # Another rank or alpha must not meet the new weights: for a moment there is no adapter instead.
            to.delete(folder + CONFIG)
        to.write(folder + WEIGHTS, Path(temporary) / WEIGHTS)
    to.write(folder + CONFIG, config)
    _write_mark(to, mark.model_copy(update={"complete": True}))
    return True


def _stands(to: Storage, mark: ServedMark, record: AdapterRecord) -> bool:
    """Whether the folder holds this version, as far as the marker and the sizes of the files tell."""
    if not mark.complete or (mark.version, mark.publish_id) != (record.version, record.publish_id):
        return False
    sizes = {CONFIG: mark.config_bytes, WEIGHTS: mark.weights_bytes}
    found = {name: to.info(f"{record.adapter}/{name}") for name in sizes}
    return all(info is not None and info.size_bytes == sizes[name] for name, info in found.items())


def _config(record: AdapterRecord, entry: FileEntry, path: Path) -> bytes:
    """The adapter's config with the length that it was trained with, which Ray Serve LLM reads there."""
    try:
        if entry.size_bytes > MAX_RECORD_BYTES:
            raise ValueError
        with disk_errors(str(path)):
            config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise CatalogError(
            f"{record.reference}: its {CONFIG} is not an adapter's; publish the adapter again"
        ) from None
    data = record.job.get("data")
    max_tokens = data.get("max_tokens") if isinstance(data, dict) else None
    if type(max_tokens) is int:
        config["max_length"] = max_tokens
    return json.dumps(config, indent=2).encode() + b"\n"


def _remove_others(catalog: CatalogView, alias: str, to: Storage, wanted: set[str]) -> list[str]:
    """Remove what this catalog and alias put there and do not mean any more; in folders, our files alone."""
    removed = []
    for found in list(to.list()):
        adapter, _, name = found.key.partition("/")
        if name != MARKER or adapter in wanted or not NAME.fullmatch(adapter):
            continue
        mark = _read_mark(to, adapter)
        if mark is None or (mark.catalog, mark.alias) != (catalog.uri, alias):
            continue
        for name in (CONFIG, WEIGHTS, MARKER):
            to.delete(f"{adapter}/{name}")
        removed.append(adapter)
    return removed


def _read_mark(to: Storage, adapter: str) -> ServedMark | None:
    """The marker in an adapter's folder; None where there is none, or something else under its name."""
    key = f"{adapter}/{MARKER}"
    info = to.info(key)
    if info is None or info.size_bytes > MAX_RECORD_BYTES:
        return None
    try:
        mark = ServedMark.model_validate_json(to.read_or_none(key) or b"")
    except ValidationError:
        return None
    return mark if mark.adapter == adapter else None


def _write_mark(to: Storage, mark: ServedMark) -> None:
    to.write(f"{mark.adapter}/{MARKER}", mark.model_dump_json(indent=1).encode() + b"\n")
