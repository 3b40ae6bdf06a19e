"""Writing to a catalog, with put-if-absent as the only means against others who write at the same time."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, ValidationError

from raytune_ft.catalog.aliases import move_alias
from raytune_ft.catalog.contents import ContentWriter
from raytune_ft.catalog.layout import numbered, publish_key, versions_prefix
from raytune_ft.catalog.lookup import AliasEntry, CatalogView
from raytune_ft.catalog.record import (
    PUBLISH_ID,
    AdapterRecord,
    Entry,
    FileEntry,
    RecordDraft,
    file_name_problem,
    publish_id_of,
)
from raytune_ft.catalog.signing import Signer, fingerprint, is_valid, signed_bytes
from raytune_ft.errors import CatalogError, StorageError
from raytune_ft.spec.values import Name
from raytune_ft.storage import conditional_writes_hold, disk_errors, join_uri, open_storage


class _Begun(Entry):
    """Note that a publish has begun; its own version, if there is one, is above `base_version`."""

    schema_version: Literal[1] = 1
    adapter: Name
    base_version: NonNegativeInt


class Catalog(CatalogView):
    """A catalog that is read and written."""

    @classmethod
    def at(cls, uri: str) -> "Catalog":
        """The catalog at a uri. Makes no request.

        Raises:
            BadInput: the uri is of no supported form.
        """
        return cls(open_storage(uri))

    def check(self) -> None:
        """Make sure that a publish at the end of a long run will be possible.

        Raises:
            StorageDenied: the store refuses the credentials, or to write.
            StorageMissing: there is no such bucket.
            StorageError: the store does not work, or does not hold what publishing rests on.
        """
        self.storage.check()
        if not conditional_writes_hold(self.storage):
            raise StorageError(
                f"{self.uri}: this store ignores If-None-Match: two publishers could overwrite each other's "
                "versions; use one with conditional writes (AWS S3, Ceph, MinIO, Cloudflare R2) or a folder"
            )

    def publish(
        self,
        draft: RecordDraft,
        files: Mapping[str, Path],
        *,
        publish_id: str,
        signer: Signer | None = None,
    ) -> AdapterRecord:
        """Publish the next version: content first, the record last and once.

        A crash leaves nothing visible, and the same call completes it. A call that succeeded before returns
        the version that it made then, whatever `draft` and `files` hold now. What is gone from the store of
        its contents is written again, and what is damaged replaced, up to `contents.READ_BACK_BYTES`.

        Args:
            draft: what the record says.
            files: local file of each name in the version. They must not change meanwhile.
            publish_id: the same for each retry, another for each new version.
            signer: signs the record; None: it has no signature.

        Raises:
            CatalogError: a file may not be part of a version, the id stands for another adapter, or for a
                version that is removed or not signed by `signer`.
            StorageError: the store or a disk failed; nothing of the version is visible.
        """
        if not PUBLISH_ID.fullmatch(publish_id):
            raise ValueError(f"publish_id {publish_id!r} must be 1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-'")
        entries = tuple(_describe(draft.adapter, name, path) for name, path in sorted(files.items()))
        if not any(entry.name.endswith(".safetensors") for entry in entries):
            raise CatalogError(
                f"{draft.adapter}: no .safetensors file among {sorted(files)}; nothing to publish"
            )
        base_version = self._begin(draft.adapter, publish_id)
        done, newest = self._find(draft.adapter, publish_id, base_version)
        if done is not None:
            self.check_living(done)
            given = {entry.sha256: files[entry.name] for entry in entries}
            held = {entry: given[entry.sha256] for entry in done.files if entry.sha256 in given}
            ContentWriter(self.storage, held).repair()
            check_signed(self, done, signer)
            return done
        contents = ContentWriter(self.storage, {entry: files[entry.name] for entry in entries})
        contents.write()
        contents.complete()
        record = self._claim(draft, entries, publish_id, newest + 1, signer)
        contents.complete()
        check_signed(self, record, signer)
        return record

    def published(self, adapter: str, publish_id: str) -> AdapterRecord | None:
        """The version that a publish made, removed or not, or None where it made none yet. Writes nothing.

        Raises:
            CatalogError: the id stands for another adapter, or the version's record is damaged.
            StorageError: the store failed.
        """
        if self.storage.info(publish_key(publish_id)) is None:
            return None
        base_version = self._begun(adapter, publish_id)
        return self._find(adapter, publish_id, base_version)[0]

    def set_alias(
        self,
        adapter: str,
        alias: str,
        version: int,
        *,
        forward_only: bool = False,
        expect: int | None = None,
    ) -> AliasEntry:
        """Let an alias mean a version. Fine where it does already.

        Args:
            adapter: whose alias.
            alias: its name.
            version: what it shall mean.
            forward_only: leave the alias where it is if it has ever meant this version or a newer one:
                somebody has published since, or rolled the alias back.
            expect: the version that the alias must mean now, 0 for none; of several who expect the same at
                once one moves it. None: whatever it means.

        Returns:
            The alias's last move: this one, or the one that made it superfluous.

        Raises:
            CatalogError: no alias may be called so, there is no such version, it is removed, or the alias
                does not mean what is expected.
            StorageError: the store failed.
        """
        return move_alias(self, adapter, alias, version, forward_only=forward_only, expect=expect)

    def _begin(self, adapter: str, publish_id: str) -> int:
        """Note that this publish has begun; the version that was the newest when it first did."""
        begun = _Begun(adapter=adapter, base_version=self.newest_version(adapter))
        key = publish_key(publish_id)
        if self.storage.write_once(key, begun.model_dump_json().encode()):
            return begun.base_version
        return self._begun(adapter, publish_id)

    def _begun(self, adapter: str, publish_id: str) -> int:
        """What the note of a publish says was the newest version when it first began."""
        key = publish_key(publish_id)
        try:
            earlier = _Begun.model_validate_json(self.storage.read(key))
        except ValidationError:
            place = join_uri(self.uri, key)
            raise CatalogError(f"{place}: not a publish's note; the object was altered or damaged") from None
        if earlier.adapter != adapter:
            raise CatalogError(
                f"{self.uri}: publish id {publish_id} stands for adapter {earlier.adapter}, not "
                f"{adapter}; use another"
            )
        return earlier.base_version

    def _find(self, adapter: str, publish_id: str, base_version: int) -> tuple[AdapterRecord | None, int]:
        """The version that this publish made, if it did, and the newest version of all."""
        newest = self.newest_version(adapter)
        # Upwards, since a publish that was not cut off made the first or one of the first.
        for version in range(base_version + 1, newest + 1):
            content = self.read_record(adapter, version)
            # Of others' records nothing is asked but the id: a damaged one must not stop all who follow.
            if content is not None and publish_id_of(content) == publish_id:
                return self._parse(content, adapter, version), newest
        return None, newest

    def _claim(
        self,
        draft: RecordDraft,
        entries: tuple[FileEntry, ...],
        publish_id: str,
        version: int,
        signer: Signer | None,
    ) -> AdapterRecord:
        """Create the record under the first free number from `version` on: no gap, no second winner.

        Every number that is taken is looked into, since it may be this publish's own: the store's answer was
        lost, or the same publish runs twice.
        """
        while True:
            record = AdapterRecord(
                **dict(draft),
                version=version,
                publish_id=publish_id,
                created_at=_now(),
                files=entries,
            )
            if signer is not None:
                record = signer.sign_record(record)
            key = numbered(versions_prefix(draft.adapter), version)
            if self.storage.write_once(key, record.to_bytes()):
                return record
            taken = self.read_record(draft.adapter, version)
            if taken is None:
                place = join_uri(self.uri, key)
                raise StorageError(f"{place}: the store refuses to create it, and has none; run again")
            if publish_id_of(taken) == publish_id:
                return self._parse(taken, draft.adapter, version)
            version += 1


def check_signed(catalog: CatalogView, record: AdapterRecord, signer: Signer | None) -> None:
    """Refuse a version that stood there already and that a signer, if there is one, has not signed.

    Raises:
        CatalogError: says who has.
    """
    found = record.signature
    if signer is None:
        return
    if found is None:
        problem = "has no signature"
    elif found.public_key != signer.public_key:
        problem = f"is signed by {fingerprint(found.public_key)}"
    elif not is_valid(found, signed_bytes(record)):
        problem = "its signature is not one of this record"
    else:
        return
    raise CatalogError(
        f"{catalog.uri}: {record.reference} is there already and {problem}; a record is never changed, so it "
        "cannot be signed any more; leave out the signature, or publish into another catalog"
    )


def _describe(adapter: str, name: str, path: Path) -> FileEntry:
    problem = file_name_problem(name)
    if problem is not None:
        raise CatalogError(f"{adapter}: the file name {name!r:.200} {problem}")
    with disk_errors(str(path)), path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileEntry(name=name, sha256=digest.hexdigest(), size_bytes=stream.tell())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
