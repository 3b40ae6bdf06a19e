"""Copying versions from one catalog to another, each file checked against its sha256 on the way.

A copy is published in the target under the publish id of the original. So a copy that was cut off or is
repeated ends at one version, and a version that comes home finds itself.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from raytune_ft.catalog.aliases import check_alias
from raytune_ft.catalog.lookup import CatalogView
from raytune_ft.catalog.publish import Catalog, check_signed
from raytune_ft.catalog.record import AdapterRecord, Origin, RecordDraft
from raytune_ft.catalog.signing import Signer, Trust
from raytune_ft.errors import CatalogError
from raytune_ft.spec.values import NAME

_OWN_OF_EACH_CATALOG = {"version", "created_at", "signature", "origin"}
"""Fields in which a copy differs from its original."""


@dataclass(frozen=True)
class Copy:
    """One version and what it became."""

    original: AdapterRecord
    copied: AdapterRecord
    """The version in the target; made now, by an earlier call, or the very first of all."""


def copy_version(
    source: CatalogView,
    target: Catalog,
    reference: str,
    *,
    alias: str | None = None,
    signer: Signer | None = None,
    trust: Trust = Trust(),
) -> Copy:
    """Copy one version; it becomes the target's next version of the adapter, unless it is there.

    The record keeps all that it says, `parent` and `merged_from` included, which mean the first catalog; the
    copy's `origin` tells it. Number and time are the target's, so a signature of the original would not fit:
    the copy is signed anew, or has none.

    Args:
        source: where the version is.
        target: where it shall be.
        reference: `name`, `name@v3` or `name@alias` in the source.
        alias: moves to the copy in the target, unless it has meant this copy or a newer version there; None:
            no alias moves.
        signer: signs the copy.
        trust: what is asked of the original's signature.

    Raises:
        CatalogError: no such version or a damaged one, a signature that is refused, both catalogs are one, no
            alias may be called so, or what the target has under this publish id is another version, removed,
            or not signed by `signer`.
        StorageError: a store or the disk failed; the same call goes on.
    """
    _check_asked(source, target, alias)
    original = source.resolve(reference)
    trust.check(original)
    target.check()
    copy = _copy(source, target, original, signer)
    if alias is not None:
        target.set_alias(copy.copied.adapter, alias, copy.copied.version, forward_only=True)
    return copy


def copy_all_versions(
    source: CatalogView,
    target: Catalog,
    adapter: str,
    *,
    alias: str | None = None,
    signer: Signer | None = None,
    trust: Trust = Trust(),
) -> list[Copy]:
    """Copy all versions of an adapter that are not removed, in ascending order; see `copy_version`.

    Where the target has no such adapter and none is removed, their numbers stay the same, and so a parent of
    the same adapter is found there.

    Args:
        source: where the versions are.
        target: where they shall be.
        adapter: its name.
        alias: moves to the copy of the newest in the target, as in `copy_version`; None: no alias moves.
        signer: signs the copies.
        trust: what is asked of the originals' signatures, of all before the first is copied.

    Raises:
        CatalogError: as `copy_version`; copies before the one that fails stay.
        StorageError: a store or the disk failed; the same call goes on.
    """
    _check_asked(source, target, alias)
    if not NAME.fullmatch(adapter):
        raise CatalogError(f"{adapter!r:.200}: not an adapter's name; all versions are asked for: write NAME")
    removed = source.removed_versions(adapter)
    originals = [source.read(adapter, at) for at in source.versions(adapter) if at not in removed]
    if not originals:
        source.resolve(adapter)
    for original in originals:
        trust.check(original)
    target.check()
    copies = [_copy(source, target, original, signer) for original in originals]
    if alias is not None:
        target.set_alias(adapter, alias, copies[-1].copied.version, forward_only=True)
    return copies


def _check_asked(source: CatalogView, target: Catalog, alias: str | None) -> None:
    if alias is not None:
        check_alias(alias)
    if _place(source) == _place(target):
        raise CatalogError(f"{source.uri}: is both source and target; name another catalog")


def _place(catalog: CatalogView) -> str:
    """Where a catalog is, by whatever link a folder was named."""
    return catalog.uri if catalog.uri.startswith("s3://") else os.path.realpath(catalog.uri)


def _copy(source: CatalogView, target: Catalog, original: AdapterRecord, signer: Signer | None) -> Copy:
    copied = target.published(original.adapter, original.publish_id)
    if copied is not None:
        target.check_living(copied)
    if copied is None or not target.has_contents(copied):
        draft = _draft(source, original)
        with tempfile.TemporaryDirectory(prefix="raytune-ft-") as temporary:
            files = {entry.name: Path(temporary) / entry.name for entry in original.files}
            for entry in original.files:
                source.fetch(original, entry, files[entry.name])
            copied = target.publish(draft, files, publish_id=original.publish_id, signer=signer)
    _check_same(source, target, original, copied)
    check_signed(target, copied, signer)
    return Copy(original, copied)


def _draft(source: CatalogView, original: AdapterRecord) -> RecordDraft:
    said = {name: getattr(original, name) for name in RecordDraft.model_fields}
    # Of a copy's copy the first catalog is told, since that is where its parent is.
    first = Origin(catalog=source.uri, reference=original.reference, created_at=original.created_at)
    return RecordDraft(**{**said, "origin": original.origin or first})


def _check_same(source: CatalogView, target: Catalog, original: AdapterRecord, copied: AdapterRecord) -> None:
    """Publish ids that people chose may mean one version here and another one there."""
    of_original, of_copied = (
        record.model_dump(exclude=_OWN_OF_EACH_CATALOG) for record in (original, copied)
    )
    differing = [name for name, value in of_original.items() if of_copied[name] != value]
    if differing:
        raise CatalogError(
            f"{target.uri}: publish id {original.publish_id} stands for {copied.reference}, which is not "
            f"{original.reference} of {source.uri}: {', '.join(differing)} differ; nothing was copied; "
            "pull it, and publish its files under another id"
        )
