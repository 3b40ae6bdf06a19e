"""The catalog of adapters and models: a folder or a bucket's prefix, safe for many writers at once."""

from raytune_ft.catalog.lookup import CatalogView
from raytune_ft.catalog.publish import Catalog, check_alias
from raytune_ft.catalog.record import AdapterRecord, BaseModelRef, FileEntry, RecordDraft, model_card

__all__ = [
    "AdapterRecord",
    "BaseModelRef",
    "Catalog",
    "CatalogView",
    "FileEntry",
    "RecordDraft",
    "check_alias",
    "model_card",
]
