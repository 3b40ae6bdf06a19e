"""The catalog of adapters and models: a folder or a bucket's prefix, safe for many writers at once."""

from raytune_ft.catalog.aliases import alias_history, check_alias, roll_back
from raytune_ft.catalog.lookup import AliasEntry, CatalogView
from raytune_ft.catalog.publish import Catalog
from raytune_ft.catalog.record import AdapterRecord, BaseModelRef, FileEntry, RecordDraft, model_card

__all__ = [
    "AdapterRecord",
    "AliasEntry",
    "BaseModelRef",
    "Catalog",
    "CatalogView",
    "FileEntry",
    "RecordDraft",
    "alias_history",
    "check_alias",
    "model_card",
    "roll_back",
]
