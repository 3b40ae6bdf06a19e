"""A flat folder of the adapters that an alias means, kept in step, for servers that load adapters by name.

    <to>/<adapter>/adapter_config.json          with `max_length`; written last, since loaders look for it
    <to>/<adapter>/adapter_model.safetensors
    <to>/<adapter>/.raytune_ft.json             the marker: which version stands there, from which catalog

Each file is replaced at once, an adapter's two files are not. A folder without this catalog's marker is
somebody else's, and nothing in it is touched.
"""

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, ValidationError

from raytune_ft.catalog.aliases import check_alias
from raytune_ft.catalog.layout import ADAPTERS
from raytune_ft.catalog.listed import by_adapter
from raytune_ft.catalog.lookup import CatalogView
from raytune_ft.catalog.record import MAX_RECORD_BYTES, AdapterRecord, Entry, FileEntry, Sha256
from raytune_ft.catalog.signing import Trust, signed_bytes
from raytune_ft.errors import CatalogError
from raytune_ft.spec.values import NAME
from raytune_ft.storage import ObjectInfo, Storage, disk_errors, join_uri

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MARKER = ".raytune_ft.json"
_THREADS = 8

_Standing = Mapping[str, ObjectInfo]
"""What stands in an adapter's folder, by name."""


class ServedMark(Entry):
    """What the marker says."""

    schema_version: Literal[1] = 1
    catalog: str
    alias: str
    adapter: str
    version: PositiveInt
    publish_id: str
    """Tells a version of a catalog that was emptied and filled again."""
    record_sha256: Sha256 | None = None
    """Of what a signature of the record is over, so of all that was served; older markers have none."""
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
    notes: list[str] = field(default_factory=list)
    """What is no problem, and perhaps not what was meant."""
    problems: list[str] = field(default_factory=list)
    """What could not be brought in step, and stands as it was."""


@dataclass(frozen=True)
class _Done:
    """What became of one adapter."""

    kind: Literal["copied", "unchanged", "skipped", "problem"]
    text: str
    record: AdapterRecord | None = None
    """Of what stands in the folder now; None where there is a problem."""


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
    listed, _ = by_adapter(catalog.storage.list(ADAPTERS))
    if not any(of.living for of in listed.values()):
        # More likely a wrong name or a disk that is not mounted than a catalog that shall serve nothing.
        raise CatalogError(
            f"{catalog.uri}: holds no adapter; nothing in {to.uri} was touched; check the name"
        )
    folders: defaultdict[str, dict[str, ObjectInfo]] = defaultdict(dict)
    for info in to.list():
        adapter, inside, name = info.key.partition("/")
        if inside:
            folders[adapter][name] = info

    moves = {adapter: next(iter(of.moves[alias])) for adapter, of in listed.items() if alias in of.moves}

    def bring(adapter: str) -> _Done:
        try:
            entry = catalog.read_alias_entry(adapter, alias, moves[adapter])
            record = catalog.read_living(adapter, entry.version)
            trust.check(record)
            return _bring(catalog, record, alias, to, folders.get(adapter, {}))
        except CatalogError as error:
            return _Done("problem", str(error))

    result = ServeDirResult()
    lists = {
        "copied": result.copied,
        "unchanged": result.unchanged,
        "skipped": result.skipped,
        "problem": result.problems,
    }
    kept: set[str] = set()
    served: list[AdapterRecord] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for adapter, done in zip(moves, threads.map(bring, moves), strict=True):
            lists[done.kind].append(done.text)
            if done.kind != "skipped":
                kept.add(adapter)
            if done.record is not None:
                served.append(done.record)
    if not moves:
        result.notes.append(f"no adapter of {catalog.uri} has the alias {alias}")
    result.notes.extend(_tokenizer_notes(served))
    others = {adapter: standing for adapter, standing in folders.items() if adapter not in kept}
    result.removed.extend(_remove(catalog, alias, to, others))
    return result


def _tokenizer_notes(served: Iterable[AdapterRecord]) -> Iterator[str]:
    """Which adapters of one base were trained with different tokenizers, as far as their records tell."""
    bases: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for record in served:
        if (tokenizer := record.base.tokenizer_digest) is not None:
            bases[record.base.digest].setdefault(tokenizer, record.reference)
    for first, second, *_ in (list(of.values()) for of in bases.values() if len(of) > 1):
        yield (
            f"{first} and {second} were trained on one base with different tokenizers, and a server of that "
            "base has one; train one of them again with the other's"
        )


def _check_apart(catalog: CatalogView, to: Storage) -> None:
    if f"{to.uri}/".startswith(f"{catalog.uri.rstrip('/')}/"):
        raise CatalogError(f"{to.uri}: the catalog keeps its own things there; name another folder")


def _unfit(record: AdapterRecord) -> str | None:
    """Why no server of adapters can load a version, or None."""
    if record.kind != "adapter":
        return "a whole model; serve it by itself"
    names = {entry.name for entry in record.files}
    missing = [name for name in (CONFIG, WEIGHTS) if name not in names]
    return f"has no {' and no '.join(missing)}" if missing else None


def _bring(
    catalog: CatalogView, record: AdapterRecord, alias: str, to: Storage, standing: _Standing
) -> _Done:
    """Bring one adapter's folder in step with the version that the alias means.

    Raises:
        CatalogError: the folder is somebody else's, or the version's content is damaged.
    """
    reason = _unfit(record)
    if reason is not None:
        return _Done("skipped", f"{record.reference}: {reason}")
    copied = _serve(catalog, record, alias, to, standing)
    return _Done("copied" if copied else "unchanged", record.reference, record)


def _serve(catalog: CatalogView, record: AdapterRecord, alias: str, to: Storage, standing: _Standing) -> bool:
    """Let a version stand in its folder. False where it did already.

    Raises:
        CatalogError: the folder is somebody else's, or the version's content is damaged.
    """
    folder = f"{record.adapter}/"
    entries = {entry.name: entry for entry in record.files}
    mark = _read_mark(to, record.adapter, standing)
    if mark is None and standing:
        raise CatalogError(
            f"{join_uri(to.uri, folder)}: holds files and no {MARKER} of this command; nothing there was "
            "touched; remove them or name another folder"
        )
    if mark is not None and (mark.catalog, mark.alias) != (catalog.uri, alias):
        raise CatalogError(
            f"{join_uri(to.uri, folder)}: serves {mark.adapter}@{mark.alias} of {mark.catalog}; nothing "
            "there was touched; name another folder"
        )
    if mark is not None and _stands(standing, mark, record):
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
            record_sha256=_digest(record),
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


def _stands(standing: _Standing, mark: ServedMark, record: AdapterRecord) -> bool:
    """Whether the folder holds this version, as far as the marker and the sizes of the files tell."""
    # Version and publish id are whatever a record says: without the digest, files that stood in another
    # record under the same number would be taken for these.
    served = (mark.version, mark.publish_id, mark.record_sha256)
    if not mark.complete or served != (record.version, record.publish_id, _digest(record)):
        return False
    sizes = {CONFIG: mark.config_bytes, WEIGHTS: mark.weights_bytes}
    return all(name in standing and standing[name].size_bytes == size for name, size in sizes.items())


def _digest(record: AdapterRecord) -> str:
    return hashlib.sha256(signed_bytes(record)).hexdigest()


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


def _remove(catalog: CatalogView, alias: str, to: Storage, folders: Mapping[str, _Standing]) -> list[str]:
    """Remove what this catalog and alias put into some folders; in each our files alone."""
    removed = []
    for adapter, standing in folders.items():
        mark = _read_mark(to, adapter, standing) if NAME.fullmatch(adapter) else None
        if mark is None or (mark.catalog, mark.alias) != (catalog.uri, alias):
            continue
        for name in (CONFIG, WEIGHTS, MARKER):
            to.delete(f"{adapter}/{name}")
        removed.append(adapter)
    return removed


def _read_mark(to: Storage, adapter: str, standing: _Standing) -> ServedMark | None:
    """The marker in an adapter's folder; None where there is none, or something else under its name."""
    if MARKER not in standing or standing[MARKER].size_bytes > MAX_RECORD_BYTES:
        return None
    key = f"{adapter}/{MARKER}"
    try:
        mark = ServedMark.model_validate_json(to.read_or_none(key) or b"")
    except ValidationError:
        return None
    return mark if mark.adapter == adapter else None


def _write_mark(to: Storage, mark: ServedMark) -> None:
    to.write(f"{mark.adapter}/{MARKER}", mark.model_dump_json(indent=1).encode() + b"\n")
