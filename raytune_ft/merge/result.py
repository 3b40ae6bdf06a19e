"""What the record of a merge says, and publishing it."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from raytune_ft import __version__
from raytune_ft.catalog import (
    AdapterRecord,
    BaseModelRef,
    Catalog,
    CatalogView,
    RecordDraft,
    check_alias,
    model_card,
)
from raytune_ft.catalog.record import MAX_RECORD_BYTES, FileEntry, publishable_files
from raytune_ft.catalog.removal import is_swept
from raytune_ft.errors import CatalogError
from raytune_ft.generation_files import GENERATION_CONFIG, add_ends
from raytune_ft.methods.lora import CONFIG_FILE
from raytune_ft.provenance import library_versions, machine
from raytune_ft.spec import JobSpec
from raytune_ft.spec.values import NAME

_TOKENIZER = "tokenizer_config.json"
_CARD, _JOB = "README.md", "job.json"
_NOT_OF_THE_TOKENIZER = frozenset({CONFIG_FILE, GENERATION_CONFIG, _CARD, _JOB})
"""What stands beside the weights of an adapter and is none of the tokenizer's files."""


def check_names(name: str, alias: str | None) -> None:
    """Refuse names that the catalog would refuse, before any work.

    Raises:
        CatalogError: says which.
    """
    if not NAME.fullmatch(name):
        raise CatalogError(
            f"--as {name!r:.100}: must be 1 to 63 of a-z, 0-9 and '-', and begin and end with a letter or "
            "digit"
        )
    if alias is not None:
        check_alias(alias)


def job_of(record: AdapterRecord) -> JobSpec:
    """The job that made a version.

    Raises:
        CatalogError: it is not one that this version of raytune-ft reads.
    """
    try:
        return JobSpec.model_validate(record.job)
    except ValidationError:
        raise CatalogError(
            f"{record.reference}: its job was written by another version of raytune-ft; "
            "merge it with the version that published it"
        ) from None


def draft_of(
    records: Iterable[AdapterRecord],
    *,
    name: str,
    kind: Literal["adapter", "model"],
    job: JobSpec,
    method: dict[str, Any],
    data: dict[str, Any],
    seed: int,
) -> RecordDraft:
    """A record that claims no training and no scores: nothing was trained or measured since the merge."""
    first, *others = records
    told = (record.base.tokenizer_digest for record in (first, *others))
    tokenizer = next((digest for digest in told if digest is not None), None)
    return RecordDraft(
        adapter=name,
        kind=kind,
        base=BaseModelRef(path=first.base.path, digest=first.base.digest, tokenizer_digest=tokenizer),
        method=method,
        job=job.resolved(),
        data=data,
        seed=seed,
        steps=0,
        tokens=0,
        learned_tokens=0,
        loss=None,
        code_version=__version__,
        library_versions=library_versions(),
        machine=machine(),
        scores_before=None,
        scores_after=None,
        merged_from=tuple(record.reference for record in (first, *others)),
    )


def write_card_and_job(draft: RecordDraft, folder: Path, auto_class: str = "AutoModelForCausalLM") -> None:
    """README.md and job.json, as beside everything that is published."""
    generates = all((folder / name).is_file() for name in (_TOKENIZER, GENERATION_CONFIG))
    (folder / _CARD).write_text(model_card(draft, auto_class, says_how_to_generate=generates))
    (folder / _JOB).write_text(json.dumps(draft.job, indent=2) + "\n")


def end_ids_of(records: Iterable[AdapterRecord]) -> list[int]:
    """The tokens that the answers of any of some versions were taught to end with."""
    # A record's data is not checked when it is read.
    listed = [ids for record in records if isinstance(ids := record.data.get("end_ids"), list)]
    return sorted({token for ids in listed for token in ids if type(token) is int})


def copy_beside_weights(catalog: CatalogView, records: Sequence[AdapterRecord], folder: Path) -> None:
    """Copy the tokenizer and how to generate from adapters of one base to what they are merged into.

    The tokenizer is that of the first that has one, and so is how to generate, but for the ends: an answer
    may end where that of any of them does. Adapters of older versions have neither.

    Raises:
        CatalogError: a file is gone, was altered, or says nothing of generation.
        StorageError: the store or the disk failed.
    """
    first = next((record for record in records if _TOKENIZER in _names(record)), None)
    if first is not None:
        for entry in first.files:
            if entry.name not in _NOT_OF_THE_TOKENIZER and not entry.name.endswith(".safetensors"):
                catalog.fetch(first, entry, folder / entry.name)
    first = next((record for record in records if GENERATION_CONFIG in _names(record)), None)
    if first is not None:
        entry, path = _names(first)[GENERATION_CONFIG], folder / GENERATION_CONFIG
        if entry.size_bytes <= MAX_RECORD_BYTES:
            catalog.fetch(first, entry, path)
        if not path.is_file() or not add_ends(path, end_ids_of(records)):
            raise CatalogError(
                f"{first.reference}: its {GENERATION_CONFIG} does not say how to generate; "
                "the file was altered or damaged; publish the adapter again"
            )


def _names(record: AdapterRecord) -> dict[str, FileEntry]:
    return {entry.name: entry for entry in record.files}


def publish_id_for(name: str, how: Mapping[str, Any], records: Iterable[AdapterRecord]) -> str:
    """The same for each repetition of a merge, another where anything that the result depends on differs."""
    # A reference alone would not do: a catalog may have been emptied and filled again.
    of = [
        [record.reference, record.publish_id, *(entry.sha256 for entry in record.files)] for record in records
    ]
    content = json.dumps({"as": name, "how": how, "of": of}, sort_keys=True).encode()
    return f"merge-{hashlib.sha256(content).hexdigest()[:40]}"


def publish_written(
    catalog: Catalog,
    draft: RecordDraft,
    write: Callable[[Path], None],
    *,
    publish_id: str,
    alias: str | None,
) -> AdapterRecord:
    """Publish what `write` puts into the folder that it is given, unless that was done before.

    Where the version that it made before was removed and its files may be gone, it makes another.

    Raises:
        CatalogError: the version that it made before is removed.
        StorageError: the catalog or the disk cannot be written; nothing of the version is visible.
    """
    catalog.check()
    used = publish_id
    record = catalog.published(draft.adapter, used)
    while record is not None and is_swept(catalog, record):
        # Nobody can restore it, and the same merge has the same id for ever.
        used = f"{publish_id}-after-v{record.version}"
        record = catalog.published(draft.adapter, used)
    if record is not None:
        catalog.check_living(record)
    if record is None or not catalog.has_contents(record):
        with tempfile.TemporaryDirectory(prefix="raytune-ft-") as temporary:
            folder = Path(temporary)
            write(folder)
            record = catalog.publish(draft, publishable_files(folder), publish_id=used)
    if alias is not None:
        # The same command may be repeated after somebody has published since.
        catalog.set_alias(record.adapter, alias, record.version, forward_only=True)
    return record


def short_digest(record: AdapterRecord) -> str:
    """Beginning of the base's digest, for messages. A record is not trusted to have hex there."""
    return "".join(filter(str.isalnum, record.base.digest))[:12] + "…"
