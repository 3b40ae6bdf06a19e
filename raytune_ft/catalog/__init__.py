"""The catalog of adapters and models: a folder or a bucket's prefix, safe for many writers at once."""

from raytune_ft.catalog.aliases import alias_history, check_alias, roll_back
from raytune_ft.catalog.compare import Change, compare_records
from raytune_ft.catalog.copying import Copy, copy_all_versions, copy_version
from raytune_ft.catalog.gate import refusal_message, refusals
from raytune_ft.catalog.lineage import Lineage, lineage_of
from raytune_ft.catalog.listing import Filter, Listing, list_catalog
from raytune_ft.catalog.lookup import AliasEntry, CatalogView, Removal
from raytune_ft.catalog.publish import Catalog
from raytune_ft.catalog.record import AdapterRecord, BaseModelRef, FileEntry, RecordDraft, model_card
from raytune_ft.catalog.removal import remove_version, restore_version
from raytune_ft.catalog.serve_dir import ServeDirResult, update_serve_dir
from raytune_ft.catalog.signing import Signer, Trust, fingerprint
from raytune_ft.catalog.sweep import Swept, sweep
from raytune_ft.catalog.verify import Verification, verify

__all__ = [
    "AdapterRecord",
    "AliasEntry",
    "BaseModelRef",
    "Catalog",
    "CatalogView",
    "Change",
    "Copy",
    "FileEntry",
    "Filter",
    "Lineage",
    "Listing",
    "RecordDraft",
    "Removal",
    "ServeDirResult",
    "Signer",
    "Swept",
    "Trust",
    "Verification",
    "alias_history",
    "check_alias",
    "compare_records",
    "copy_all_versions",
    "copy_version",
    "fingerprint",
    "lineage_of",
    "list_catalog",
    "model_card",
    "refusal_message",
    "refusals",
    "remove_version",
    "restore_version",
    "roll_back",
    "sweep",
    "update_serve_dir",
    "verify",
]
